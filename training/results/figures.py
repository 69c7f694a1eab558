"""The pictures of a model card."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt
from matplotlib.colors import SymLogNorm


#: Colours that the colour-blind can tell apart (Okabe and Ito), the first for the baseline; with more variants than
#: colours, the lines differ.
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES, MARKERS = ["-", "--", ":", "-."], "osD^vPX"


def draw_loss_curves(histories: dict[str, list[dict]], file: Path) -> None:
    """
    Draw the losses of one or more models over the steps.

    Args:
        histories: the `log_history` of each model's trainer state, by its name.
        file: where to save the picture.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (name, history) in enumerate(histories.items()):
        for key, style, label in (
            ("loss", {"alpha": 0.35, "linewidth": 1}, "training"),
            ("eval_loss", {"marker": "o", "markersize": 3}, "held out"),
        ):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points), color=f"C{index}", label=f"{name}, {label}", **style)
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
    Draw what each block's inputs draw from each earlier output: the mean of the whole weight, `b` and gate together.

    Args:
        weights: what `measure_depth_weights` or `depth_weights` returned; those of earlier versions have no `weight`, but its
            parts.
        file: where to save the picture.
        times_size: whether the weights were multiplied by the sizes of the entries.
    """
    inputs = list(dict.fromkeys(weight["input"] for weight in weights))
    blocks = max(weight["block"] for weight in weights)
    grids = {name: np.full((blocks, blocks), np.nan) for name in inputs}
    for weight in weights:
        whole = weight["weight"] if "weight" in weight else np.add(weight["b"], weight["gate"])
        for (first, last), value in zip(weight["outputs"], whole):
            grids[weight["input"]][weight["block"] - 1, first : last + 1] = value
    values = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()])
    center = 0.0 if times_size else 1.0
    reach = max(np.abs(values - center).max(), 1e-6)
    figure, axes = plt.subplots(
        1, len(inputs), figsize=(1.5 + 3.6 * len(inputs), 3.6), squeeze=False, layout="constrained"
    )
    for panel, name in zip(axes[0], inputs):
        image = panel.imshow(grids[name], cmap="RdBu_r", vmin=center - reach, vmax=center + reach)
        panel.set_title(f"{name}: {_whole_weight(times_size)}")
        panel.set_xlabel("output drawn from (0: the model's input)")
        panel.set_yticks(range(blocks), range(1, blocks + 1))
        panel.set_xticks(range(blocks))
    axes[0, 0].set_ylabel("block")
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _whole_weight(times_size: bool) -> str:
    return "weight x size" if times_size else "weight"


def draw_depth_spreads(weights: list[dict], file: Path, times_size: bool = False) -> None:
    """
    Draw how the whole weights of the features are spread: the mean and the band of 90 %, by the entries of each block's
    stack, for each input (paper, figure 10).

    Args:
        weights: what `depth_weights` returned.
        file: where to save the picture.
        times_size: whether the weights were multiplied by the sizes of the entries.
    """
    blocks = max(weight["block"] for weight in weights)
    columns = min(4, blocks)
    rows = -(-blocks // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[blocks:]:
        axes.remove()
    inputs = list(dict.fromkeys(weight["input"] for weight in weights))
    for weight in weights:
        axes, index = panels.flat[weight["block"] - 1], inputs.index(weight["input"])
        entries = np.arange(len(weight["outputs"]))
        # Side by side, so that they do not hide each other.
        x = entries + 0.22 * (index - (len(inputs) - 1) / 2)
        color = COLORS[index + 1]
        # (Where a few features are far from the rest, their mean is outside of the band.)
        axes.vlines(x, weight["low"], weight["high"], color=color, linewidth=1.5)
        axes.plot(x, weight["weight"], MARKERS[index], color=color, markersize=4, label=weight["input"])
        labels = [f"{first}" if first == last else f"{first}-{last}" for first, last in weight["outputs"]]
        axes.set_xticks(entries, labels, fontsize=8)
    for block, axes in enumerate(panels.flat[:blocks], start=1):
        if not times_size:
            axes.axhline(1, color=COLORS[0], linestyle="--", linewidth=0.8)
        axes.set_title(f"block {block}", fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel(_whole_weight(times_size))
    figure.supxlabel("output drawn from (0: the model's input)", fontsize=10)
    panels.flat[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_without(rows: list[dict], file: Path) -> None:
    """
    Draw what the held-out loss loses without an output: in one block, in all, and in the model's output.

    Args:
        rows: what `losses_without` returned.
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
    # A block without the model's input can lose a thousand times what others do.
    norm = SymLogNorm(0.01, vmax=max(finite.max(initial=0), 0.01), vmin=-max(finite.max(initial=0), 0.01))
    size = (4 + 0.45 * len(outputs), 2 + 0.32 * len(blocks))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set_xticks(range(len(outputs)), outputs)
    axes.set_yticks(range(len(blocks)), [named.get(block, f"block {block}") for block in blocks], fontsize=8)
    axes.set_xlabel("without output (0: the model's input)")
    figure.colorbar(image, ax=axes, label="held-out loss lost (nats)")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _style(index: int) -> dict:
    return {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index // len(COLORS) % len(LINES)]}


def _over_seeds(curves: list[list[list[float]]], column: int) -> tuple[list[float], np.ndarray]:
    """The steps that all curves have, and the values there, one row for each curve."""
    by_step = [{point[0]: point[column] for point in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    return steps, np.array([[values[step] for step in steps] for values in by_step])


def _plot_band(axes, x, values: np.ndarray, label: str, index: int, **style) -> None:
    """The mean of the rows of `values`, and a band from the lowest to the highest."""
    axes.plot(x, values.mean(axis=0), label=label, **_style(index), **style)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=_style(index)["color"], alpha=0.15, linewidth=0)


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
        len(groups), 2, figsize=(11, 0.5 + 4 * len(groups)), squeeze=False, layout="constrained"
    )
    for panels, (group, runs) in zip(rows, groups.items()):
        for axes, key, title in zip(panels, ("training", "held_out"), ("training loss", "held-out loss")):
            drawn = []
            for index, (variant, of_seeds) in enumerate(runs.items()):
                steps, values = _over_seeds([run[key] for run in of_seeds], 1)
                if steps:
                    marker = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4} if key == "held_out" else {}
                    _plot_band(axes, steps, values, variant, index, linewidth=1.2, **marker)
                    drawn += list(values)
            if drawn:
                _limit(axes, drawn)
            axes.set_title(title if group is None else f"{group}: {title}")
            axes.set_xlabel("step")
            axes.set_ylabel("loss (nats)")
            axes.grid(alpha=0.3)
        panels[1].legend()
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
        rows, columns, figsize=(1 + 6 * columns, 0.5 + 4 * rows), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    longest = max(run["seconds"] for runs in groups.values() for of_seeds in runs.values() for run in of_seeds)
    unit, length = next(
        each for each in (("h", 3600), ("min", 60), ("s", 1)) if longest >= 2 * each[1] or each[1] == 1
    )
    for axes, (group, runs) in zip(panels.flat, groups.items()):
        drawn = []
        axes.set_yscale("log")  # most of the time goes into the last few per cent
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each("{x:g}")
        for index, (variant, of_seeds) in enumerate(runs.items()):
            steps, values = _over_seeds([run["held_out"] for run in of_seeds], 2)
            if steps:
                pace = np.mean([run["seconds"] / run["steps"] for run in of_seeds]) / length
                marker = MARKERS[index % len(MARKERS)]
                _plot_band(
                    axes, np.array(steps) * pace, values, variant, index, linewidth=1.5, marker=marker, markersize=4
                )
                drawn += list(values)
        if baseline in runs:
            reached = np.mean([run["held_out"][-1][2] for run in runs[baseline]])
            axes.axhline(reached, color=COLORS[0], linestyle="--", linewidth=0.8)
        if drawn:
            _limit(axes, drawn)
        axes.set_title(group)
        axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
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
    for index, (line, points) in enumerate(lines.items()):
        parameters, losses, deviations, names = zip(*sorted(points))
        marker = MARKERS[index % len(MARKERS)]
        label = line if len(points) > 1 or None not in groups else names[0]
        axes.errorbar(parameters, losses, deviations, label=label, marker=marker, capsize=3, **_style(index))
        if len(points) > 1:
            for x, y, name in zip(parameters, losses, names):
                offset, side = ((4, 5), "left") if x < middle else ((-4, 5), "right")
                axes.annotate(name, (x, y), offset, ha=side, textcoords="offset points", fontsize=7, color=COLORS[0])
    axes.margins(x=0.05)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k")
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_xlabel("parameters")
    axes.set_ylabel("final held-out loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _label(axes, points: dict[str, tuple[float, float]]) -> None:
    """Write the names of points beside them, where there is room; a name that is not at the height of its point has a line to it."""
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
    for axes, (group, variants) in zip(panels.flat, gains.items()):
        known = {name: each for name, each in variants.items() if each["at_equal_tokens"] is not None}
        points = {name: (each["step_time"], each["at_equal_tokens"]["mean"]) for name, each in known.items()}
        halves = {name: each["at_equal_tokens"]["half_width"] or 0.0 for name, each in known.items()}
        for index, (name, (x, y)) in enumerate(points.items()):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index // len(COLORS) % len(MARKERS)]
            bar = axes.errorbar(x, y, halves[name], color=color, marker=marker, capsize=3, linestyle="")
            for part in (*bar[1], *bar[2]):
                part.set_alpha(0.4)
        axes.axhline(0, color=COLORS[0], linestyle="--", linewidth=0.8)
        axes.axvline(1, color=COLORS[0], linestyle="--", linewidth=0.8)
        # Wide intervals, as two seeds have them, would make one point of all.
        low, high = min(y for _, y in points.values()), max(y for _, y in points.values())
        room = max(np.median(list(halves.values())), 0.2 * (high - low), 1e-4)
        axes.set_ylim(low - room, high + room)
        axes.margins(x=0.2)
        axes.set_title(group)
        axes.set_xlabel(f"time of a training step ({baseline} = 1), slower to the right")
        axes.set_ylabel(f"held-out loss less that of {baseline} (nats), better below")
        axes.grid(alpha=0.3)
        _label(axes, points)
    figure.savefig(file, dpi=150)
    plt.close(figure)
