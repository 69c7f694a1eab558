"""How much checkpoints draw from each earlier output, on the held-out data of their runs: numbers, figures, and a table."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Trainer
from transformers.trainer_callback import ProgressCallback

import modeling_dca
from modeling_dca import DCABaseConfig
from training.results.card import link_page
from training.results.depth_weights import (
    ALL_BLOCKS,
    BAND,
    OUTPUT,
    depth_weights,
    losses_without,
    measure_draws,
    measure_token_draws,
    residuals_of,
)
from training.results.figures import draw_depth_spreads, draw_depth_weights, draw_without
from training.results.hub import model_name
from training.results.page import check_page, check_size, page_data, write_page
from training.run.evaluation import held_out_trainer, load_model
from training.support.errors import UserError, told
from training.support.files import output_folder, read_json, write_whole
from training.support.tables import align


ALL_ENTRIES = "all"
#: The output: the key of the numbers in the first file, and the names of the files.
WEIGHTS, WEIGHTS_FILES = "weights", ("depth_weights.json", "depth_weights.png", "depth_spreads.png")
WITHOUT, WITHOUT_FILES = "without", ("without.json", "without.png")


def check_alike(configs: Sequence[tuple[str, PreTrainedConfig]]) -> None:
    """
    Raises:
        [`UserError`]: a checkpoint has no generalized residuals by its configuration, or other ones than the first.
    """
    kinds = []
    for checkpoint, config in configs:
        if not isinstance(config, DCABaseConfig) or config.residual_scheme == "standard":
            raise UserError(
                f"{checkpoint!r} has no generalized residuals: choose a DCA model with another scheme than 'standard'."
            )
        variants = [name for name in config.architectures or () if not hasattr(modeling_dca, name)]
        if variants:
            raise UserError(f"{checkpoint!r} is a {variants[0]}, a variant with other residuals: choose a DCA model.")
        entries = config.num_hidden_layers + 1
        entries = min(entries, config.max_stack_entries or entries)
        kinds.append((config.residual_scheme, config.num_hidden_layers, config.hidden_size, entries))
        if kinds[-1] != kinds[0]:
            raise UserError(
                f"{checkpoint!r} has other generalized residuals than {configs[0][0]!r}: choose models with the same scheme "
                "and shape."
            )


def outputs_named(entry: str, blocks: int) -> range:
    """
    The outputs that `--without` selects.

    Raises:
        [`UserError`]: models with `blocks` blocks have no such output.
    """
    if entry == ALL_ENTRIES:
        return range(blocks + 1)
    if not (entry.isascii() and entry.isdecimal() and int(entry) <= blocks):
        raise UserError(
            f"`without` is {entry!r}; give the number of an output, from 0 (the model's input) to {blocks} (the last block), or "
            f"{ALL_ENTRIES!r} for each in turn."
        )
    return range(int(entry), int(entry) + 1)


def held_out_losses(trainer: Trainer, outputs: range) -> tuple[float, list[dict]]:
    """[`losses_without`] of the model of a trainer."""
    trainer.remove_callback(ProgressCallback)
    trainer.compute_metrics = None  # only the loss is needed
    return losses_without(trainer.model, outputs, lambda: trainer.evaluate()["eval_loss"])


def mean_losses(of_models: Sequence[tuple[float, list[dict]]]) -> dict[str, Any]:
    """The results of [`losses_without`] over similar models: `loss` and `lost` are means, and `losses` those of each."""
    befores, found = zip(*of_models)
    rows = []
    for same in zip(*found):
        losses = [row["loss"] for row in same]
        means = {key: sum(row[key] for row in same) / len(same) for key in ("loss", "lost")}
        rows.append({**same[0], **means, "losses": losses})
    return {"loss": sum(befores) / len(befores), "losses": befores, WITHOUT: rows}


def table_of(rows: list[dict]) -> str:
    """The rise of the loss without each output: in the block that loses most, in all blocks, and in the model's output."""
    lines = []
    for output in dict.fromkeys(row["without"] for row in rows):
        lost = {row["block"]: row["lost"] for row in rows if row["without"] == output}
        together = [lost.pop(name, None) for name in (ALL_BLOCKS, OUTPUT)]
        most = max(lost, key=lost.get, default=None)
        cells = ["" if each is None else f"{each:+.4f}" for each in together]
        lines.append([str(output), "" if most is None else f"{lost[most]:+.4f} (block {most})", *cells])
    return align(["without output", "in one block, at most", "in all blocks", "in the model's output"], lines)


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Turns errors of writing to `folder` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error


def write_depth_weights(
    asked: Sequence[dict[str, Any]], folder: Path, times_size: bool = False, without: str | None = None
) -> None:
    """
    Write how much checkpoints draw from each earlier output, as numbers and figures over all of them, and how much the loss
    rises without an output.

    Args:
        asked: what `parse_evaluation` returned, for each checkpoint.
        times_size: whether weights are multiplied by the sizes of the entries.
        without: the output to leave out, or `"all"` for each in turn.

    Raises:
        [`UserError`]: the checkpoints cannot be read or differ in shape, there is no such output, or the folder holds other
            files of these names.
    """
    check_alike([(each["checkpoint"], each["config"]) for each in asked])
    outputs = None if without is None else outputs_named(without, asked[0]["config"].num_hidden_layers)
    with ExitStack() as stack:
        trainers = [stack.enter_context(held_out_trainer(**each)) for each in asked]
        output_folder(folder, WEIGHTS_FILES, lambda: WEIGHTS in read_json(folder / WEIGHTS_FILES[0]))
        if outputs is not None:
            output_folder(folder, WITHOUT_FILES, lambda: WITHOUT in read_json(folder / WITHOUT_FILES[0]))
        sources = [
            {
                "checkpoint": each["checkpoint"],
                "data": dataclasses.asdict(each["data"]),
                "examples": len(trainer.eval_dataset),
            }
            for each, trainer in zip(asked, trainers)
        ]
        weights = depth_weights(
            [measure_draws(trainer.model, trainer.get_eval_dataloader()) for trainer in trainers], times_size
        )
        numbers, grid, spreads = (folder / name for name in WEIGHTS_FILES)
        with written_to(folder):
            content = {"checkpoints": sources, "percentiles": BAND, "times_size": times_size, WEIGHTS: weights}
            write_whole(numbers, json.dumps(content, indent=1))
            draw_depth_weights(weights, grid, times_size)
            draw_depth_spreads(weights, spreads, times_size)
        for source in sources:
            held_out = source["data"]["eval_dataset"] or source["data"]["dataset"]
            print(f"{source['checkpoint']}: {source['examples']:,} held-out examples of {held_out}")
        print(f"The weights of all blocks are in {folder}: {', '.join(WEIGHTS_FILES)}.")
        if outputs is None:
            return
        losses = mean_losses([held_out_losses(trainer, outputs) for trainer in trainers])
    numbers, grid = (folder / name for name in WITHOUT_FILES)
    with written_to(folder):
        write_whole(numbers, json.dumps({"checkpoints": sources, **losses}, indent=1))
        draw_without(losses[WITHOUT], grid)
    print(f"\nHeld-out loss {losses['loss']:.4f}, and its rise in nats:\n\n{table_of(losses[WITHOUT])}\n")
    if any(first != last for row in losses[WITHOUT] for first, last in [row["outputs"]]):
        print("(An entry that merges several outputs is left out as a whole.)")
    print(f"The losses without each output are in {folder}: {', '.join(WITHOUT_FILES)}.")


def explore(asked: dict[str, Any], file: Path, **given: str | None) -> None:
    """
    Write the page of a checkpoint: how much its blocks draw for each token of a text, or patch of an image.

    Args:
        asked: what `parse_evaluation` returned.
        file: the page; if it is in the folder of the checkpoint, the card there links to it.
        given: `text`, or `image`, the path of one; the other is `None`.

    Raises:
        [`UserError`]: the checkpoint or the example cannot be read, they do not fit, or the page cannot be written.
    """
    checkpoint, config, arguments = asked["checkpoint"], asked["config"], asked["arguments"]
    check_alike([(checkpoint, config)])
    check_page(file)
    kind = "image" if asked["task"].name == "image-classification" else "text"
    other = next(name for name in given if name != kind)
    if given[kind] is None or given[other] is not None:
        raise UserError(f"{checkpoint!r} is a model of {kind}s: --page takes --{kind}, not --{other}, for it.")
    example = asked["task"].example(given[kind], asked["data"], config, checkpoint)
    model = load_model(asked["model_class"], checkpoint, arguments.dtype)
    check_size(residuals_of(model), example, checkpoint)
    device = arguments.device or torch.accelerator.current_accelerator() or "cpu"
    with told(checkpoint, "shown"):
        model = model.to(device)
        draws = measure_token_draws(model, {name: values.to(device) for name, values in example.inputs.items()})
    name = model_name(Path(checkpoint)) if Path(checkpoint).exists() else checkpoint
    write_page(page_data(name, config, example, draws), draws, example.picture, file)
    linked = link_page(file, Path(checkpoint))
    print(
        f"The page with the weights of each {example.unit} is {file} ({len(example.tokens):,} in all): open it in a browser."
        + (" The model card links to it." if linked else "")
    )
