"""An interactive page of how much each block draws for each token of a text, or patch of an image, in one HTML file."""

import math
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch

from modeling_dca import DCABaseConfig
from training.results.depth_weights import BAND, INPUT_NAMES, INPUTS
from training.support.errors import UserError
from training.support.files import write_whole


TEMPLATE = Path(__file__).parents[2] / "model_cards" / "page.html.jinja"
#: A mark of the pages of this module: other files are not replaced.
MARK = '<meta name="generator" content="training.depth_weights">'
#: The most gates that a page holds; as text they are up to 18 MB.
MOST_GATES = 3_000_000
#: The share of the weights within the range of the colours; those beyond have the last colour.
SHADED = 0.99

HOW_TO_READ = (
    "draws[i] is block i + 1. Its entry e is the sum of the outputs from outputs[e][0] to outputs[e][1]; output 0 is the "
    "model's input. The weight of entry e for input n (inputs[n]) of token t, as the mean over features, is "
    "b[n][e] + gate_step * gate[n][e][t]. Gates are rounded to whole steps. Of the features, 90 % have a weight between "
    "low[n][e] and high[n][e], both plus the same gate. sizes holds the root mean square of each entry, by token."
)


class Example(NamedTuple):
    """A text or an image, as a model takes it and as a page shows it."""

    inputs: dict[str, torch.Tensor]  # the inputs of the model, a batch of one
    unit: str  # "token" or "patch"
    tokens: list[str]  # the label of each token
    grid: tuple[int, int] | None = None  # rows and columns of the patches, which are the last tokens
    picture: str | None = None  # a data URI of the image that the patches are from


def check_page(file: Path) -> None:
    """
    Check that a page can be written to a file.

    Raises:
        [`UserError`]: bokeh is missing, or the file is not an HTML file, or exists and is not a page of this module.
    """
    named = f"`page` is {str(file)!r}"
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{named}, which browsers do not open as a page: choose a name that ends in .html.")
    try:
        if file.exists() and MARK.encode() not in file.read_bytes()[:4096]:
            raise UserError(f"{named}, which exists and this command did not write: choose another file.")
    except OSError as error:
        raise UserError(f"{named}, which cannot be written: {error.strerror}.") from error
    try:
        import bokeh  # noqa: F401
    except ImportError as error:
        raise UserError("`page` needs bokeh: install it with `pip install bokeh`.") from error


def check_size(residuals: list, example: Example, checkpoint: str) -> None:
    """
    Raises:
        [`UserError`]: a page with this number of tokens would be too large to open.
    """
    most = MOST_GATES // sum(len(residual.delta) * residual.delta.shape[1] for residual in residuals)
    if len(example.tokens) > most:
        given = "text" if example.unit == "token" else "image"
        raise UserError(
            f"`{given}` has {len(example.tokens):,} tokens, but a page of {checkpoint!r} holds at most {most:,}: give a smaller "
            f"{given}."
        )


def _rounded(values: torch.Tensor, digits: int) -> list:
    """Numbers, or lists of them, with `digits` significant digits."""
    if values.ndim:
        return [_rounded(each, digits) for each in values]
    return float(f"{values.item():.{digits}g}")


def gate_step(largest: float) -> float:
    """The step that gates are rounded to: a power of ten, at most a ten-thousandth of the largest gate."""
    return float(f"1e{math.floor(math.log10(largest)) - 4}") if largest > 0 else 1.0


def page_data(name: str, config: DCABaseConfig, example: Example, draws: list[dict]) -> dict:
    """
    The data of a page, for its JSON; `how_to_read` explains it.

    Args:
        name: the name of the model.
        draws: the result of `measure_token_draws`.

    Raises:
        [`UserError`]: a weight is NaN or infinite.
    """
    if not all(torch.isfinite(draw[key]).all() for draw in draws for key in ("b", "gate", "size")):
        raise UserError(f"{name!r} has weights that are NaN or infinite: choose another model.")
    step = gate_step(max(draw["gate"].max().item() for draw in draws))
    sizes, blocks = {}, []
    for number, draw in enumerate(draws, start=1):
        low, high = torch.quantile(draw["b"], torch.tensor(BAND, dtype=torch.float64), dim=-1)
        of_features = {"b": draw["b"].mean(-1), "low": low, "high": high}
        blocks.append(
            {
                "block": number,
                "outputs": [list(span) for span in draw["outputs"]],
                **{key: _rounded(values, 7) for key, values in of_features.items()},
                "gate": (draw["gate"] / step).round().long().tolist(),
            }
        )
        for span, size in zip(draw["outputs"], draw["size"]):
            sizes.setdefault(span, size)  # an entry is the same in the stacks of all blocks
    return {
        "how_to_read": HOW_TO_READ,
        "model": name,
        "residual_scheme": config.residual_scheme,
        "last_k": config.last_k,
        "hidden_size": config.hidden_size,
        "unit": example.unit,
        "tokens": example.tokens,
        "grid": example.grid,
        "inputs": list(INPUTS) if len(draws[0]["b"]) == len(INPUTS) else [", ".join(INPUTS)],
        "gate_step": step,
        "sizes": [{"outputs": list(span), "size": _rounded(size, 4)} for span, size in sizes.items()],
        "draws": blocks,
    }


def _reach(draws: list[dict]) -> float:
    """The distance of the last colours from 1."""
    weights = torch.cat([(draw["b"].mean(-1)[..., None] + draw["gate"]).flatten() for draw in draws])
    apart = (weights - 1).abs().sort().values
    return float(f"{max(apart[round(SHADED * (len(apart) - 1))].item(), 0.01):.2g}")


def _map_of(data: dict, index: int) -> dict:
    """The map of one input, as JSON for bokeh; the script of the page fills in the weights."""
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper, Quad, TapTool
    from bokeh.plotting import figure

    columns = {name: [] for name in ("block", "entry", "output", "left", "right", "top", "bottom")}
    for draw in data["draws"]:
        for entry, (first, last) in enumerate(draw["outputs"]):
            name = f"{first}" if first == last else f"{first} to {last}"
            sides = (first - 0.5, last + 0.5, draw["block"] - 0.5, draw["block"] + 0.5)
            for column, value in zip(columns.values(), (draw["block"], entry, name, *sides)):
                column.append(value)
    shown = {name: [0.0] * len(columns["block"]) for name in ("weight", "b", "gate", "size")}
    source = ColumnDataSource(columns | shown, name="entries")
    blocks = len(data["draws"])
    plot = figure(
        title=f"What {INPUT_NAMES[data['inputs'][index]]} draw",
        x_range=(-0.5, blocks - 0.5),
        y_range=(blocks + 0.5, 0.5),
        x_axis_label="from output (0: the model's input)",
        y_axis_label="block",
        width=400,
        height=400,
        sizing_mode="scale_width",
        toolbar_location=None,
        tools=[],
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.grid.visible = False
    for axis in plot.axis:
        axis.ticker.min_interval = 1
        axis.ticker.num_minor_ticks = 0
    mapper = LinearColorMapper(palette=["#000000", "#ffffff"], low=0, high=2, name="colors")
    cells = {"fill_color": {"field": "weight", "transform": mapper}, "fill_alpha": 1.0}
    renderer = plot.quad("left", "right", "top", "bottom", source=source, line_color=None, name="cells", **cells)
    renderer.nonselection_glyph = renderer.glyph
    renderer.selection_glyph = Quad(**cells, line_width=3)
    renderer.hover_glyph = Quad(**cells, line_color="#808080", line_width=2)
    tooltips = [(name, f"@{name}") for name in ("block", "output")]
    tooltips += [(name, f"@{name}{{0.0000}}") for name in ("weight", "b", "gate", "size")]
    plot.add_tools(HoverTool(tooltips=tooltips), TapTool())
    return json_item(plot)


def write_page(data: dict, draws: list[dict], picture: str | None, file: Path) -> None:
    """
    Write a page.

    Args:
        data: the result of [`page_data`].
        draws: the draws that it was made from.
        picture: see [`Example`].

    Raises:
        [`UserError`]: the file cannot be written.
    """
    from bokeh.resources import Resources

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        mark=MARK,
        data=data,
        maps=[_map_of(data, index) for index in range(len(data["inputs"]))],
        view={"reach": _reach(draws), "picture": picture},
        bokeh=Resources(mode="inline", components=["bokeh"], log_level="error").render_js(),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page)
    except OSError as error:
        raise UserError(f"`page` is {str(file)!r}, which cannot be written: {error.strerror}.") from error
