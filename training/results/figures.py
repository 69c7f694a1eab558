"""The figures of runs and comparisons. The title of each states the result, and a scheme has the same colour in all of them."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np


matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.ticker import MaxNLocator

from training.results.depth_weights import INPUT_NAMES


#: The colours of the residual schemes. The colour-blind can tell them apart (Okabe and Ito's, and a grey).
COLORS = {
    "standard": "#000000",
    "dca": "#D55E00",
    "2-dca": "#0072B2",
    "1-dca": "#56B4E9",
    "4-dca": "#CC79A7",
    "grn_v1": "#999999",
    "grn_v2": "#E69F00",
    "grn_v3": "#009E73",
}
#: Other names of schemes, as studies and benchmarks have them.
ALIASES = {"transformer": "standard", "llama": "standard", "vit": "standard", "full dca": "dca", "vit + dca": "dca"}
LINES, MARKERS = ["-", "--", ":", "-."], "osD^vPX"
#: From what is less than in the residual sum to what is more, by way of what is the same.
LESS_TO_MORE = LinearSegmentedColormap.from_list("less to more", [COLORS["2-dca"], "#F7F7F7", COLORS["dca"]])
#: The width of wide pictures in inches, with which their text is legible at the width of a README or of a page of the Hub.
WIDTH = 9.6


def scheme_of(name: str) -> str:
    """The residual scheme in the name of a variant, or the name itself."""
    name = name.lower().replace("grn-", "grn_")
    return ALIASES.get(name, name)


def styles_of(names: Iterable[str]) -> dict[str, dict]:
    """
    The colour, line and marker of each variant in a figure. Variants whose names are not schemes get the remaining colours;
    with more variants than colours, the lines differ.
    """
    names = list(dict.fromkeys(names))
    known = {scheme_of(name): name for name in reversed(names) if scheme_of(name) in COLORS}
    left = [color for scheme, color in COLORS.items() if scheme not in known] or list(COLORS.values())
    styles, others = {}, 0
    for index, name in enumerate(names):
        line = LINES[0]
        if known.get(scheme_of(name)) == name:
            color = COLORS[scheme_of(name)]
        else:
            color, line = left[others % len(left)], LINES[others // len(left) % len(LINES)]
            others += 1
        styles[name] = {"color": color, "linestyle": line, "marker": MARKERS[index % len(MARKERS)]}
    return styles


def draw_loss_curves(histories: dict[str, list[dict]], file: Path) -> None:
    """
    Draw the losses of one or more models over the steps.

    Args:
        histories: the `log_history` of each model's trainer state, by its name.
        file: where to save the picture.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles, ends = styles_of(histories), {}
    for name, history in histories.items():
        for key, style, label in (
            ("loss", {"alpha": 0.35, "linewidth": 1, "marker": ""}, "training"),
            ("eval_loss", {"markersize": 3}, "held out"),
        ):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points), label=f"{name}, {label}", **styles[name] | style)
                ends[name] = points[-1][1], label
    measured = {label for _, label in ends.values()}
    if len(measured) == 1:
        (label,) = measured
        told = ", ".join(f"{name} {loss:.3f}" for name, (loss, _) in sorted(ends.items(), key=lambda end: end[1]))
        axes.set_title(f"{'Training' if label == 'training' else 'Held-out'} loss at the end: {told}")
    held_out = [entry["eval_loss"] for history in histories.values() for entry in history if "eval_loss" in entry]
    losses = [entry["loss"] for history in histories.values() for entry in history if "loss" in entry]
    if held_out and losses:
        # The first steps, far above all that follow, would flatten the curves.
        low, high = min(*held_out, *losses), max(*held_out, np.quantile(losses, 0.9))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_depth_weights(weights: list[dict], file: Path, times_size: bool = False) -> None:
    """
    Draw the weights of each earlier output in the inputs of each block: the mean of `b` plus gate.

    Args:
        weights: the result of `measure_depth_weights` or `depth_weights`; that of earlier versions has no `weight`, but its
            parts.
        file: where to save the picture.
        times_size: whether the weights were multiplied by the sizes of the entries.
    """
    inputs = list(dict.fromkeys(weight["input"] for weight in weights))
    blocks = max(weight["block"] for weight in weights)
    grids = {name: np.full((blocks, blocks), np.nan) for name in inputs}
    for weight in weights:
        for (first, last), value in zip(weight["outputs"], _whole(weight)):
            grids[weight["input"]][weight["block"] - 1, first : last + 1] = value
    values = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()])
    center = 0.0 if times_size else 1.0
    reach = max(np.abs(values - center).max(), 1e-6)
    figure, axes = plt.subplots(
        1, len(inputs), figsize=(1.2 + 2.8 * len(inputs), 3.7), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, name in zip(axes[0], inputs):
        image = panel.imshow(
            grids[name],
            cmap=LESS_TO_MORE,
            vmin=center - reach,
            vmax=center + reach,
            extent=(-0.5, blocks - 0.5, blocks + 0.5, 0.5),
        )
        panel.set_facecolor("0.85")  # where there is no output yet
        panel.set_title(INPUT_NAMES[name], fontsize=11)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(12, integer=True))
    axes[0, 0].set_ylabel("block")
    figure.supxlabel("output drawn from (0: the model's input)", fontsize=10)
    figure.suptitle(_farthest(weights, times_size, len(inputs)), fontsize=11)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, label=_whole_weight(times_size))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _farthest(weights: list[dict], times_size: bool, panels: int) -> str:
    """The title of a map of weights, with the weight that stands out most."""
    cells = [
        (value, each["input"], each["block"], outputs)
        for each in weights
        for outputs, value in zip(each["outputs"], _whole(each))
    ]
    if times_size:
        title = "How much each block draws from each earlier output (weight x size)"
        value, name, block, outputs = max(cells, key=lambda cell: abs(cell[0]))
        found = f"Most: {INPUT_NAMES[name]} of block {block} draw {value:.2f} from {_output(outputs)}"
    else:
        title = "What each block draws from each earlier output (1: the residual sum)"
        value, name, block, outputs = max(cells, key=lambda cell: abs(cell[0] - 1))
        found = f"Farthest from 1: {INPUT_NAMES[name]} of block {block} draw {value:.2f} times {_output(outputs)}"
        if abs(value - 1) < 1e-6:
            found = "All weights are 1"
    separator = ". " if panels > 1 and len(title + found) < 90 else "\n"
    return title + separator + found


def _output(outputs: tuple[int, int]) -> str:
    first, last = outputs
    if first != last:
        return f"outputs {first} to {last}"
    return f"output {first}" if first else "the model's input"


def _whole(weight: dict) -> list[float]:
    """The weights of a record; records of earlier versions hold only their parts."""
    return weight["weight"] if "weight" in weight else np.add(weight["b"], weight["gate"])


#: The colours of queries, keys and values, and how many labels a small panel has room for.
OF_INPUTS, MOST_LABELS = [COLORS["dca"], COLORS["2-dca"], COLORS["grn_v3"]], 13


def _whole_weight(times_size: bool) -> str:
    return "weight x size" if times_size else "weight"


def draw_depth_spreads(weights: list[dict], file: Path, times_size: bool = False) -> None:
    """
    Draw the spread of the weights over features: the mean and the band of 90 %, by the entries of each block's stack, for each
    input (paper, figure 10).

    Args:
        weights: the result of `depth_weights`.
        file: where to save the picture.
        times_size: whether the weights were multiplied by the sizes of the entries.
    """
    blocks = max(weight["block"] for weight in weights)
    columns = min(4, blocks)
    rows = -(-blocks // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH if columns == 4 else 3 * columns, 0.9 + 2.2 * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in panels.flat[blocks:]:
        axes.remove()
    inputs = list(dict.fromkeys(weight["input"] for weight in weights))
    for weight in weights:
        axes, index = panels.flat[weight["block"] - 1], inputs.index(weight["input"])
        entries = np.arange(len(weight["outputs"]))
        # Side by side, so that they do not hide each other.
        x = entries + 0.22 * (index - (len(inputs) - 1) / 2)
        color = OF_INPUTS[index]
        # (Where a few features are far from the rest, their mean is outside of the band.)
        axes.vlines(x, weight["low"], weight["high"], color=color, linewidth=1.5)
        axes.plot(x, weight["weight"], MARKERS[index], color=color, markersize=4, label=weight["input"])
        labels = [f"{first}" if first == last else f"{first}-{last}" for first, last in weight["outputs"]]
        apart = -(-len(labels) // MOST_LABELS)
        axes.set_xticks(entries[::apart], labels[::apart], fontsize=8)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    for block, axes in enumerate(panels.flat[:blocks], start=1):
        if not times_size:
            axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
        axes.set_title(f"block {block}", fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel(_whole_weight(times_size))
    figure.supxlabel("output drawn from (0: the model's input)", fontsize=10)
    handles, _ = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, [INPUT_NAMES[name] for name in inputs], loc="outside lower right", ncols=3, fontsize=9)
    figure.suptitle(
        "How the features of a block draw from each earlier output: mean, and the band of 90 %"
        + ("" if times_size else " (dashed: the residual sum)"),
        fontsize=11,
    )
    figure.savefig(file, dpi=min(130, 3000 / figure.get_figheight()))
    plt.close(figure)


def draw_without(rows: list[dict], file: Path) -> None:
    """
    Draw the rise of the held-out loss without an output: in one block, in all, and in the model's output.

    Args:
        rows: the rows of `losses_without`.
        file: where to save the picture.
    """
    outputs = sorted({row["without"] for row in rows})
    named = {"all": "all blocks", "output": "the model's output"}
    numbers = {row["block"] for row in rows} - named.keys()
    blocks = [*sorted(numbers), *(name for name in named if name in {row["block"] for row in rows})]
    grid = np.full((len(blocks), len(outputs)), np.nan)
    for row in rows:
        grid[blocks.index(row["block"]), outputs.index(row["without"])] = row["lost"]
    finite = np.abs(grid[np.isfinite(grid)])
    # Without the model's input, the rise can be a thousand times that of others.
    norm = SymLogNorm(0.01, vmax=max(finite.max(initial=0), 0.01), vmin=-max(finite.max(initial=0), 0.01))
    size = (min(4.5 + 0.45 * len(outputs), 14), min(2.2 + 0.32 * len(blocks), 14))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, cmap=LESS_TO_MORE, norm=norm, aspect="auto")
    axes.set_facecolor("0.85")  # where there is no such output
    # (That the model's input is missed goes without saying.)
    told = [row for row in rows if np.isfinite(row["lost"]) and (row["without"] != 0 or outputs == [0])]
    most = max(told, key=lambda row: row["lost"], default={"lost": 0})
    if most["lost"] > 0:
        block = named.get(most["block"], f"block {most['block']}")
        what = _output((most["without"], most["without"]))
        beside = "" if outputs == [0] or 0 not in outputs else ", beside the model's input"
        axes.set_title(f"Most is lost{beside} without {what}\nin {block}: {most['lost']:.3g} nats", fontsize=11)
    else:
        axes.set_title("Nothing is lost without an output", fontsize=11)
    axes.set_xticks(range(len(outputs)), outputs)
    axes.set_yticks(range(len(blocks)), [named.get(block, f"block {block}") for block in blocks], fontsize=8)
    axes.set_xlabel("without output (0: the model's input)")
    figure.colorbar(image, ax=axes, label="rise of the held-out loss (nats)")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _over_seeds(curves: list[list[list[float]]], column: int) -> tuple[list[float], np.ndarray]:
    """The steps that all curves have, and the values there, one row for each curve."""
    by_step = [{point[0]: point[column] for point in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    return steps, np.array([[values[step] for step in steps] for values in by_step])


def _plot_band(axes, x, values: np.ndarray, label: str, style: dict) -> None:
    """The mean of the rows of `values`, and a band from the lowest to the highest. The label includes the last mean."""
    means = values.mean(axis=0)
    axes.plot(x, means, label=f"{label}: {means[-1]:.4g}", **style)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _variants(groups: dict[str | None, dict]) -> dict[str, dict]:
    """The style of each variant, the same in all groups."""
    return styles_of(variant for runs in groups.values() for variant in runs)


def _limit(axes, values: list[np.ndarray]) -> None:
    """Leave out the first values of the curves, far above all that follow: they would flatten them."""
    scale = axes.yaxis.get_transform()
    finite = [scale.transform(each[np.isfinite(each)]) for each in values if np.isfinite(each).any()]
    if not finite:
        return
    low, high = min(each.min() for each in finite), max(np.quantile(each, 0.9) for each in finite)
    high = max(high, *(each[-1] for each in finite))
    if high > low:
        axes.set_ylim(scale.inverted().transform([low - 0.05 * (high - low), high + 0.05 * (high - low)]))


def draw_compared_curves(groups: dict[str | None, dict[str, list[dict]]], file: Path) -> None:
    """
    Draw training and held-out losses over the steps, with a band over the seeds (paper, figure 9), a row for each group.

    Args:
        groups: by group and variant, what `training.compare` read of each run: `training` and `held_out` are points of step
            and loss.
        file: where to save the picture.
    """
    figure, rows = plt.subplots(
        len(groups), 2, figsize=(WIDTH, 0.5 + 3.8 * len(groups)), squeeze=False, layout="constrained"
    )
    styles = _variants(groups)
    for panels, (group, runs) in zip(rows, groups.items()):
        for axes, key, title in zip(panels, ("training", "held_out"), ("training loss", "held-out loss")):
            drawn, ends = [], {}
            for variant, of_seeds in runs.items():
                steps, values = _over_seeds([run[key] for run in of_seeds], 1)
                if steps:
                    points = {"markersize": 4} if key == "held_out" else {"marker": ""}
                    _plot_band(axes, steps, values, variant, styles[variant] | {"linewidth": 1.2} | points)
                    drawn += list(values)
                    ends[variant] = values[:, -1].mean()
            if key == "held_out" and len(ends) > 1 and np.isfinite(list(ends.values())).all():
                title += f", lowest at the end: {min(ends, key=ends.get)}"
            if drawn:
                _limit(axes, drawn)
            axes.set_title(title if group is None else f"{group}: {title}")
            axes.set_xlabel("step")
            axes.set_ylabel("loss (nats)")
            axes.grid(alpha=0.3)
        panels[1].legend(title="mean of the seeds at the end", title_fontsize=9)
    figure.savefig(file, dpi=150 if len(groups) == 1 else 100)
    plt.close(figure)


def draw_loss_over_time(
    groups: dict[str | None, dict[str, list[dict]]], label: str, baseline: str, file: Path
) -> None:
    """
    Draw held-out figures over the training time (paper, figure 7), a panel for each group.

    Args:
        groups: by group and variant, what `training.compare` read of each run: points of step, loss and what is drawn in
            `held_out`, and the `seconds` that all its `steps` took.
        label: what is drawn.
        baseline: the variant where whose runs ended, in the mean, a dashed line is drawn.
        file: where to save the picture.
    """
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(WIDTH if columns == 2 else 7, 0.7 + 3.8 * rows), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    longest = max(run["seconds"] for runs in groups.values() for of_seeds in runs.values() for run in of_seeds)
    unit, length = next(
        each for each in (("h", 3600), ("min", 60), ("s", 1)) if longest >= 2 * each[1] or each[1] == 1
    )
    styles = _variants(groups)
    for axes, (group, runs) in zip(panels.flat, groups.items()):
        drawn = []
        axes.set_yscale("log")  # most of the time goes into the last few per cent
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each("{x:g}")
        for variant, of_seeds in runs.items():
            steps, values = _over_seeds([run["held_out"] for run in of_seeds], 2)
            if steps:
                pace = np.mean([run["seconds"] / run["steps"] for run in of_seeds]) / length
                style = styles[variant] | {"linewidth": 1.5, "markersize": 4}
                _plot_band(axes, np.array(steps) * pace, values, variant, style)
                drawn += list(values)
        if baseline in runs:
            reached = np.mean([run["held_out"][-1][2] for run in runs[baseline]])
            axes.axhline(reached, color=styles[baseline]["color"], linestyle="--", linewidth=0.8)
        if drawn:
            _limit(axes, drawn)
        axes.set_title(group)
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(title="mean of the seeds at the end", title_fontsize=9)
    figure.suptitle(f"{label[0].upper()}{label[1:]} by training time; dashed: where {baseline} ends", fontsize=11)
    figure.savefig(file, dpi=150 if len(groups) == 1 else 100)
    plt.close(figure)


def draw_loss_over_parameters(groups: dict[str | None, dict[str, list[dict]]], file: Path) -> None:
    """
    Draw final held-out losses over the number of parameters, mean and standard deviation over the seeds (paper, figure 6):
    a line for each variant through the groups, or where there are none one through the variants of one residual scheme.

    Args:
        groups: by group and variant, what `training.compare` read of each run: `scheme`, `parameters` and `eval_loss`.
        file: where to save the picture.
    """
    lines = {}
    for group, runs in groups.items():
        for variant, of_seeds in runs.items():
            losses = [run["eval_loss"] for run in of_seeds]
            deviation = np.std(losses, ddof=1) if len(losses) > 1 else 0.0
            line, name = (of_seeds[0]["scheme"], variant) if group is None else (variant, group)
            lines.setdefault(line, []).append((of_seeds[0]["parameters"], np.mean(losses), deviation, name))
    sizes = [size for points in lines.values() for size, *_ in points]
    middle = (min(sizes) + max(sizes)) / 2  # on the other side of it names stand left of their points
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = styles_of(lines)
    for line, points in lines.items():
        parameters, losses, deviations, names = zip(*sorted(points))
        label = line if len(points) > 1 or None not in groups else names[0]
        axes.errorbar(parameters, losses, deviations, label=label, capsize=3, **styles[line])
        if len(points) > 1:
            for x, y, name in zip(parameters, losses, names):
                offset, side = ((4, 5), "left") if x < middle else ((-4, 5), "right")
                axes.annotate(name, (x, y), offset, ha=side, textcoords="offset points", fontsize=8, color="black")
    axes.margins(x=0.05)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_xlabel("parameters")
    axes.set_ylabel("final held-out loss (nats)")
    axes.set_title("Held-out loss at the end, by size: mean and standard deviation of the seeds", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _label(axes, points: dict[str, tuple[float, float]]) -> None:
    """Write the names of points beside them, where there is room, with a line to a point at another height."""
    axes.figure.draw_without_rendering()  # so that all has its place
    places = {name: axes.transData.transform(point) * 72 / axes.figure.dpi for name, point in points.items()}
    low, _, high, _ = axes.bbox.extents * 72 / axes.figure.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    heights = sorted(range(-150, 151, 5), key=abs)
    for name, (x, y) in sorted(places.items(), key=lambda each: each[1][1]):
        width = 4.4 * len(name)
        for rise, start in itertools.product(heights, (x + 7, x - 7 - width)):
            box = (start, y + rise - 5, start + width, y + rise + 5)
            free = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
            if free and low < start and start + width < high:
                break
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": "gray"} if rise else None
        offset = {"xytext": (start - x, rise), "textcoords": "offset points", "va": "center", "arrowprops": line}
        axes.annotate(name, points[name], fontsize=8, **offset)


def draw_loss_over_step_time(gains: dict[str | None, dict[str, dict]], baseline: str, file: Path) -> None:
    """
    Draw final held-out losses, as differences to the baseline's of the same seed with the confidence interval of their mean, over the
    time of a training step, a panel for each group: what is better at equal tokens lies low, and what is fast on the left.

    Args:
        gains: by group and variant, `step_time` (the baseline's is 1) and `at_equal_tokens` (`mean` and `half_width`).
        baseline: the variant where dashed lines cross.
        file: where to save the picture.
    """
    figure, panels = plt.subplots(
        len(gains), 1, figsize=(9, 0.5 + 5.5 * len(gains)), squeeze=False, layout="constrained"
    )
    styles = styles_of([baseline, *(name for variants in gains.values() for name in variants)])
    for axes, (group, variants) in zip(panels.flat, gains.items()):
        known = {name: each for name, each in variants.items() if each["at_equal_tokens"] is not None}
        points = {name: (each["step_time"], each["at_equal_tokens"]["mean"]) for name, each in known.items()}
        halves = {name: each["at_equal_tokens"]["half_width"] or 0.0 for name, each in known.items()}
        for name, (x, y) in points.items():
            style = styles[name] | {"linestyle": ""}
            bar = axes.errorbar(x, y, halves[name], capsize=3, **style)
            for part in (*bar[1], *bar[2]):
                part.set_alpha(0.4)
        axes.axhline(0, color=COLORS["standard"], linestyle="--", linewidth=0.8)
        axes.axvline(1, color=COLORS["standard"], linestyle="--", linewidth=0.8)
        # Wide intervals, as two seeds have them, would make one point of all.
        low, high = min(y for _, y in points.values()), max(y for _, y in points.values())
        room = max(np.median(list(halves.values())), 0.2 * (high - low), 1e-4)
        axes.set_ylim(low - room, high + room)
        axes.margins(x=0.2)
        best = min(points, key=lambda name: points[name][1])
        seen = f"{best} ends lowest, in {points[best][0]:.2f} times the time of a step"
        axes.set_title(seen if group is None else f"{group}: {seen}")
        axes.set_xlabel(f"time of a training step ({baseline} = 1), slower to the right")
        axes.set_ylabel(f"held-out loss less that of {baseline} (nats), better below")
        axes.grid(alpha=0.3)
        _label(axes, points)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_differences(studies: dict[str, list[tuple[str, dict[str, Any]]]], label: str, file: Path) -> None:
    """
    Draw differences to a baseline with their intervals, a row each (a forest plot): what lies on the left of the dashed line is better
    than the baseline, and what does not touch the line is told from chance by its interval.

    Args:
        studies: by the title of each study, the rows: a name, and `variant`, `mean`, `half_width` and `pooled_half_width`
            (either may be `None`), and `seeds`.
        label: what is drawn.
        file: where to save the picture.
    """
    rows = [(title, *row) for title, of_study in studies.items() for row in of_study]
    lines = sum(map(len, studies.values())) + sum(bool(title) and bool(studies[title]) for title in studies)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * lines), layout="constrained")
    height, names, last = 0, [], ""
    better = sum(cell["mean"] < 0 for _, _, cell in rows)
    styles = styles_of(["standard", *(cell["variant"] for _, _, cell in rows)])  # the baseline keeps its colour
    for title, name, cell in rows:
        if title != last:
            names.append((height, title, "bold"))
            height, last = height + 1, title
        style = styles[cell["variant"]]
        for half, width in ((cell["half_width"], 1), (cell["pooled_half_width"], 4)):
            if half is not None:
                axes.errorbar(cell["mean"], height, xerr=half, color=style["color"], elinewidth=width, alpha=0.6)
        axes.plot(cell["mean"], height, color=style["color"], marker=style["marker"], linestyle="", zorder=3)
        names.append((height, f"{name} ({cell['seeds']} {'seed' if cell['seeds'] == 1 else 'seeds'})", "normal"))
        height += 1
    axes.axvline(0, color=COLORS["standard"], linestyle="--", linewidth=0.8)
    # Two or three seeds alone have intervals that would make one point of all else.
    ends = [cell["mean"] + sign * (cell["pooled_half_width"] or 0) for _, _, cell in rows for sign in (-1, 1)]
    low, high = min(*ends, 0), max(*ends, 0)
    axes.set_xlim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_yticks([at for at, _, _ in names], [name for _, name, _ in names])
    for tick, (_, _, weight) in zip(axes.get_yticklabels(), names):
        tick.set_fontweight(weight)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{label}; better on the left")
    axes.set_title(f"{better} of {len(rows)} differences are below zero", fontsize=11)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=150)
    plt.close(figure)
