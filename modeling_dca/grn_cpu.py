"""Generalized residuals in eager mode on the CPU, in few passes over memory, with in-place operations."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .grn import ALL_GRN_FUNCTIONS, GATE_NORM_EPS, output_dtype
from .grn_fused import FusedGeneralizedResidual
from .norm import inverse_rms, rms_norm, rms_norm_backward


# Up to this size, as in decoding, the number of operations dominates the time, not memory.
MAX_ELEMENTS_AT_ONCE = 2**16


def without_autocast(function: Callable) -> Callable:
    """Disables autocast, as this module chooses the types. (Leaving autocast takes as long as four small operations.)"""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapper


def pre_activations(entry: Tensor, gate: Tensor) -> Tensor:
    """`w . n(f)` of an entry `(tokens, d)`: `(tokens, outputs)`."""
    return (entry @ gate.mT).mul_(inverse_rms(entry, GATE_NORM_EPS).unsqueeze(1))


@without_autocast
def forward(
    stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None, norms: Sequence[Tensor] = (), eps: float = 0.0
) -> Tensor:
    shape, dtype = stack[0].shape, output_dtype(stack)
    if norms and dtype != torch.float32:
        outputs = forward(stack, delta, gate)
        return torch.stack([*map(rms_norm, outputs, norms, itertools.repeat(eps)), *outputs])
    tokens, width = math.prod(shape[:-1]), shape[-1]
    compute_dtype = torch.promote_types(dtype, torch.float32)
    b = (1 + delta.to(compute_dtype)).unsqueeze(2)
    gate = None if gate is None else gate.to(compute_dtype)
    if len(delta) * len(stack) * tokens * width <= MAX_ELEMENTS_AT_ONCE:
        entries = torch.stack(stack).view(len(stack), tokens, width).to(compute_dtype)
        factors = b
        if gate is not None:
            seen = nn.functional.linear(torch.rms_norm(entries, (width,), None, GATE_NORM_EPS), gate)
            factors = b + seen.clamp_(min=0).permute(2, 0, 1).unsqueeze(3)
        results = (factors * entries).sum(1)
        if norms:
            # Identical to the last bit to separate norms.
            normalized = results * inverse_rms(results, eps).unsqueeze(2)
            results = torch.cat((normalized.mul_(torch.stack(norms).unsqueeze(1)), results))
        return results.view(len(results), *shape).to(dtype)

    results = stack[0].new_empty((len(norms) + len(delta), tokens, width), dtype=compute_dtype)
    normalized, outputs = results[: len(norms)], results[len(norms) :]
    for i, entry in enumerate(stack):
        entry = entry.reshape(tokens, width).to(compute_dtype)
        if i == 0:
            torch.mul(b[:, i], entry, out=outputs)
        else:
            outputs.addcmul_(b[:, i], entry)
        if gate is not None:
            open_gates = pre_activations(entry, gate).clamp_(min=0)
            outputs.addcmul_(open_gates.mT.unsqueeze(2), entry)
    if norms:
        torch.mul(outputs, inverse_rms(outputs, eps).unsqueeze(2), out=normalized)
        normalized.mul_(torch.stack(norms).unsqueeze(1))
    return results.view(len(results), *shape).to(dtype)


@without_autocast
def backward(
    output_grads: Sequence[Tensor],
    entry_grads: Sequence[Tensor],
    stack: Sequence[Tensor],
    delta: Tensor,
    gate: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    shape = stack[0].shape
    *of_entries, of_delta, of_gate = needed if gate is not None else (*needed, False)
    compute_dtype = torch.promote_types(output_dtype(stack), torch.float32)
    tokens, width = math.prod(shape[:-1]), shape[-1]
    output_grads = [grad.reshape(tokens, width).to(compute_dtype) for grad in output_grads]
    b = 1 + delta.to(compute_dtype)
    b_grad = torch.empty_like(b)
    summed = 1 if b.shape[-1] == width else (1, 2)
    products = b.new_empty((len(b), tokens, width))
    if gate is not None:
        gate_dtype, gate = gate.dtype, gate.to(compute_dtype)
        gate_grad = torch.zeros_like(gate)

    grads = []
    for i, (entry, of_entry) in enumerate(zip(stack, of_entries)):
        gated = gate is not None and (of_entry or of_gate)
        dtype, entry = entry.dtype, entry.reshape(tokens, width).to(compute_dtype)
        if of_delta or gated:
            for grad, product in zip(output_grads, products):
                torch.mul(grad, entry, out=product)
        if of_delta:
            torch.sum(products, summed, keepdim=True, out=b_grad[:, i : i + 1])
        if of_entry:
            if entry_grads:  # (these must not be changed in place)
                total = entry_grads[i].reshape(tokens, width).to(compute_dtype)
                total = torch.addcmul(total, b[0, i], output_grads[0])
            else:
                total = b[0, i] * output_grads[0]
            for factor, grad in zip(b[1:, i], output_grads[1:]):
                total.addcmul_(factor, grad)
        if gated:
            scale = inverse_rms(entry, GATE_NORM_EPS)
            seen = (entry @ gate.mT).mT.mul_(scale)
            # At exactly 0 the gate counts as open, so that it can learn from zero.
            seen_grads = products.sum(2).masked_fill_(seen < 0, 0).mul_(scale)
        if gated and of_gate:
            gate_grad.addmm_(seen_grads, entry)
        if gated and of_entry:
            for factor, grad in zip(seen.clamp(min=0).unsqueeze(2), output_grads):
                total.addcmul_(factor, grad)
            total.addmm_(seen_grads.mT, gate)
            # n(f) = f * scale(f): the part of the gradient along f goes with the scale.
            along = seen.mul_(seen_grads).sum(0).mul_(scale).div_(-width)
            total.addcmul_(along.unsqueeze(1), entry)
        if of_entry:
            grads.append(total.view(shape).to(dtype))
    if of_delta:
        grads.append(b_grad.to(delta.dtype))
    if of_gate:
        grads.append(gate_grad.to(gate_dtype))
    return grads


@without_autocast
def norm_backward(
    outputs: Sequence[Tensor], first_grad: Tensor | None, grads: Sequence[Tensor], norms: Sequence[Tensor], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    results = [rms_norm_backward(output, norm, eps, grad) for output, norm, grad in zip(outputs, norms, grads)]
    output_grads, norm_grads = map(list, zip(*results))
    if first_grad is not None:
        output_grads[0].add_(first_grad)
    return output_grads, norm_grads


def obstacle(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device}, and it is for those of the CPU"


generalized_residual_cpu = FusedGeneralizedResidual("cpu", forward, backward, norm_backward, obstacle)
ALL_GRN_FUNCTIONS.register("cpu", generalized_residual_cpu)


__all__ = ["generalized_residual_cpu"]
