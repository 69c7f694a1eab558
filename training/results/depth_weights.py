"""
How much the blocks of a trained model draw from each earlier output, as the weights `b + relu(w . n(f))` (paper, figure 10,
whose model has only `b`), and how much the loss rises without an output.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_dca import GeneralizedResidual


INPUTS = ("q", "k", "v")
#: The names of a block's inputs; in other schemes than DCA, queries, keys and values share one.
INPUT_NAMES = {"q": "queries", "k": "keys", "v": "values", "q, k, v": "queries, keys and values"}
BAND = (0.05, 0.95)
#: What can leave out an output, apart from a single block.
ALL_BLOCKS, OUTPUT = "all", "output"


def _places(residual: GeneralizedResidual) -> list[int]:
    """The indices of the entries of the stack that a generalized residual takes (a variant may take only some)."""
    return list(getattr(residual, "chosen", range(residual.delta.shape[1])))


@torch.no_grad()
def _run_recording(model: PreTrainedModel, batches: Iterable[dict], record: Callable) -> list[list]:
    """
    Run a model, and call `record(gates, squares)` for each block and batch.

    Args:
        record: takes `relu(w . n(f_i))` of each token, `(inputs, entries, tokens)`, and the mean square of each entry over
            its features, `(entries, tokens)`.

    Returns:
        The results of `record`, by block and batch.
    """
    recorded = []

    def hook_of(records: list) -> Callable:
        def hook(residual: GeneralizedResidual, stack: tuple[torch.Tensor, ...]):
            entries = [stack[i] for i in _places(residual)]
            squares = torch.stack([entry.float().square().mean(dim=-1).flatten() for entry in entries])
            gates = squares.new_zeros(len(residual.delta), *squares.shape)
            if residual.gate is not None:
                of_entries = [residual.gates(entry, i).flatten(0, -2) for i, entry in enumerate(entries)]
                gates = torch.stack(of_entries).permute(2, 0, 1)
            records.append(record(gates, squares))

        return hook

    hooks = []
    for residual in residuals_of(model):
        recorded.append([])
        hooks.append(residual.register_forward_pre_hook(hook_of(recorded[-1])))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return recorded


def residuals_of(model: PreTrainedModel) -> list[GeneralizedResidual]:
    """The generalized residuals that form the inputs of the blocks, in order."""
    return [layer.residual for layer in model.base_model.layers[: model.config.num_hidden_layers]]


@torch.no_grad()
def measure_draws(model: PreTrainedModel, batches: Iterable[dict]) -> list[dict]:
    """
    How much the blocks of a model draw from their stacks, as the mean over the tokens of batches.

    Args:
        model: a model of any scheme but the standard one, which learns no weights.
        batches: held-out inputs of the model, on its device.

    Returns:
        A dictionary for each block: `outputs`, see [`depth_weights`], and tensors on the CPU: `b` `(inputs, entries,
        hidden_size)` (1 in the place of `hidden_size` for GRN-v1), `gate` `(inputs, entries, 1)`, the mean of
        `relu(w . n(f_i))`, and `size` `(entries,)`, the root mean square of the entries' numbers.
    """
    residuals = residuals_of(model)
    if residuals[0].delta is None:
        return []
    sums = _run_recording(model, batches, lambda gates, squares: (gates.sum(-1), squares.sum(-1), squares.shape[-1]))
    draws = []
    for residual, of_batches in zip(residuals, sums):
        opened, squares, tokens = zip(*of_batches)  # the last batch may be smaller than the others
        gate = sum(each.cpu().double() for each in opened) / sum(tokens)
        size = (sum(each.cpu().double() for each in squares) / sum(tokens)).sqrt()
        b = 1 + residual.delta.cpu().double()
        draws.append({"outputs": residual.spans(), "b": b, "gate": gate.unsqueeze(-1), "size": size})
    return draws


@torch.no_grad()
def measure_token_draws(model: PreTrainedModel, inputs: dict) -> list[dict]:
    """
    How much the blocks of a model draw from their stacks for each token of one example.

    Args:
        model: as in [`measure_draws`].
        inputs: the inputs of one text or image, on the model's device.

    Returns:
        A dictionary for each block, as in [`measure_draws`], except for `gate` `(inputs, entries, tokens)` and `size`
        `(entries, tokens)`, which are those of each token.
    """
    residuals = residuals_of(model)
    found = _run_recording(
        model, [inputs], lambda gates, squares: (gates.cpu().double(), squares.cpu().double().sqrt())
    )
    return [
        {"outputs": residual.spans(), "b": 1 + residual.delta.cpu().double(), "gate": gate, "size": size}
        for residual, ((gate, size),) in zip(residuals, found)
    ]


def depth_weights(models: Sequence[list[dict]], times_size: bool = False) -> list[dict]:
    """
    The weights of each entry of the stack for each block's queries, keys and values, over models that differ only in their
    parameters.

    Args:
        models: the result of [`measure_draws`] for each model.
        times_size: whether weights are multiplied by the entry's size.

    Returns:
        One dictionary for each input of each block, from the first block on: `block` (from 1), `input` ("q", "k", "v",
        or "q, k, v" where they share one), and lists over the entries: `outputs` (the numbers of the first and the
        last output that the entry holds; the model's input is number 0), `weight` (mean over features, tokens and
        models of `b_i + relu(w . n(f_i))`), `low` and `high` (the 5th and 95th percentile over the features of all
        models of the mean over tokens), `b` and `gate` (the means of the two terms of `weight`), and `size` (root mean
        square over features, tokens and models).
    """
    weights = []
    for block, draws in enumerate(zip(*models), start=1):
        b, gate = (torch.cat([draw[name] for draw in draws], dim=-1) for name in ("b", "gate"))
        size = torch.stack([draw["size"] for draw in draws], dim=-1)
        scales = [draw["size"].unsqueeze(-1) if times_size else 1.0 for draw in draws]
        whole = torch.cat([(draw["b"] + draw["gate"]) * scale for draw, scale in zip(draws, scales)], dim=-1)
        low, high = torch.quantile(whole, torch.tensor(BAND, dtype=whole.dtype), dim=-1)
        of_inputs = {"weight": whole.mean(-1), "low": low, "high": high, "b": b.mean(-1), "gate": gate.mean(-1)}
        for index, name in enumerate(INPUTS if len(b) == len(INPUTS) else ["q, k, v"]):
            weights.append(
                {
                    "block": block,
                    "input": name,
                    "outputs": draws[0]["outputs"],
                    **{key: values[index].tolist() for key, values in of_inputs.items()},
                    "size": size.square().mean(-1).sqrt().tolist(),
                }
            )
    return weights


def measure_depth_weights(model: PreTrainedModel, batches: Iterable[dict]) -> list[dict]:
    """[`depth_weights`] of one model, for its run, without `low` and `high`: a variant's gates may depend on features."""
    weights = depth_weights([measure_draws(model, batches)])
    return [{key: value for key, value in each.items() if key not in ("low", "high")} for each in weights]


@contextmanager
def without(entries: Iterable[tuple[GeneralizedResidual, int]]) -> Iterator[None]:
    """
    A context in which generalized residuals leave out entries of their stacks, by index, as if their `b` and gate were 0. The
    stack itself is unchanged: other blocks still draw from these entries.
    """
    removed = {}
    for residual, index in entries:
        removed.setdefault(residual, set()).add(_places(residual)[index])
    whole = {}

    def remove(residual: GeneralizedResidual, stack: tuple[torch.Tensor, ...]):
        whole[residual] = stack
        return tuple(torch.zeros_like(f) if i in removed[residual] else f for i, f in enumerate(stack))

    def restore(residual: GeneralizedResidual, stack: tuple[torch.Tensor, ...], results: tuple):
        return *results[:-1], whole.pop(residual)

    hooks = [residual.register_forward_pre_hook(remove) for residual in removed]
    hooks += [residual.register_forward_hook(restore) for residual in removed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def losses_without(
    model: PreTrainedModel, outputs: Iterable[int], measure: Callable[[], float]
) -> tuple[float, list[dict]]:
    """
    The loss of a model when a block, all blocks, or the model's output leave out the entry that holds an output. An entry
    that merges several outputs (k-DCA) is left out as a whole.

    Args:
        outputs: the numbers of the outputs to leave out in turn.
        measure: returns the loss.

    Returns:
        The loss of the whole model, and a dictionary for each output and each place that has it: `without` (the number of the
        output), `block` (the number of the block, `"all"`, or `"output"` for the generalized residual that forms the model's
        output), `outputs` (the first and the last output that are left out), `loss`, and `lost` (the increase over the loss
        of the whole model).
    """
    network = model.base_model
    residuals = {block: layer.residual for block, layer in enumerate(network.layers, start=1)}
    residuals[OUTPUT] = network.residual
    cases = []
    for output in outputs:
        holding = {
            block: index
            for block, residual in residuals.items()
            for index, (first, last) in enumerate(residual.spans())
            if first <= output <= last
        }
        blocks = [block for block in holding if block != OUTPUT]
        each_of = {block: [block] for block in blocks} | ({ALL_BLOCKS: blocks} if blocks else {})
        if OUTPUT in holding:
            each_of[OUTPUT] = [OUTPUT]
        for name, members in each_of.items():
            cases.append((output, name, [(residuals[block], holding[block]) for block in members]))

    before, losses = measure(), {}
    rows = []
    for output, name, entries in tqdm(cases, desc="without an entry", disable=None):
        # Merged outputs are left out together, which is measured once.
        if frozenset(entries) not in losses:
            with without(entries):
                losses[frozenset(entries)] = measure()
        spans = [residual.spans()[index] for residual, index in entries]
        left_out = min(first for first, _ in spans), max(last for _, last in spans)
        loss = losses[frozenset(entries)]
        rows.append({"without": output, "block": name, "outputs": left_out, "loss": loss, "lost": loss - before})
    return before, rows
