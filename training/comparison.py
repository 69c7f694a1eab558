"""What came of the runs of a comparison: figures over the seeds, a table and pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from training.benchmarks.report import align
from training.card import METRICS, count_parameters, read_json, scheme_name
from training.figures import draw_compared_curves, draw_loss_over_parameters, draw_loss_over_time
from training.study import Comparison, Member


TABLE, RAW = "README.md", "comparison.json"
CURVES, OVER_TIME, OVER_PARAMETERS = "loss_curves.png", "loss_over_time.png", "loss_over_parameters.png"

TASKS = {"causal_lm": "text-generation", "image_classification": "image-classification"}

CONFIDENCE = 0.95


def read_member(member: Member) -> dict[str, Any]:
    """
    What came of a run: its figures, by the names that they have in `comparison.json`, and its curves as lists of points.

    The held-out figures are the run's own, all by the same code: that of the training commands and of `training.evaluate`.
    """
    state, results = read_json(member.folder / "trainer_state.json"), read_json(member.folder / "all_results.json")
    steps, history, arguments = state["global_step"], state["log_history"], member.run.training
    text = member.command == "causal_lm"
    curve_key = "eval_perplexity" if text else "eval_loss"
    held_out = {entry["step"]: entry for entry in history if "eval_loss" in entry} | {steps: results}
    # Of the training alone, where that is measured, and over all sittings; evaluations and saving are not in it.
    speed = results.get("train_tokens_per_second" if text else "train_images_per_second")
    length = member.run.data.block_size if text else 1
    if speed is None:
        speed = results["train_samples_per_second"] * length
    batch = arguments.global_batch_size
    if batch is None:
        batch = state["train_batch_size"] * arguments.gradient_accumulation_steps
        # How many processes there were is not recorded.
        batch *= max(1, round(results["train_samples_per_second"] / results["train_steps_per_second"] / batch))
    examples = steps * batch * length
    # The runtime of a run that was resumed is that of its last sitting.
    share = results["train_steps_per_second"] * results["train_runtime"] / steps
    config = read_json(member.folder / "config.json")
    sittings = read_json(member.sittings) if member.sittings.exists() else {}
    return {
        "variant": member.variant,
        "seed": member.seed,
        "folder": member.folder.as_posix(),
        "scheme": scheme_name(member.folder),
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "parameters": count_parameters(member.folder),
        "steps": steps,
        "examples": examples,
        "seconds": examples / speed,
        "wall_time": results["train_runtime"] / (share if share < 0.99 else 1),
        "speed": speed,
        **{key: results[key] for key, _, _ in METRICS[TASKS[member.command]]},
        "held_out": [[step, entry["eval_loss"], entry[curve_key]] for step, entry in sorted(held_out.items())],
        "training": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "named": member.run.named,
        **sittings,
    }


def steps_to_reach(held_out: list[list[float]], loss: float) -> float | None:
    """
    After how many steps the held-out loss first was no more than `loss`, with straight lines between the evaluations, or
    `None` if it never was.

    Args:
        held_out: steps and losses, one pair (or longer) for each evaluation, in order.
    """
    before = None
    for step, value, *_ in held_out:
        if value <= loss:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, and standard deviation over the seeds, which one seed has none of."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}


def difference(values: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    """
    The mean difference to the baseline's value of the same seed, and half the width of its confidence interval (Student's
    t), which one seed has none of.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    half = None
    if len(differences) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
        half = float(quantile * np.std(differences, ddof=1) / math.sqrt(len(differences)))
    return {"mean": float(np.mean(differences)), "half_width": half, "values": differences}


def summarize(runs: list[dict], baseline: str, metrics: list[str]) -> dict[str, dict]:
    """
    The figures of each variant, over its seeds.

    Args:
        runs: what `read_member` made of them.
        baseline: the variant that the others are compared with, run of a seed by run of that seed.
        metrics: the held-out figures, by their keys in a run.
    """
    by_variant = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    reference = by_variant.get(baseline, {})
    # The baseline's own way to its final loss is measured as all others are.
    own = {seed: steps_to_reach(run["held_out"], run["eval_loss"]) for seed, run in reference.items()}
    summary = {}
    for variant, of_seed in by_variant.items():
        figures = {"seeds": list(of_seed)}
        for key in ("parameters", "steps", "examples", "seconds", "speed", *metrics):
            figures[key] = spread([run[key] for run in of_seed.values()])
        for key in metrics:
            figures[f"{key}_difference"] = difference(
                {seed: run[key] for seed, run in of_seed.items()}, {seed: run[key] for seed, run in reference.items()}
            )
        shared = [seed for seed in of_seed if seed in reference]
        reached = {"seeds": [], "steps": [], "seconds": [], "steps_ratio": [], "seconds_ratio": []}
        for seed in shared:
            run, other = of_seed[seed], reference[seed]
            steps = steps_to_reach(run["held_out"], other["eval_loss"])
            if steps is None:
                continue
            seconds = steps * run["seconds"] / run["steps"]
            reached["seeds"].append(seed)
            reached["steps"].append(steps)
            reached["seconds"].append(seconds)
            reached["steps_ratio"].append(steps / own[seed])
            reached["seconds_ratio"].append(seconds / (own[seed] * other["seconds"] / other["steps"]))
        figures["reached"] = {
            key: values if key == "seeds" or not values else spread(values) for key, values in reached.items()
        } | {"of_seeds": len(shared)}
        summary[variant] = figures
    return summary


def with_spread(figure: dict, digits: int) -> str:
    deviation = figure["standard_deviation"]
    return f"{figure['mean']:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def make_table(summary: dict[str, dict], baseline: str, task: str) -> str:
    """The table in Markdown, a row for each variant."""
    unit = "tokens" if task == "text-generation" else "images"
    header = ["", "parameters", "steps", unit]
    for key, label, _ in METRICS[task]:
        header += [label] + [f"to {baseline}"] * (key == METRICS[task][0][0])
    header += [f"{unit}/s", "time", f"steps to {baseline}'s loss", "time to it"]
    rows = []
    for variant, figures in summary.items():
        row = [variant, *(f"{figures[key]['mean']:,.0f}" for key in ("parameters", "steps", "examples"))]
        for index, (key, _, _) in enumerate(METRICS[task]):
            row.append(with_spread(figures[key], 4 if figures[key]["mean"] < 10 else 2))
            if index == 0:
                apart = figures[f"{key}_difference"]
                half = "" if apart is None or apart["half_width"] is None else f" ± {apart['half_width']:.4f}"
                row.append("" if apart is None or variant == baseline else f"{apart['mean']:+.4f}{half}")
        row += [with_spread(figures["speed"], 0), duration(figures["seconds"]["mean"])]
        reached = figures["reached"]
        if not reached["of_seeds"]:
            row += ["", ""]
        elif not reached["seeds"]:
            row += ["not reached"] * 2
        else:
            times = len(reached["seeds"])
            part = "" if times == reached["of_seeds"] else f"; {times} of {reached['of_seeds']} seeds"
            row.append(f"{reached['steps']['mean']:,.0f} ({reached['steps_ratio']['mean']:.2f}{part})")
            row.append(f"{duration(reached['seconds']['mean'])} ({reached['seconds_ratio']['mean']:.2f}{part})")
        rows.append(row)
    return align(header, rows)


def describe_training(runs: list[dict]) -> list[str]:
    """On what the runs were trained, a line for each kind of machine, and how many at a time."""
    sittings = [sitting for run in runs for sitting in run.get("sittings", [])]
    lines = []
    for sitting in sittings:
        machine = ", ".join(f"{name} {value}" for name, value in sitting["machine"].items() if value is not None)
        at_a_time = sitting["at_a_time"]
        line = f"{machine}; " + ("one run at a time" if at_a_time == 1 else f"{at_a_time} runs at a time")
        if line not in lines:
            lines.append(line)
    if not all("sittings" in run for run in runs):
        lines.append("not recorded for runs that were not trained by `training.compare`")
    return lines


def write_comparison(comparison: Comparison, runs: list[dict], failed: dict[str, str], folder: Path, line: str) -> str:
    """Write the table, the figures and everything in JSON into a folder, and return the table."""
    task = TASKS[comparison.members[0].command]
    metrics = METRICS[task]
    summary = summarize(runs, comparison.baseline, [key for key, _, _ in metrics])
    table = make_table(summary, comparison.baseline, task)
    first = comparison.members[0]
    variants = sorted(summary, key=lambda variant: variant != comparison.baseline)
    by_variant = {variant: [run for run in runs if run["variant"] == variant] for variant in variants}
    perplexity = task == "text-generation"
    figures = {
        CURVES: "Training and held-out loss over the steps; the bands reach from the lowest to the highest seed."
    }
    draw_compared_curves(by_variant, folder / CURVES)
    reference = [run["held_out"][-1][2] for run in by_variant.get(comparison.baseline, [])]
    draw_loss_over_time(
        by_variant,
        "held-out perplexity" if perplexity else "held-out loss (nats)",
        float(np.mean(reference)) if reference else None,
        folder / OVER_TIME,
    )
    figures[OVER_TIME] = (
        f"Held-out {'perplexity' if perplexity else 'loss'} over the training time. The dashed line is where "
        f"{comparison.baseline} ended."
    )
    if len({run["parameters"] for run in runs}) > 1:
        draw_loss_over_parameters(by_variant, folder / OVER_PARAMETERS)
        figures[OVER_PARAMETERS] = "Final held-out loss over the number of parameters."
    else:
        (folder / OVER_PARAMETERS).unlink(missing_ok=True)

    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    counts = ", ".join(f"{variant} {len(figures_['seeds'])}" for variant, figures_ in summary.items())
    notes = [
        f"Seeds: {', '.join(map(str, seeds))} (runs: {counts}). ± after a figure is the standard deviation over the seeds. "
        f"The differences to {comparison.baseline} are between runs of the same seed, ± half of the {CONFIDENCE:.0%} confidence "
        "interval of their mean (Student's t).",
        f'"Steps to {comparison.baseline}\'s loss" are those after which the held-out loss first was no more than the final '
        f"one of {comparison.baseline} with the same seed, with straight lines between the evaluations; in brackets is the "
        f"ratio to what {comparison.baseline} itself took. Times are of the training steps alone: tokens (or images) by their speed.",
    ]
    if not perplexity:
        notes.append("A smaller batch at the end of an epoch is counted as a whole one.")
    if len(seeds) == 1:
        notes.append("**One seed says nothing about the spread.**")
    data = first.run.named["data"] or {"dataset": first.run.data.dataset}
    data = ", ".join(f"`{name}` {value}" for name, value in data.items())
    sections = [f"# {comparison.title}", table, *notes]
    sections += [f"![{text}]({file})\n\n{text}" for file, text in figures.items()]
    if failed:
        sections += ["## Runs that failed", "\n".join(f"- {name}: {error}" for name, error in failed.items())]
    sections += [
        "## How it was made",
        f"```bash\n{line}\n```",
        f"Data: {data}.",
        "\n".join(f"- Trained on: {each}" for each in describe_training(runs)),
        f"All figures, of every run too, are in [`{RAW}`]({RAW}).",
    ]
    (folder / TABLE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    content = {
        "title": comparison.title,
        "command": line,
        "task": task,
        "baseline": comparison.baseline,
        "metrics": {key: label for key, label, _ in metrics},
        "confidence": CONFIDENCE,
        "variants": summary,
        "failed": failed,
        "runs": runs,
    }
    (folder / RAW).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return table
