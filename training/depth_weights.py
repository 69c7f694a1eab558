"""What a trained model draws from each earlier output: the learned `b` and the mean gate (paper, figure 10)."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from modeling_dca import GeneralizedResidual


INPUTS = ("q", "k", "v")


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
        (mean of `relu(w . f_i)` over all tokens).
    """
    residuals = [layer.residual for layer in model.base_model.layers]
    if residuals[0].delta is None:
        return []
    gates = {residual: [] for residual in residuals}

    def record_gates(residual: GeneralizedResidual, stack: tuple[torch.Tensor, ...]):
        # (tokens, outputs, entries) of this batch
        opened = [(entry.float() @ residual.gate.float().T).clamp(min=0).flatten(0, -2) for entry in stack]
        opened = torch.stack(opened, dim=-1)
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
                    "outputs": _outputs_of_entries(block, b.shape[1]),
                    "b": b[index].tolist(),
                    "gate": gate[index].tolist(),
                }
            )
    return weights


def _outputs_of_entries(num_outputs: int, entries: int) -> list[tuple[int, int]]:
    """The first and last output in each entry of a stack of `num_outputs` outputs: the second may be merged of many."""
    merged = num_outputs - entries
    return [(i if i < 2 else i + merged, i if i < 1 else i + merged) for i in range(entries)]
