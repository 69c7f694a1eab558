"""Generalized residuals (paper, section 3.1): the stack that a block takes, their parameters, the reference maths."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import nn
from transformers.utils import logging
from transformers.utils.generic import GeneralInterface, maybe_autocast

from .configuration_dca import RESIDUAL_SCHEMES, DCABaseConfig, nearest_name
from .sums import note_sum


logger = logging.get_logger(__name__)

#: The epsilon of the norm of a gate's input, which has no parameters.
GATE_NORM_EPS = 1e-6


def push(
    stack: Sequence[torch.Tensor], output: torch.Tensor, max_entries: int | None = None
) -> tuple[torch.Tensor, ...]:
    """
    The stack with what a block adds to it. Nothing is written in place.

    With `max_entries = k + 2` this is the stack of k-DCA (section 3.1): the model's input and the last `k` outputs stay
    apart, and one entry, the second, is the sum of those between. With `max_entries = 1` it is the residual sum.

    Args:
        stack (sequence of tensors of shape `(..., hidden_size)`): the model's input `f_0`, and what blocks have added.
        output (`torch.Tensor` of shape `(..., hidden_size)`): what a block adds, `f_t`.
        max_entries (`int`, *optional*): the most entries that are kept apart; `None` for all.

    Returns:
        The entries, the newest last.
    """
    stack = (*stack, output)
    if max_entries is None or len(stack) <= max_entries:
        return stack
    merged = min(1, max_entries - 1)
    # Under autocast, layer outputs are in half precision. Their sum has the type of the model's input.
    total = stack[merged].to(stack[0].dtype) + stack[merged + 1]
    if max_entries > 2:  # each output has been a separate entry, and is kept as such
        note_sum(total, stack[merged], stack[merged + 1], stack[0].dtype)
    return *stack[:merged], total, *stack[merged + 2 :]


def output_dtype(stack: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest type of the stack's entries: under autocast the model's input is wider than layer outputs."""
    dtypes = {entry.dtype for entry in stack}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def check_inputs(stack: Sequence[torch.Tensor], delta: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Raises `ValueError` where the shapes are not those that [`generalized_residual`] takes."""
    if not stack:
        raise ValueError("`stack` is empty, but must hold the model's input at least.")
    shape = stack[0].shape
    for i, entry in enumerate(stack):
        if entry.shape != shape:
            raise ValueError(
                f"Entry {i} of `stack` has shape {tuple(entry.shape)}, but must have that of the first, {tuple(shape)}."
            )
    entries, width = len(stack), shape[-1]
    if delta.ndim != 3 or delta.shape[1] != entries or delta.shape[2] not in (1, width):
        raise ValueError(
            f"`delta` has shape {tuple(delta.shape)}, but for {entries} entries of width {width} it must be "
            f"(outputs, {entries}, {width}) or (outputs, {entries}, 1)."
        )
    if gate is not None and gate.shape != (delta.shape[0], width):
        raise ValueError(
            f"`gate` has shape {tuple(gate.shape)}, but must be (outputs, width) = {delta.shape[0], width}."
        )


def gates_of(entry: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """
    The gates of an entry, `relu(w . n(f))`, which are added to `b`; `n` divides by the root mean square over the features.

    Args:
        entry (`torch.Tensor` of shape `(..., d)`): `f`.
        gate (`torch.Tensor` of shape `(outputs, d)`): `w`.

    Returns:
        A tensor `(..., outputs)`. At exactly 0, its derivative is that of an open gate.
    """
    inverse_rms = torch.rsqrt(entry.square().mean(-1, keepdim=True) + GATE_NORM_EPS)
    # Unlike that of relu, the gradient of clamp at exactly 0 is 1, so that a gate can learn from zero.
    return (nn.functional.linear(entry, gate) * inverse_rms).clamp(min=0)


def generalized_residual(
    stack: Sequence[torch.Tensor], delta: torch.Tensor, gate: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """
    The generalized residuals of a stack, `g = sum_i (b_i + relu(w . n(f_i))) * f_i` with `b = 1 + delta` (GRN-v3, section
    3.1; GRN-v1 and v2 have no gate, DCA has three outputs), as plain PyTorch. The gate sees an entry normalised by its
    root mean square, `n(f) = f / sqrt(mean(f^2) + GATE_NORM_EPS)`, so that it does not grow with the entry.

    Args:
        stack (sequence of `t` tensors of shape `(..., d)`): the entries `f_i`.
        delta (`torch.Tensor` of shape `(outputs, t, d)` or `(outputs, t, 1)`): the deviation of `b` from 1.
        gate (`torch.Tensor` of shape `(outputs, d)`, *optional*): `w`.

    Returns:
        `outputs` tensors of shape `(..., d)`, in the widest type of the stack. Sums are taken in float32 at least.
    """
    check_inputs(stack, delta, gate)
    dtype = output_dtype(stack)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    entries = [entry.to(compute_dtype) for entry in stack]
    b = 1 + delta.to(compute_dtype)
    # The output is split as sum_i b_i * f_i + sum_i relu(w . n(f_i)) * f_i, so that only the entries, and no other tensor
    # of their size, are kept for the backward pass.
    outputs = []
    for output in range(b.shape[0]):
        total = b[output, 0] * entries[0]
        for i in range(1, len(entries)):
            total = torch.addcmul(total, b[output, i], entries[i])
        outputs.append(total)
    if gate is not None:
        with maybe_autocast(entries[0].device.type, enabled=False):
            for entry in entries:
                open_gates = gates_of(entry, gate.to(compute_dtype))
                for output, total in enumerate(outputs):
                    outputs[output] = torch.addcmul(total, open_gates[..., output, None], entry)
    return tuple(output.to(dtype) for output in outputs)


class GRNInterface(GeneralInterface):
    """The implementations of [`generalized_residual`] by name, all of one signature; `register` adds one."""

    _global_mapping = {"eager": generalized_residual}


#: All implementations of [`generalized_residual`] that `config.grn_implementation` can name.
ALL_GRN_FUNCTIONS = GRNInterface()


#: The best implementation by type of device, where it was tested; elsewhere it is the reference. (PyTorch for ROCm also calls
#: its devices "cuda": set "triton" explicitly to try it there.)
BEST_GRN_FUNCTIONS = {"cpu": "cpu"} if torch.version.hip else {"cpu": "cpu", "cuda": "triton"}


def find_implementation(name: str, device: torch.device) -> Callable:
    """
    The implementation of [`generalized_residual`] that `config.grn_implementation` names. `"auto"` is the best one for tensors
    on `device`; it is the reference if that cannot run, and in `torch.export`, whose programs must need only torch.
    """
    if name != "auto":
        return ALL_GRN_FUNCTIONS[name]
    if torch.compiler.is_exporting():
        return generalized_residual
    implementation = ALL_GRN_FUNCTIONS[BEST_GRN_FUNCTIONS.get(device.type, "eager")]
    obstacle = implementation.obstacle(device) if hasattr(implementation, "obstacle") else None
    if obstacle is None:
        return implementation
    logger.warning_once(f"The generalized residuals are computed by the slower reference: {obstacle}.")
    return generalized_residual


class GeneralizedResidual(nn.Module):
    """
    Forms the inputs of one block, or the model's output, from the stack (section 3.1).

    Args:
        config (`DCABaseConfig`): the scheme, and the number of entries that are kept apart.
        num_blocks (`int`): the number of blocks that have added to the stack.
        outputs (`int`, *optional*): the number of inputs to form; by default those of a block (three for DCA, one
            otherwise).

    Parameters, if the scheme has them: `delta`, the deviation of `b` from 1, of shape `(outputs, entries, hidden_size)`
    (`(outputs, entries, 1)` for GRN-v1), and `gate` of shape `(outputs, hidden_size)`. Both are initially zero.
    """

    def __init__(self, config: DCABaseConfig, num_blocks: int, outputs: int | None = None):
        super().__init__()
        scheme = RESIDUAL_SCHEMES[config.residual_scheme]
        if config.grn_implementation not in ("auto", *ALL_GRN_FUNCTIONS.valid_keys()):
            raise ValueError(
                f"`grn_implementation` is {config.grn_implementation!r}; "
                + nearest_name(config.grn_implementation, ["auto", *ALL_GRN_FUNCTIONS.valid_keys()])
            )
        self.config, self.num_blocks = config, num_blocks
        self.delta = self.gate = None
        if scheme is not None:
            outputs = outputs or scheme.outputs
            entries = min(num_blocks + 1, config.max_stack_entries or num_blocks + 1)
            self.delta = nn.Parameter(torch.zeros(outputs, entries, config.hidden_size if scheme.elementwise else 1))
            if scheme.gated:
                self.gate = nn.Parameter(torch.zeros(outputs, config.hidden_size))

    def forward(self, *stack: torch.Tensor) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]:
        """
        Args:
            stack (tensors of shape `(batch, sequence, hidden_size)`): one for each entry.

        Returns:
            `outputs` tensors of the same shape, for DCA the inputs of queries, keys and values, in this order; and the
            stack, a tuple, which later blocks should use instead of the given one (see `FusedGeneralizedResidual`).
        """
        if self.delta is None:
            return *stack, stack  # the only entry of the standard scheme is the residual stream
        implementation = find_implementation(self.config.grn_implementation, stack[0].device)
        if hasattr(implementation, "chained"):
            outputs, stack = implementation.chained(stack, self.delta, self.gate)
        else:
            outputs = implementation(stack, self.delta, self.gate)
        return *outputs, stack

    def gates(self, entry: torch.Tensor, index: int) -> torch.Tensor:
        """The gates of an entry `(..., hidden_size)`, that of the stack at `index`: `(..., outputs)`, in float32."""
        return gates_of(entry.float(), self.gate.float())

    def spans(self) -> list[tuple[int, int]]:
        """The first and the last output that each entry holds (output 0 is the model's input); the second may be a sum."""
        entries = self.delta.shape[1]
        merged = self.num_blocks + 1 - entries
        return [(i if i < 2 else i + merged, i if i < 1 else i + merged) for i in range(entries)]

    def extra_repr(self) -> str:
        if self.delta is None:
            return "sum"
        return f"outputs={self.delta.shape[0]}, entries={self.delta.shape[1]}, gated={self.gate is not None}"


__all__ = ["ALL_GRN_FUNCTIONS", "GeneralizedResidual", "generalized_residual", "push"]
