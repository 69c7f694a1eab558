"""The model card of a run, from what the run left in its folder."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from training.arguments import RUNS_FOLDER, Run
from training.figures import draw_depth_weights, draw_loss_curves


TEMPLATE = Path(__file__).parent.parent / "model_cards" / "card.md.jinja"
LOSS_CURVE, DEPTH_WEIGHTS = "loss_curve.png", "depth_weights.png"
DEPTH_WEIGHTS_DATA = "depth_weights.json"

# What a card shows of a run's training arguments, and the names it has there.
HYPER_PARAMETERS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "gate_learning_rate_scale",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)
#: The figures of a task: the key in `all_results.json`, how a card calls it, and whether less is better.
METRICS = {
    "text-generation": [
        ("eval_loss", "held-out loss (nats per token)", True),
        ("eval_perplexity", "held-out perplexity", True),
        ("eval_bits_per_byte", "held-out bits per byte", True),
    ],
    "image-classification": [
        ("eval_accuracy", "held-out accuracy", False),
        ("eval_loss", "held-out loss (nats)", True),
    ],
}


def read_json(file: Path) -> dict | list:
    return json.loads(file.read_text(encoding="utf-8"))


def write_card(folder: Path, run: Run, note: dict) -> None:
    """
    Write `README.md` and its pictures into the folder of a run.

    Args:
        folder: of the run, with `config.json`, the weights, `all_results.json`, `trainer_state.json` and
            `depth_weights.json`, as the run left them.
        note: what the folder cannot tell: `task` (a pipeline tag), `data` (a sentence), `dataset` (an id on the Hub, or
            `None`), `dataset_name`, `baseline` (the folder of the baseline, or `None`) and, for text generation,
            `prompt`.
    """
    models = {scheme_name(folder): folder}
    if note["baseline"] is not None:
        models[scheme_name(note["baseline"])] = note["baseline"]
    results = {name: read_json(path / "all_results.json") for name, path in models.items()}
    draw_loss_curves(
        {name: read_json(path / "trainer_state.json")["log_history"] for name, path in models.items()},
        folder / LOSS_CURVE,
    )
    weights = read_json(folder / DEPTH_WEIGHTS_DATA)
    if weights:
        draw_depth_weights(weights, folder / DEPTH_WEIGHTS)

    metrics = METRICS[note["task"]]
    own = next(iter(models))
    arguments = run.training.to_dict()
    name = folder.as_posix().removeprefix(f"{RUNS_FOLDER}/").strip("/").replace("/", "-")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=note["task"],
        license=arguments["model_license"],
        datasets=[note["dataset"]] if note["dataset"] else None,
        tags=["deep-cross-attention", "dca", run.config.residual_scheme],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=note["task"],
                dataset_type=note["dataset"] or run.data.dataset,
                dataset_name=note["dataset_name"],
                metric_type=key.removeprefix("eval_"),
                metric_name=label,
                metric_value=round(results[own][key], 6),
            )
            for key, label, _ in metrics
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        folder=folder.as_posix(),
        task=note["task"],
        model_name=name,
        scheme=own,
        data_sentence=note["data"],
        metrics=metrics,
        results=results,
        parameters={name: count_parameters(path) for name, path in models.items()},
        verdict=_verdict(metrics[0], results) if len(results) > 1 else None,
        steps=read_json(folder / "trainer_state.json")["global_step"],
        hyper_parameters={name: arguments[name] for name in (_length(arguments), *HYPER_PARAMETERS)},
        config=run.config,
        alteration=arguments.get("alteration"),  # which only `training.altered` has
        loss_curve=LOSS_CURVE,
        depth_weights=DEPTH_WEIGHTS if weights else None,
        prompt=repr(note.get("prompt")),  # as Python writes it: JSON's escapes of an emoji are another text to Python
        versions={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "datasets")},
        },
        configuration=yaml.safe_dump(run.named["model"], sort_keys=False).strip(),
    )
    card.save(folder / "README.md")


def _length(arguments: dict) -> str:
    """Which of the training arguments says how long a run is."""
    return "max_steps" if arguments["max_steps"] > 0 else "num_train_epochs"


def scheme_name(folder: Path) -> str:
    """The name of a model's residual scheme, with its `k`."""
    config = read_json(folder / "config.json")
    scheme, k = config.get("residual_scheme", "dca"), config.get("last_k")
    return scheme if k is None else f"{k}-{scheme}"


def count_parameters(folder: Path) -> int:
    """How many parameters the weights in a folder have; tied ones are saved once."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dictionary)
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def _verdict(metric: tuple[str, str, bool], results: dict[str, dict]) -> str:
    """Which of two models is better on this run, in words."""
    key, label, less_is_better = metric
    (own, own_results), (other, other_results) = results.items()
    difference = own_results[key] - other_results[key]
    if difference == 0:
        return f"On this run `{own}` and `{other}` have the same {label}."
    better, worse = (own, other) if (difference < 0) == less_is_better else (other, own)
    return (
        f"On this run `{better}` is better than `{worse}`: its {label} is {abs(difference):.3g} "
        f"{'lower' if less_is_better else 'higher'}. This is one run with one seed."
    )
