"""What came of the runs of a comparison: figures over the seeds, a table and pictures."""

import json
import math
from pathlib import Path
from typing import Any

from training.results.card import METRICS, count_parameters, scheme_name
from training.results.figures import (
    draw_compared_curves,
    draw_differences,
    draw_loss_over_parameters,
    draw_loss_over_step_time,
    draw_loss_over_time,
)
from training.studies.differences import FALSE_DISCOVERY_RATE, differences
from training.studies.gains import GAINS, gains, savings
from training.studies.statistics import (
    CONFIDENCE,
    DIVERGENCE,
    SPIKE_DEVIATIONS,
    SPIKE_LOGGING_STEPS,
    SPIKE_WINDOW,
    count_spikes,
    has_diverged,
    summarize,
)
from training.studies.step_times import timed
from training.studies.study import COMMANDS, Comparison, Member, Trial, best_values
from training.support.errors import UserError
from training.support.files import read_json, write_whole
from training.support.tables import align
from training.text.document_losses import DOCUMENT_LOSSES


TABLE, RAW = "README.md", "comparison.json"
#: What a run tells of how long it took.
OF_A_TRAINING = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
CURVES, OVER_TIME, OVER_PARAMETERS = "loss_curves.png", "loss_over_time.png", "loss_over_parameters.png"
OVER_STEP_TIME, DIFFERENCES = "loss_over_step_time.png", "differences.png"
#: All pictures that a comparison may have.
PICTURES = (CURVES, OVER_TIME, OVER_PARAMETERS, OVER_STEP_TIME, DIFFERENCES)


def read_member(member: Member) -> dict[str, Any]:
    """
    What came of a run: its figures, by the names that they have in `comparison.json`, and its curves as lists of points.

    The held-out figures are the run's own, all by the same code: that of the training commands and of `training.evaluate`.
    """
    again = f"move {member.folder} away, and train it again"
    metrics = [key for key, _, _ in METRICS[COMMANDS[member.command].name]]
    state = read_json(member.folder / "trainer_state.json", "global_step", "log_history", remedy=again)
    results = read_json(member.folder / "all_results.json", *OF_A_TRAINING, *metrics, remedy=again)
    steps, history, arguments = state["global_step"], state["log_history"], member.run.training
    text = COMMANDS[member.command].name == "text-generation"
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
    config = read_json(member.folder / "config.json", "num_hidden_layers", "hidden_size", remedy=again)
    sittings = read_json(member.sittings) if member.sittings.exists() else {}
    documents = {}
    if (of_documents := member.folder / DOCUMENT_LOSSES).exists():
        documents = {
            each["document"]: [each["tokens"], each["loss"]]
            for each in read_json(of_documents, kind=list, remedy=again)
        }
    training = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    seen = arguments.logging_steps <= SPIKE_LOGGING_STEPS
    return {
        "group": member.group,
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
        **{key: results[key] for key in metrics},
        "held_out": [[step, entry["eval_loss"], entry[curve_key]] for step, entry in sorted(held_out.items())],
        "training": training,
        "spikes": count_spikes(training) if seen else None,
        "diverged": has_diverged(training),
        "named": member.run.named,
        **({"documents": documents} if documents else {}),
        **sittings,
    }


def with_spread(figure: dict, digits: int) -> str:
    deviation = figure["standard_deviation"]
    return f"{figure['mean']:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def label_of(group: str | None, variant: str) -> str:
    return variant if group is None else f"{group}, {variant}"


def duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def make_table(summary: dict[str | None, dict[str, dict]], baseline: str, task: str) -> str:
    """The table in Markdown, a row for each variant of each group."""
    unit = "tokens" if task == "text-generation" else "images"
    header = ["", "parameters", "steps", unit]
    for key, label, _ in METRICS[task]:
        header += [label] + [f"to {baseline}"] * (key == METRICS[task][0][0])
    header += [f"{unit}/s", "time", f"steps to {baseline}'s loss", "time to it"]
    rows = []
    for group, variant in [(group, variant) for group, variants in summary.items() for variant in variants]:
        figures = summary[group][variant]
        row = [
            label_of(group, variant),
            *(f"{figures[key]['mean']:,.0f}" for key in ("parameters", "steps", "examples")),
        ]
        for index, (key, _, _) in enumerate(METRICS[task]):
            row.append(with_spread(figures[key], 4 if figures[key]["mean"] < 10 else 2))
            if index == 0:
                apart = figures[f"{key}_difference"]
                half = "" if apart is None or apart["half_width"] is None else f" ± {apart['half_width']:.4f}"
                row.append("" if apart is None or variant == baseline else f"{apart['mean']:+.4f}{half}")
        row += [with_spread(figures["speed"], 0), duration(figures["seconds"]["mean"])]
        reached = figures["reached"]
        seeds = f"{reached['seeds']} of {reached['of_seeds']} seeds"
        if not reached["of_seeds"]:
            row += ["", ""]
        elif reached["steps"] is None:
            row += [f"only by {seeds}" if reached["seeds"] else "not reached"] * 2
        else:
            part = f"; {seeds}" if reached["seeds"] < reached["of_seeds"] else ""
            row.append(f"{reached['steps']:,.0f} ({reached['steps_ratio']:.2f}{part})")
            row.append(f"{duration(reached['seconds'])} ({reached['seconds_ratio']:.2f}{part})")
        rows.append(row)
    return align(header, rows)


def make_gains_table(of_groups: dict[str | None, dict[str, dict]], baseline: str) -> str:
    """What each variant of each group gains on the baseline, in Markdown; what is lost has a plus."""
    rows = []
    for group, variants in of_groups.items():
        for variant, figures in variants.items():
            row = [label_of(group, variant), f"{figures['parameters']:,.0f}", f"{figures['step_time']:.2f}"]
            for key in GAINS:
                apart = figures[key]
                half = "" if apart is None or apart["half_width"] is None else f" ± {apart['half_width']:.4f}"
                row.append(
                    "" if variant == baseline else "unknown" if apart is None else f"{apart['mean']:+.4f}{half}"
                )
            rows.append(row)
    return align(["", "parameters", "time of a step", *GAINS.values()], rows)


def gains_note(baseline: str) -> str:
    return (
        f"Differences of the held-out loss to {baseline} with the same seed (nats; negative is better), ± half the width of the "
        f"{CONFIDENCE:.0%} confidence interval of their mean. The time of a step is relative to {baseline}. *At equal tokens*: after all "
        "steps. *At equal time*: after the time that the faster of the two took, interpolated between the evaluations; only fair if "
        "the learning rate does not cool down to an end that the slower one has not reached. *At equal parameters*: against "
        f"{baseline} at that size, interpolated over the logarithm of the parameters between the sizes in this comparison; unknown if "
        "none of them is large enough."
    )


def make_savings_table(of_groups: dict[str | None, dict[str, dict]]) -> str:
    """In what part of the baseline's steps and time each scheme of each group reaches its loss, in Markdown."""
    rows = []
    for group, schemes in of_groups.items():
        for scheme, figures in schemes.items():
            row = [label_of(group, scheme)]
            for index, key in enumerate(("steps", "time")):
                values = [pair[index] for pair in figures["values"].values()]
                median, *each = ("more" if value is None else f"{value:.2f}" for value in (figures[key], *values))
                row.append(f"{median} ({', '.join(each)})")
            rows.append(row)
    return align(["", "part of the steps", "part of the time"], rows)


def savings_note(baseline: str) -> str:
    return (
        f"The part of {baseline}'s steps, and of its time, in which the final loss of {baseline} is reached: the median over the seeds, and "
        "in brackets each seed. It follows from complete runs with different numbers of steps, each with its own cool-down, "
        "interpolated over the logarithm of the steps. Where the shortest run is already better, its length is given."
    )


def make_differences_table(cells: list[dict[str, Any]]) -> str:
    """How sure each difference is, in Markdown."""
    header = ["", "seeds", "difference", "plain", "pooled", "p", "a discovery"]
    with_documents = any(cell["documents"] for cell in cells)
    rows = []
    for cell in cells:
        halves = ["" if cell[key] is None else f"± {cell[key]:.4f}" for key in ("half_width", "pooled_half_width")]
        verdict = {None: "", True: "yes", False: "no"}[cell["is_discovery"]]
        row = [label_of(cell["group"], cell["variant"]), str(cell["seeds"]), f"{cell['mean']:+.4f}", *halves]
        row += ["" if cell["p"] is None else f"{cell['p']:.2g}", verdict]
        if with_documents:
            row.append("" if cell["documents"] is None else "{:+.4f} to {:+.4f}".format(*cell["documents"]))
        rows.append(row)
    return align(header + ["over documents"] * with_documents, rows)


def differences_note(cells: list[dict[str, Any]], baseline: str, label: str) -> str:
    note = (
        f"Differences of the {label} to {baseline} with the same seed, with {CONFIDENCE:.0%} confidence intervals of up to three kinds. "
        "*Plain*: Student's t over the seeds of the row. *Pooled*: the same, with one variance for all rows, estimated from all of "
        "them; p belongs to this one. "
    )
    if any(cell["documents"] for cell in cells):
        note += (
            "*Over documents*: a bootstrap (BCa) of the held-out documents with the seeds fixed: it shows how much depends on the choice "
            "of the documents. "
        )
    found = sum(bool(cell["is_discovery"]) for cell in cells)
    compared = "1 comparison" if len(cells) == 1 else f"{len(cells)} comparisons"
    return note + (
        f"A discovery is a difference that the Benjamini-Hochberg procedure accepts at a false discovery rate of "
        f"{FALSE_DISCOVERY_RATE:.2g}: {found} of {compared}. (All rows of a group share the runs of the baseline.)"
    )


def make_tuning_table(trials: list[Trial]) -> str:
    """The held-out losses of the trials, with the values that were chosen, in Markdown."""
    grid = [json.loads(each) for each in dict.fromkeys(json.dumps(trial.values) for trial in trials)]
    names = [", ".join(f"`{name}` {value}" for name, value in values.items()) for values in grid]
    rows = {}
    for trial in trials:
        rows.setdefault((trial.group, trial.variant), []).append(trial)
    cells = []
    for key, of_variant in rows.items():
        losses = [
            "" if trial.loss is None else "diverged" if math.isinf(trial.loss) else f"{trial.loss:.4f}"
            for trial in of_variant
        ]
        chosen = grid.index(best_values(of_variant))
        edge = " (the end of the grid)" if len(grid) > 2 and chosen in (0, len(grid) - 1) else ""
        cells.append([label_of(*key), *losses, names[chosen] + edge if all(losses) else "not known yet"])
    return align(["", *names, "chosen"], cells)


TUNING_NOTE = (
    "Held-out losses of each variant with each of these values, on a seed that is not among those above. The best values were used "
    "for the runs above. If they are at the end of the grid, better ones may lie beyond."
)


def tuning_record(trials: list[Trial]) -> list[dict[str, Any]]:
    """The trials that have ended, in JSON; those that diverged have no loss."""
    return [
        {
            "group": each.group,
            "variant": each.variant,
            "seed": each.member.seed,
            **each.values,
            "eval_loss": None if math.isinf(each.loss) else each.loss,
            "named": each.member.run.named,
        }
        for each in trials
        if each.loss is not None
    ]


def make_stability_table(runs: list[dict], diverged: list[Member]) -> str:
    """How many runs of each variant of each group had spikes or diverged, in Markdown."""
    rows = {}
    for group, variant, spikes, is_diverged in [
        *((run["group"], run["variant"], run["spikes"], run["diverged"]) for run in runs),
        *((member.group, member.variant, None, True) for member in diverged),
    ]:
        row = rows.setdefault(label_of(group, variant), {"runs": 0, "diverged": 0, "spikes": []})
        row["runs"] += 1
        row["diverged"] += is_diverged
        row["spikes"] += [] if spikes is None else [spikes]
    header = ["", "runs", "diverged", "with spikes", "spikes in all"]
    cells = []
    for name, row in rows.items():
        # Left empty where none could be seen, which is not to say that there were none.
        spikes = [sum(map(bool, row["spikes"])), sum(row["spikes"])] if row["spikes"] else ["", ""]
        cells.append([name, *map(str, (row["runs"], row["diverged"], *spikes))])
    return align(header, cells)


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


def grouped(runs: list[dict], baseline: str) -> dict[str | None, dict[str, list[dict]]]:
    """The runs by group and variant, the baseline first."""
    groups = {run.get("group"): {} for run in runs}
    for run in sorted(runs, key=lambda run: run["variant"] != baseline):
        groups[run.get("group")].setdefault(run["variant"], []).append(run)
    return groups


def draw_figures(
    groups: dict[str | None, dict[str, list[dict]]],
    baseline: str,
    task: str,
    folder: Path,
    tuned: dict[str | None, dict[str, dict]],
    cells: list[dict[str, Any]],
) -> dict[str, str]:
    """
    Draw the figures of a comparison into a folder, and return what each shows, by its file.

    Args:
        tuned: the `gains` of each group, of variants that are tuned alike.
        cells: the `differences`.
    """
    figures = {
        CURVES: "Training and held-out loss over the steps; the bands reach from the lowest to the highest seed."
    }
    draw_compared_curves(groups, folder / CURVES)
    label = "perplexity" if task == "text-generation" else "loss (nats)"
    draw_loss_over_time(groups, f"held-out {label}", baseline, folder / OVER_TIME)
    figures[OVER_TIME] = f"Held-out {label} over the training time. The dashed line is where {baseline} ended."
    # Groups of one size or nearly so, of learning rates say, have nothing to tell about sizes.
    sizes = [
        run["parameters"]
        for group, variants in groups.items()
        for variant, of_seeds in variants.items()
        for run in of_seeds
        if group is None or variant == baseline
    ]
    if sizes and max(sizes) > 1.01 * min(sizes):
        draw_loss_over_parameters(groups, folder / OVER_PARAMETERS)
        figures[OVER_PARAMETERS] = "Final held-out loss over the number of parameters."
    else:
        (folder / OVER_PARAMETERS).unlink(missing_ok=True)
    if tuned:
        figures[OVER_STEP_TIME] = (
            f"Final held-out loss minus that of {baseline} with the same seed, over the time of a training step. Points below the "
            f"dashed line are better at equal tokens. Bars are {CONFIDENCE:.0%} confidence intervals."
        )
        draw_loss_over_step_time(tuned, baseline, folder / OVER_STEP_TIME)
    else:
        (folder / OVER_STEP_TIME).unlink(missing_ok=True)
    if len(cells) > 1 and all(cell["pooled_half_width"] is not None for cell in cells):
        figures[DIFFERENCES] = (
            f"Final held-out loss minus that of {baseline} with the same seed, better on the left. Thick bars are pooled "
            f"{CONFIDENCE:.0%} confidence intervals, thin bars plain ones."
        )
        named = [(label_of(cell["group"], cell["variant"]), cell) for cell in cells]
        draw_differences({"": named}, f"{METRICS[task][0][1]} less that of {baseline}", folder / DIFFERENCES)
    else:
        (folder / DIFFERENCES).unlink(missing_ok=True)
    return figures


def redraw(folder: Path) -> None:
    """
    Draw the figures of a comparison again, from its `comparison.json`.

    Raises:
        [`UserError`]: the folder holds none, or cannot be written.
    """
    content = read_json(folder / RAW, "runs", "baseline", "task", remedy="name the folder of a comparison")
    try:
        tuned = content.get("gains") or {}
        if tuned and "groups" not in content:
            tuned = {None: tuned}
        groups = grouped(timed(content["runs"], content.get("step_times")), content["baseline"])
        draw_figures(groups, content["baseline"], content["task"], folder, tuned, content.get("differences") or [])
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be redrawn: {error.strerror} ({error.filename}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(folder / RAW)!r} is not of this command: name the folder of a comparison.") from error


def draw_forest(folders: list[Path], file: Path) -> None:
    """
    Draw the differences of several comparisons in one picture.

    Raises:
        [`UserError`]: a folder holds no comparison with differences, or the picture cannot be written.
    """
    rows = {}
    for folder in folders:
        content = read_json(folder / RAW, "title", "differences", remedy="name the folder of a comparison")
        rows[content["title"]] = [(label_of(cell["group"], cell["variant"]), cell) for cell in content["differences"]]
    try:
        draw_differences(rows, "held-out loss less that of the baseline (nats)", file)
    except (OSError, ValueError) as error:  # (a ValueError where the name ends as no picture's does)
        raise UserError(f"`forest` is {str(file)!r}, which cannot be written: {error}.") from error


def record_of(
    comparison: Comparison,
    runs: list[dict],
    failed: dict[str, str],
    line: str,
    step_times: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    What `comparison.json` says of a comparison.

    Args:
        runs: what `read_member` made of those that are whole.
        failed: what went wrong, by the names of other runs.
        line: the command that asks for it.
        step_times: of `measure_step_times`; without them, times are those of the runs.
    """
    metrics = METRICS[COMMANDS[comparison.members[0].command].name]
    of_groups = {group: [] for group in dict.fromkeys(run["group"] for run in runs)}
    for run in timed(runs, step_times):
        of_groups[run["group"]].append(run)
    summary = {
        group: summarize(of_group, comparison.baseline, [key for key, _, _ in metrics])
        for group, of_group in of_groups.items()
    }
    tuned = {}
    if comparison.trials:
        tuned = {group: gains(of_group, comparison.baseline) for group, of_group in of_groups.items()}
        tuned = {group: gained for group, gained in tuned.items() if gained}
    cells = differences(of_groups, comparison.baseline, metrics[0][0])
    saved = {group: savings(of_group, comparison.baseline) for group, of_group in of_groups.items()}
    saved = {group: schemes for group, schemes in saved.items() if schemes}
    return {
        "title": comparison.title,
        "command": line,
        "task": COMMANDS[comparison.members[0].command].name,
        "baseline": comparison.baseline,
        "metrics": {key: label for key, label, _ in metrics},
        "confidence": CONFIDENCE,
        **({"variants": summary[None]} if None in summary else {"groups": summary}),
        **({"differences": cells} if cells else {}),
        **({"gains": tuned.get(None, tuned)} if tuned else {}),
        **({"savings": saved.get(None, saved)} if saved else {}),
        **({"tuning": tuning_record(comparison.trials)} if comparison.trials else {}),
        **({"step_times": step_times} if step_times else {}),
        "diverged": {member.name: member.divergence() for member in comparison.members if member.divergence()},
        "failed": failed,
        "runs": runs,
    }


def write_comparison(comparison: Comparison, record: dict[str, Any], folder: Path) -> str:
    """
    Write the tables, the figures and everything in JSON into a folder.

    Args:
        record: of [`record_of`].

    Returns:
        The table.
    """
    task, runs, baseline = record["task"], record["runs"], comparison.baseline
    diverged = [member for member in comparison.members if member.name in record["diverged"]]
    summary = record["groups"] if "groups" in record else {None: record["variants"]}
    tuned = record.get("gains") or {}
    if tuned and None in summary:
        tuned = {None: tuned}
    cells, step_times = record.get("differences") or [], record.get("step_times")
    table = make_table(summary, baseline, task)
    groups = grouped(timed(runs, step_times), baseline)
    figures = draw_figures(groups, baseline, task, folder, tuned, cells)
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    counts = ", ".join(
        f"{label_of(group, variant)} {len(figures['seeds'])}"
        for group, variants in summary.items()
        for variant, figures in variants.items()
    )
    measured = "Times are those of the training steps, without evaluation: tokens (or images) divided by their speed."
    if step_times:
        threads = step_times["machine"]["threads"]
        measured = (
            f"Times are the number of steps times the time of a step, measured apart from the runs: the median of "
            f"{step_times['rounds']} rounds in which the variants took turns ({threads} {'thread' if threads == 1 else 'threads'})."
        )
    notes = [
        f"Seeds: {', '.join(map(str, seeds))} (runs: {counts}). ± after a figure is the standard deviation over the seeds. "
        f"Differences to {baseline} are between runs with the same seed, ± half the width of the {CONFIDENCE:.0%} confidence interval of "
        "their mean (Student's t).",
        f'"Steps to {baseline}\'s loss": the step at which the held-out loss first reached the final loss of {baseline} with the same '
        f"seed, interpolated between the evaluations, and in brackets its ratio to the steps that {baseline} itself took. Medians "
        f"over the seeds; a run that never reached it counts as later than all others. {measured}",
    ]
    if task == "image-classification":
        notes.append("The last batch of an epoch counts as a full one.")
    if len(seeds) == 1:
        notes.append("**One seed says nothing about the spread.**")
    datas = {}
    for member in comparison.members:
        data = member.run.named["data"] or {"dataset": member.run.data.dataset}
        named = ", ".join(f"`{name}` {value}" for name, value in data.items())
        datas.setdefault(named, []).append(member.group)
    sections = [f"# {comparison.title}", table, *notes]
    if any(cell["pooled_half_width"] is not None for cell in cells):
        sections += [
            "## How sure the differences are",
            make_differences_table(cells),
            differences_note(cells, baseline, METRICS[task][0][1]),
        ]
    sections += [f"![{text}]({file})\n\n{text}" for file, text in figures.items()]
    if tuned:
        sections += ["## Gains", make_gains_table(tuned, baseline), gains_note(baseline)]
    if "savings" in record:
        saved = {None: record["savings"]} if None in summary else record["savings"]
        sections += ["## Savings at equal loss", make_savings_table(saved), savings_note(baseline)]
    if comparison.trials:
        sections += ["## How they were tuned", make_tuning_table(comparison.trials), TUNING_NOTE]
    if diverged or all(each["spikes"] is not None for each in runs):
        sections += [
            "## Stability",
            make_stability_table(runs, diverged),
            f"A spike is a logged training loss more than {SPIKE_DEVIATIONS:g} standard deviations above the mean of the "
            f"last {SPIKE_WINDOW} steps; several within as many steps count as one. A run diverged if its loss or weights "
            f"became NaN or infinite, or if the mean loss of its last {SPIKE_WINDOW} steps is more than {DIVERGENCE:g} nats "
            "above the lowest such mean before. Runs that became NaN or infinite are not in the table above.",
        ]
    if record["failed"]:
        failed = [f"- {name}: {error}" for name, error in record["failed"].items()]
        sections += ["## Runs that failed", "\n".join(failed)]
    sections += [
        "## How it was made",
        f"```bash\n{record['command']}\n```",
        "\n".join(
            f"- Data{'' if len(datas) == 1 else ' of ' + ', '.join(dict.fromkeys(of))}: {data}."
            for data, of in datas.items()
        ),
        "\n".join(f"- Trained on: {each}" for each in describe_training(runs)),
        f"All figures, including those of each run, are in [`{RAW}`]({RAW}).",
    ]
    (folder / TABLE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    write_record(record, folder)
    return table


def write_record(record: dict[str, Any], folder: Path) -> None:
    write_whole(folder / RAW, json.dumps(record, indent=1))
