"""The summary that a run prints when it is complete."""

from pathlib import Path

from training.results.card import DEPTH_WEIGHTS, LOSS_CURVE, METRICS, count_parameters, verdict
from training.support.files import read_json
from training.support.tables import align


def summarize_run(models: dict[str, Path], task: str, prompt: str | None, samples: dict[str, str]) -> str:
    """
    The results of a run and of its baseline, if it has one, the texts that they generate, and the paths of the pictures.

    Args:
        models: the folders, by the names of their schemes, the run's own first.
        task: a pipeline tag.
        prompt: the prompt of `samples`.
        samples: the generated texts, by the same names.
    """
    results = {name: read_json(folder / "all_results.json") for name, folder in models.items()}
    unit = "tokens" if task == "text-generation" else "images"
    header = ["", "parameters", *(label for _, label, _ in METRICS[task]), f"{unit}/s"]
    rows = []
    for name, folder in models.items():
        speed = results[name].get(f"train_{unit}_per_second")
        figures = [f"{results[name][key]:.4f}" for key, _, _ in METRICS[task]]
        rows.append([name, f"{count_parameters(folder):,}", *figures, "" if speed is None else f"{speed:,.0f}"])
    parts = [align(header, rows)]
    if len(results) > 1:
        parts.append(verdict(METRICS[task][0], results))
    parts += [f"{name} continues {prompt!r}:\n\n{sample}" for name, sample in samples.items()]
    folder = next(iter(models.values()))
    pictures = [str(folder / name) for name in (LOSS_CURVE, DEPTH_WEIGHTS) if (folder / name).exists()]
    parts.append(
        f"The run is complete: {folder} (model card: {folder / 'README.md'}; pictures: {', '.join(pictures)})"
    )
    return "\n\n".join(parts)
