"""The output of a benchmark: tables for the terminal and in Markdown, JSON, and a plot."""

import json
import math
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt

from training.support.files import output_folder
from training.support.tables import align


RESULTS, TABLES, PLOT = "results.json", "README.md", "results.png"

DIRECTIONS = ("forward", "backward")

FORMATS = {
    "seconds": lambda value: f"{1e3 * value:,.1f} ms",
    "bytes": lambda value: f"{value / 2**20:,.1f} MiB",
}


def make_output_folder(arguments) -> Path:
    """
    The folder for the results of a benchmark, from its arguments `output_dir` and `overwrite`.

    Raises:
        `UserError`: it holds results and `overwrite` is not set, or it cannot be created.
    """
    return output_folder(Path(arguments.output_dir), [RESULTS], lambda: True, arguments.overwrite)


def tables(results: dict) -> list[str]:
    """The tables of the measures, of the parameters, and of the operation alone."""
    rows = []
    for measure in results["measures"].values():
        for index, (name, model) in enumerate(measure["models"].items()):
            title = f"{measure['title']} ({measure['ratio_of']})" if index == 0 else ""
            low, high = model["spread"]
            median = FORMATS[measure["unit"]](model["median"])
            rate = f"{measure['tokens'] / model['median']:,.0f}" if measure["tokens"] else ""
            rows.append([title, name, median, rate, f"{model['ratio']:.3f}", f"{low:.3f} to {high:.3f}"])
    header = ["measure (ratio of)", "model", "median", "tokens/s", "to Llama", "spread"]
    parts = [align(header, rows)] if rows else []
    sizes = results.get("parameters")
    if sizes:
        first = next(iter(sizes.values()))
        rows = [[name, f"{size:,}", f"{size / first:.4f}"] for name, size in sizes.items()]
        parts.append(align(["model", "parameters", "to Llama"], rows))
    rows = []
    for title, stack in results["operation"].items():
        for index, name in enumerate(stack["forward"]["implementations"]):
            row = [f"{title}, {stack['entries']} entries" if index == 0 else "", name]
            for direction in DIRECTIONS:
                one = stack[direction]["implementations"][name]
                low, high = one["spread"]
                row += [f"{1e6 * one['median']:,.0f} us", f"{one['share']:.0%} ({low:.0%} to {high:.0%})"]
            rows.append(row)
    header = ["stack", "implementation", "forward", "share of copy", "backward", "share of copy"]
    return [*parts, align(header, rows)] if rows else parts


def draw(results: dict, file: Path) -> None:
    """Draw the ratios to Llama, and the shares of the copy bandwidth, with their spread."""
    panels = []  # title, label of the axis, and the bars: (name, median, spread, color)
    for measure in results["measures"].values():
        bars = [(name, one["ratio"], one["spread"], "C0") for name, one in measure["models"].items()]
        panels.append((measure["title"], f"{measure['ratio_of']}, Llama = 1", bars))
    for title, stack in results["operation"].items():
        bars = [
            (f"{name}, {direction}", one["share"], one["spread"], f"C{index + 1}")
            for index, direction in enumerate(DIRECTIONS)
            for name, one in stack[direction]["implementations"].items()
        ]
        panels.append((f"operation alone, {title}", "share of the copy bandwidth", bars))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, label, bars) in zip(grid.flat, panels):
        names, medians, spreads, colors = zip(*bars)
        reach = [[median - low, high - median] for median, (low, high) in zip(medians, spreads)]
        axes.barh(names, medians, xerr=list(zip(*reach)), color=colors, alpha=0.8)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_title(title)
        axes.set_xlabel(label)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(results: dict, folder: Path) -> str:
    """Write the results to a folder, and return the text for the terminal."""
    lines = [*results["notes"], "Medians over the rounds; the spread is from the least to the greatest of them."]
    text = "\n\n".join([*tables(results), "\n".join(f"- {line}" for line in lines)])
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value is not None)
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / TABLES).write_text(
        f"# {results['title']}\n\n`{results['command']}`\n\n{machine}\n\n{text}\n\n![Results]({PLOT})\n",
        encoding="utf-8",
    )
    draw(results, folder / PLOT)
    return text
