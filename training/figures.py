"""The pictures of a model card."""

from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt


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


def draw_depth_weights(weights: list[dict], file: Path) -> None:
    """
    Draw what each block's inputs draw from each earlier output: the learned `b` above, the mean gate below.

    Args:
        weights: what `measure_depth_weights` returned.
        file: where to save the picture.
    """
    inputs = list(dict.fromkeys(weight["input"] for weight in weights))
    blocks = max(weight["block"] for weight in weights)
    figure, axes = plt.subplots(
        2, len(inputs), figsize=(1.5 + 3.6 * len(inputs), 6.4), squeeze=False, layout="constrained"
    )
    for row, (key, title, center, colors) in enumerate(
        (("b", "learned b", 1.0, "RdBu_r"), ("gate", "mean gate", 0.0, "viridis"))
    ):
        grids = {name: np.full((blocks, blocks), np.nan) for name in inputs}
        for weight in weights:
            for (first, last), value in zip(weight["outputs"], weight[key]):
                grids[weight["input"]][weight["block"] - 1, first : last + 1] = value
        values = np.concatenate([grid[~np.isnan(grid)] for grid in grids.values()])
        reach = max(np.abs(values - center).max(), 1e-6)
        limits = {"vmin": center - reach if key == "b" else 0, "vmax": center + reach}
        for column, name in enumerate(inputs):
            panel = axes[row, column]
            image = panel.imshow(grids[name], cmap=colors, **limits)
            panel.set_title(f"{name}: {title}")
            panel.set_xlabel("output drawn from (0: the model's input)")
            panel.set_yticks(range(blocks), range(1, blocks + 1))
            panel.set_xticks(range(blocks))
        axes[row, 0].set_ylabel("block")
        figure.colorbar(image, ax=axes[row].tolist(), shrink=0.8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
