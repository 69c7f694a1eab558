"""
The paper's low-rank study (figures 1 and 5, theorems 4.1 to 4.3), on linear networks whose residuals are the library's own:

    python -m training.low_rank
    python -m training.low_rank --seeds 0 1 2 3 4 --output_dir FOLDER

It trains the networks of figure 1, compares the bounds of theorem 4.2 with what gradient descent reaches, and leaves a
page with tables and both figures, and all numbers in JSON.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from training.results.figures import COLORS, LINES, MARKERS, plt
from training.results.record import RUNS_FOLDER
from training.studies.linear_networks import (
    BASE,
    BATCH,
    CLIP,
    CURVES,
    DESCENT_STEPS,
    EXACT,
    HELD_OUT,
    LAYERS,
    RANK,
    RATE,
    SCALE,
    SCHEMES,
    SHORT,
    STARTED,
    STEPS,
    TASKS,
    WIDTH,
    extra_parameters,
    number,
    orders_below,
    show,
    study_bounds,
    study_gains,
    study_start,
    study_training,
)
from training.support.errors import UserError
from training.support.files import output_folder, read_json
from training.support.machine import describe_machine
from training.support.tables import align


PAGE, RAW, TRAINING_FIGURE, GAIN_FIGURE = "README.md", "results.json", "figure_1.png", "figure_5.png"
DEFAULT_OUTPUT = f"{RUNS_FOLDER}/low_rank"
TITLE = "Low-rank linear networks (paper, figures 1 and 5)"


def spread(values: list[float | None]) -> str:
    """Geometric mean, smallest and largest: losses of one network are orders of magnitude apart."""
    left = [value for value in values if value is not None]
    lost = f"{len(values) - len(left)} of {len(values)} diverged" if len(left) < len(values) else ""
    if not left:
        return lost
    text = f"{math.exp(np.mean(np.log(left))):.1e} ({min(left):.1e} to {max(left):.1e})"
    return f"{text}, {lost}" if lost else text


def losses_of(results: dict, task: str, scheme: str, key: str = "loss") -> list[float]:
    return [run[key] for run in results["training"] if run["task"] == task and run["scheme"] == scheme]


def training_table(results: dict) -> str:
    rows = []
    for task, title in TASKS.items():
        baseline = losses_of(results, task, "standard")
        for scheme, name in SCHEMES.items():
            losses = losses_of(results, task, scheme)
            orders = [orders_below(*pair) for pair in zip(losses, baseline)]
            optima = losses_of(results, task, scheme, "optimum")
            rows.append(
                [
                    title if scheme == "standard" else "",
                    name,
                    spread(losses),
                    "" if scheme == "standard" or None in losses else f"{min(orders):.1f} to {max(orders):.1f}",
                    "0" if task == "identity" else "" if optima[0] is None else f"{sum(optima) / len(optima):.1f}",
                ]
            )
    return align(["task", "network", "final loss", "orders of magnitude below residual", "smallest possible"], rows)


def best_of_rates(results: dict) -> dict[float, dict[str, float | None]]:
    """By scale of the initial layers, the losses of each network at the learning rate that is best for it."""
    return {
        scale: {
            scheme: min((row[scheme] for row in results["start"] if row["scale"] == scale), key=number)
            for scheme in STARTED
        }
        for scale in dict.fromkeys(row["scale"] for row in results["start"])
    }


def start_table(results: dict) -> str:
    lines = [(row["scale"], f"{row['rate']:g}", row) for row in results["start"]]
    lines += [(scale, "best for each", losses) for scale, losses in best_of_rates(results).items()]
    rows = []
    for scale, rate, losses in lines:
        orders = orders_below(losses["grn_v1"], losses["standard"])
        rows.append([f"{scale:g}", rate, *(show(losses[scheme]) for scheme in STARTED), f"{orders:.1f}"])
    header = ["scale", "learning rate", *(SCHEMES[scheme] for scheme in STARTED)]
    return align([*header, "GRN-v1 below residual, orders of magnitude"], rows)


def violations(results: dict) -> list[str]:
    """
    Where the numbers contradict theorem 4.2: gradient descent ends below an optimum, or above a bound by more than it may
    fall short of an optimum, or the optimum of GRN-v1 is above its bound.
    """
    found = []
    for point in results["bounds"]:
        for low, high, tolerance in (
            ("resnet", "standard_reached", EXACT),
            ("grn_v1_optimum", "grn_v1_reached", EXACT),
            ("grn_v1_optimum", "grn_v1_bound", EXACT),
            ("standard_reached", "resnet", SHORT),
            ("grn_v1_reached", "grn_v1_bound", SHORT),
            ("grn_v2_reached", "grn_v2_bound", SHORT),
        ):
            excess = max(one - other for one, other in zip(point[low], point[high]))
            if excess > tolerance:
                where = ", ".join(f"{name} {point[name]}" for name in ("kind", "width", "kappa", "rank"))
                found.append(f"`{low}` exceeds `{high}` by {excess:.2g} ({where})")
    return found


def bounds_table(results: dict) -> str:
    rows = []
    for point in results["bounds"]:
        mean = {name: sum(values) / len(values) for name, values in point.items() if isinstance(values, list)}
        rows.append(
            [
                point["kind"],
                *(f"{point[name]:g}" for name in ("rank", "width")),
                f"{point['kappa']:g}" if point["kind"] in ("positive", "diagonal") else "",
                *(f"{mean[name]:.4f}" for name in ("resnet", "standard_reached")),
                *(f"{mean[name]:.4f}" for name in ("grn_v1_bound", "grn_v1_optimum", "grn_v1_reached")),
                *(f"{mean[name]:.4f}" for name in ("grn_v2_bound", "grn_v2_reached")),
            ]
        )
    header = ["A - I", "r*", "d", "kappa", "ResNet, exact", "reached", "GRN-v1, bound", "exact", "reached"]
    return align([*header, "GRN-v2, bound", "reached"], rows)


def draw_training(results: dict, file: Path) -> None:
    """Draw the loss of the networks over the steps, geometric means with a band over the seeds (figure 1)."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (task, title) in zip(panels, TASKS.items()):
        for index, (scheme, name) in enumerate(SCHEMES.items()):
            curves = np.array(losses_of(results, task, scheme, "curve"), dtype=float)  # not a number where diverged
            steps = 10 * np.arange(curves.shape[1])
            axes.plot(
                steps,
                np.exp(np.log(curves).mean(axis=0)),
                label=name if np.isfinite(curves).all() else f"{name} (diverges)",
                color=COLORS[scheme],
                linestyle=LINES[index % len(LINES)],
            )
            axes.fill_between(
                steps, curves.min(axis=0), curves.max(axis=0), color=COLORS[scheme], alpha=0.15, linewidth=0
            )
        optima = losses_of(results, task, "standard", "optimum")
        if optima[0] is not None:
            axes.axhline(
                np.mean(optima), color="0.5", linewidth=1, linestyle=":", label="optimum of the residual network"
            )
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel("squared error per feature")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_gains(results: dict, file: Path) -> None:
    """Draw the gains over the residual network with as many parameters: bounds as lines, what was reached as marks (figure 5)."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    for axes, (varied, (_, label)) in zip(panels, CURVES.items()):
        marked = [
            point
            for point in results["bounds"]
            if point["kind"] == "positive" and all(point[name] == BASE[name] for name in BASE if name != varied)
        ]
        for index, scheme in enumerate(("grn_v1", "grn_v2"), start=1):
            values = [point["value"] for point in results["gains"][varied]]
            gains = np.array([point[scheme] for point in results["gains"][varied]])
            style = {"color": COLORS[scheme], "linestyle": LINES[(index - 1) % len(LINES)]}
            axes.plot(values, gains.mean(axis=1), label=f"{SCHEMES[scheme]}, bound", **style)
            axes.fill_between(
                values, gains.min(axis=1), gains.max(axis=1), color=COLORS[scheme], alpha=0.15, linewidth=0
            )
            axes.plot(
                [point[varied] for point in marked],
                [np.mean(point[f"{scheme}_gain"]) for point in marked],
                MARKERS[index],
                color=COLORS[scheme],
                label=f"{SCHEMES[scheme]}, reached",
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gain over ResNet of equal parameters\n(share of the target's squared norm)")
    panels[0].legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def verdicts(results: dict) -> list[str]:
    """What agrees with the paper and what does not, from the numbers."""
    losses = {scheme: losses_of(results, "identity", scheme) for scheme in SCHEMES}
    orders = [orders_below(*pair) for pair in zip(losses["grn_v1"], losses["standard"])]
    agrees = "Agrees" if min(orders) >= 6 else "Does not agree"
    clear = sum(orders_below(row["grn_v1"], row["standard"]) >= 6 for row in results["start"])
    lines = [
        f"**{agrees}: figure 1 (a).** At one learning rate for both, GRN-v1 ends {min(orders):.1f} to {max(orders):.1f} orders of "
        "magnitude below the residual network, from a start that we chose, as the paper does not state its own; in the "
        f"second table below the lead is six orders or more in {clear} of {len(results['start'])} settings."
    ]
    text = ", ".join(
        f"{orders_below(best['grn_v1'], best['standard']):+.1f} orders of magnitude at scale {scale:g}"
        for scale, best in best_of_rates(results).items()
    )
    lines.append(
        "**But that is about how fast, not about what can be reached.** The identity is `I + M` with `M = 0`, so a residual "
        "network can be it exactly. It has to shrink 6,000 weights for that, where GRN-v1 need only turn 10 scalars to zero; how much "
        "that costs depends on how large the layers are at the start, and on the learning rate, which the paper does not "
        f"state. With the learning rate that is best for each, GRN-v1's lead is {text} (minus: the residual network leads)."
    )
    least = max(map(number, losses["grn_v1"]))
    below = [scheme for scheme in ("grn_v2", "grn_v3") if max(map(number, losses[scheme])) <= least]
    heads = {0: "Not as in figure 1 (a): GRN-v2 and GRN-v3", 1: "In part as in figure 1 (a): GRN-v2 and GRN-v3"}
    lines.append(
        f"**{heads.get(len(below), 'As in figure 1 (a): GRN-v2 and GRN-v3')}.** They contain GRN-v1, and the paper has them level with it "
        f"or below. From this start GRN-v2 ends at {spread(losses['grn_v2'])}, GRN-v3 at {spread(losses['grn_v3'])}. The error is a mean "
        f"over features, so that each of GRN-v2's {WIDTH} weights of an entry gets a hundredth of the gradient of GRN-v1's one. "
        "GRN-v3, at its best learning rate: "
        + ", ".join(f"{show(each['grn_v3'])} at scale {scale:g}" for scale, each in best_of_rates(results).items())
        + "."
    )
    means = {scheme: np.mean([*map(number, losses_of(results, "random", scheme))]) for scheme in SCHEMES}
    optima = {scheme: np.mean(losses_of(results, "random", scheme, "optimum")) for scheme in ("standard", "grn_v1")}
    order = " < ".join(SCHEMES[scheme] for scheme in sorted(means, key=means.get))
    lines.append(
        f"**Figure 1 (b).** Final losses: {order}. For a random `A` of this size theorem 4.2 has next to nothing to offer: the "
        f"smallest possible loss is {optima['standard']:.2f} for the residual network and {optima['grn_v1']:.2f} for GRN-v1, so "
        "differences larger than that are about training, too, and not about what the networks can express."
    )
    contradictions = violations(results)
    loosest = max(
        results["bounds"], key=lambda point: np.mean(point["grn_v1_bound"]) - np.mean(point["grn_v1_optimum"])
    )
    lines.append(
        "**Does not agree: theorem 4.2.** " + "; ".join(contradictions) + "."
        if contradictions
        else "**Agrees: theorem 4.2.** For every target, gradient descent ends at ResNet's optimum, and at or below the bounds of "
        f"GRN-v1 and GRN-v2 (it may miss an optimum by up to {SHORT:g} of `||A - I||_F^2`). GRN-v1's optimum, searched exactly, is "
        "never above its bound, also where `A - I` is not symmetric. With evenly spaced positive eigenvalues the bound is the "
        "optimum; with a trace of Delta near zero it promises next to nothing, and may be far from tight: for the "
        f"*{loosest['kind']}* target it is {np.mean(loosest['grn_v1_bound']):.4f}, and the optimum {np.mean(loosest['grn_v1_optimum']):.4f}. "
        "GRN-v2's bound is no better than GRN-v1's where the eigenvectors are random and the eigenvalues positive: the "
        "advantage of a weight for each feature is in targets with a diagonal of their own (*diagonal*)."
    )
    ends = {varied: (points[0], points[-1]) for varied, points in results["gains"].items()}

    def direction(scheme: str) -> str:
        changes = {varied: np.mean(last[scheme]) - np.mean(first[scheme]) for varied, (first, last) in ends.items()}
        said = ["falls" if changes["rank"] < 0 else "grows"]
        said += ["grows" if changes[varied] > 0 else "falls" for varied in ("width", "kappa")]
        return f"{SCHEMES[scheme]}'s {said[0]} with r*, {said[1]} with d and {said[2]} with kappa, from one end to the other"

    lowest = min(
        (np.mean(point["grn_v2"]), varied, point["value"])
        for varied, points in results["gains"].items()
        for point in points
    )
    lines.append(
        f"**Figure 5.** The gain at equal parameters: {direction('grn_v1')}; {direction('grn_v2')}. The parameters of GRN-v2 "
        f"are worth {extra_parameters('grn_v2', WIDTH) / (2 * WIDTH):g} ranks of a residual network of {LAYERS} layers whatever "
        f"the width, and its lowest gain is {lowest[0]:.3f} (at {lowest[1]} {lowest[2]:g})."
    )
    return lines


def write_page(results: dict, folder: Path) -> str:
    """Write the page, the figures and all numbers, and return the tables."""
    draw_training(results, folder / TRAINING_FIGURE)
    draw_gains(results, folder / GAIN_FIGURE)
    tables = [training_table(results), start_table(results), bounds_table(results)]
    versions = ", ".join(f"{name} {results['machine'][name]}" for name in ("Python", "torch", "transformers"))
    seeds = ", ".join(map(str, results["seeds"]))
    sections = [
        f"# {TITLE}",
        "## What agrees with the paper and what does not",
        "\n".join(f"- {line}" for line in verdicts(results)),
        "## Figure 1: what training reaches",
        tables[0],
        f"Geometric mean, smallest and largest over the seeds {seeds}, of the squared error per feature on {HELD_OUT:,} fresh "
        f"inputs. {LAYERS} linear layers of rank {RANK}, d = {WIDTH}, batches of {BATCH} i.i.d. normal inputs, {STEPS} steps of SGD "
        "without momentum, in float64. The generalized residuals, of each layer's input and of the output, are the modules of the models of "
        "this library. The paper does not say how the layers start, or at which learning rate. Here both factors of a layer are "
        f"i.i.d. normal with standard deviation {SCALE:g}, each layer has a bias (for `c`) that starts at zero, and the learning rate, "
        f"{RATE:g} for all networks, falls linearly to zero. The start is so far away that the norm of the gradient is clipped, to "
        f"{CLIP:g}. *Smallest possible* is the exact optimum of theorem 4.2 (of GRN-v1: searched), for the `A` of each seed, mean.",
        f"![Loss over the steps]({TRAINING_FIGURE})",
        "How much hangs on the scale of the initial layers and on the learning rate (task (a), one seed):",
        tables[1],
        "## Theorem 4.2: bounds, optima, and what gradient descent reaches",
        tables[2],
        f"Excess risk as a share of `||A - I||_F^2`, means over the seeds {seeds}. *Reached* is {DESCENT_STEPS:,} steps of Adam on the "
        "exact risk of `I + M`, `a I + M` and `D + M`, `M` a product of two factors. ResNet's exact risk is Eckart and Young's; "
        "GRN-v1's is theirs for the best `a`. Targets: *positive* has evenly spaced eigenvalues from kappa to 1 and random "
        "eigenvectors, *diagonal* the same along the axes, *indefinite* from -1 to 1; *normal* has i.i.d. entries and *rotation* "
        "is orthogonal.",
        "## Figure 5: the gain at equal parameters",
        f"![Gain over ResNet]({GAIN_FIGURE})",
        "How much smaller the risk is than that of a residual network that spends the same number of parameters on a larger "
        f"collective rank, for {LAYERS} layers and *positive* targets; where not varied, r* = {BASE['rank']}, d = {BASE['width']}, kappa = "
        f"{BASE['kappa']}. Parameters are counted as in the paper: `2 d r*`, and `T (T - 1) / 2` scalars (GRN-v1) or vectors (GRN-v2) "
        "more. Between whole ranks ResNet's risk is read off a straight line.",
        "## How it was made",
        f"```bash\n{results['command']}\n```",
        f"With {versions}, on {results['machine']['CPU']}. All numbers are in [`{RAW}`]({RAW}).",
    ]
    (folder / PAGE).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (folder / RAW).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join(tables)


def study(seeds: list[int], folder: Path, line: str) -> None:
    """
    Make the study and write it into a folder.

    Args:
        line: the command that asks for it.

    Raises:
        [`UserError`]: the seeds cannot be, or something that is not of this study would be overwritten.
    """
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"`seeds` is {seeds}; it must be different integers from 0.")
    written = (PAGE, RAW, TRAINING_FIGURE, GAIN_FIGURE)
    output_folder(folder, written, lambda: read_json(folder / RAW)["title"] == TITLE)
    results = {
        "title": TITLE,
        "command": line,
        "seeds": seeds,
        "machine": describe_machine(torch.device("cpu")),
        "training": study_training(seeds),
        "start": study_start(seeds[0]),
        "bounds": study_bounds(seeds),
        "gains": study_gains(seeds),
    }
    print(f"\n{write_page(results, folder)}\n")
    print(f"The study is in {folder}: {PAGE}, {RAW} and figures.")
