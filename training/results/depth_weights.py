"""What a trained model draws from each earlier output: the learned `b` and the mean gate (paper, figure 10)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from modeling_dca import DCAPreTrainedModel, GeneralizedResidual
from training.results.figures import draw_learned_b
from training.support.errors import UserError, told
from training.support.files import output_folder, read_json, write_whole


INPUTS = ("q", "k", "v")
BAND = (0.05, 0.5, 0.95)
LEARNED_B = "learned_b"


@torch.no_grad()
def measure_depth_weights(model: PreTrainedModel, batches: Iterable[dict]) -> list[dict]:
    """
    The weights with which each block's queries, keys and values take each entry of the stack.

    Args:
        model: a model of any scheme but the standard one, which learns no weights.
        batches: held-out inputs of the model, on its device.

    Returns:
        One dictionary for each input of each block, from the first block on: `block` (from 1), `input` ("q", "k", "v",
        or "q, k, v" where they share one), and lists over the entries: `outputs` (the numbers of the first and the
        last output that the entry holds; the model's input is number 0), `b` (mean over the features) and `gate`
        (mean of `relu(w . n(f_i))` over all tokens).
    """
    residuals = [layer.residual for layer in model.base_model.layers]
    if residuals[0].delta is None:
        return []
    gates = {residual: [] for residual in residuals}

    def record_gates(residual: GeneralizedResidual, stack: tuple[torch.Tensor, ...]):
        entries = [stack[i] for i in getattr(residual, "chosen", range(len(stack)))]  # (see `training.altered`)
        # (tokens, outputs, entries) of this batch
        opened = torch.stack([residual.gates(entry, i).flatten(0, -2) for i, entry in enumerate(entries)], dim=-1)
        gates[residual].append((opened.sum(dim=0), len(opened)))

    hooks = [residual.register_forward_pre_hook(record_gates) for residual in residuals if residual.gate is not None]
    was_training = model.training
    model.eval()
    for batch in batches:
        model(**batch)
    model.train(was_training)
    for hook in hooks:
        hook.remove()

    weights = []
    for block, residual in enumerate(residuals, start=1):
        b = (1 + residual.delta.float().cpu()).mean(dim=-1)
        gate = torch.zeros_like(b)
        if gates[residual]:
            sums, tokens = zip(*gates[residual])  # the last batch may be smaller than the others
            gate = sum(each.cpu() for each in sums) / sum(tokens)
        for index, name in enumerate(INPUTS if len(b) == len(INPUTS) else ["q, k, v"]):
            weights.append(
                {
                    "block": block,
                    "input": name,
                    "outputs": residual.spans(),
                    "b": b[index].tolist(),
                    "gate": gate[index].tolist(),
                }
            )
    return weights


@torch.no_grad()
def learned_b(models: Sequence[DCAPreTrainedModel]) -> list[dict]:
    """
    How the learned `b` of the features are spread, in models that are alike but for their weights.

    Returns:
        One dictionary for each input of each block, from the first block on: `block`, `input` and `outputs` as
        [`measure_depth_weights`] has them, and lists over the entries: `low`, `median` and `high`, the 5th, 50th and 95th
        percentile over the features of all models.
    """
    spreads = []
    for block, residuals in enumerate(zip(*(model.base_model.layers for model in models)), start=1):
        residuals = [layer.residual for layer in residuals]
        b = 1 + torch.cat([residual.delta.float() for residual in residuals], dim=-1)  # (inputs, entries, features)
        low, median, high = torch.quantile(b, torch.tensor(BAND), dim=-1).tolist()
        for index, name in enumerate(INPUTS if len(b) == len(INPUTS) else ["q, k, v"]):
            spread = {"low": low[index], "median": median[index], "high": high[index]}
            spreads.append({"block": block, "input": name, "outputs": residuals[0].spans(), **spread})
    return spreads


def load(checkpoint: str) -> DCAPreTrainedModel:
    """
    Raises:
        [`UserError`]: the checkpoint cannot be read, or has no generalized residuals.
    """
    with told(checkpoint, "read"):
        model = AutoModel.from_pretrained(checkpoint)
    if not isinstance(model, DCAPreTrainedModel) or model.config.residual_scheme == "standard":
        raise UserError(
            f"{checkpoint!r} has no generalized residuals: name a DCA model of another scheme than standard."
        )
    return model


def kind_of(model: DCAPreTrainedModel) -> tuple[str, list[torch.Size]]:
    return model.config.residual_scheme, [layer.residual.delta.shape for layer in model.layers]


def write_learned_b(checkpoints: Sequence[str], folder: Path) -> None:
    """
    Write how the learned `b` of all checkpoints together are spread, in numbers and as a figure.

    Raises:
        [`UserError`]: the checkpoints cannot be read or are not alike, or the folder holds other files of these names.
    """
    models = [load(checkpoint) for checkpoint in checkpoints]
    for checkpoint, model in zip(checkpoints, models):
        if kind_of(model) != kind_of(models[0]):
            raise UserError(
                f"{checkpoint!r} has other generalized residuals than {checkpoints[0]!r}: name models of one "
                "scheme and shape."
            )
    numbers, figure = f"{LEARNED_B}.json", f"{LEARNED_B}.png"
    output_folder(folder, (numbers, figure), lambda: LEARNED_B in read_json(folder / numbers))
    content = {"checkpoints": checkpoints, "percentiles": BAND, "learned_b": learned_b(models)}
    try:
        write_whole(folder / numbers, json.dumps(content, indent=1))
        draw_learned_b(content["learned_b"], folder / figure)
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error
    print(f"The learned b are in {folder}: {numbers} and {figure}.")
