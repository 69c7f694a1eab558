"""Generalized residuals in eager mode on the CPU: few passes over memory that is written in place."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .grn import output_dtype
from .grn_fused import FusedGeneralizedResidual


# Up to here the time goes into the number of operations and not into memory: so in decoding.
MAX_ELEMENTS_AT_ONCE = 2**16


@torch.autocast("cpu", enabled=False)
def forward(stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None) -> Tensor:
    shape, dtype = stack[0].shape, output_dtype(stack)
    tokens, width = math.prod(shape[:-1]), shape[-1]
    compute_dtype = torch.promote_types(dtype, torch.float32)
    delta = delta.to(compute_dtype)
    gate = None if gate is None else gate.to(compute_dtype)
    if len(delta) * len(stack) * tokens * width <= MAX_ELEMENTS_AT_ONCE:
        stack = torch.stack(stack).view(len(stack), tokens, width).to(compute_dtype)
        open_gates = 0.0
        if gate is not None:
            open_gates = nn.functional.linear(stack, gate).clamp_(min=0).permute(2, 0, 1).unsqueeze(3)
        outputs = ((1 + delta).unsqueeze(2) + open_gates) * stack
        return outputs.sum(1).view(len(delta), *shape).to(dtype)

    b = 1 + delta
    outputs = stack[0].new_empty((len(b), tokens, width), dtype=compute_dtype)
    weight = outputs.new_empty((tokens, b.shape[-1]))
    for i, entry in enumerate(stack):
        entry = entry.reshape(tokens, width).to(compute_dtype)
        if gate is not None:
            open_gates = (entry @ gate.mT).clamp_(min=0).unsqueeze(-1).unbind(1)
        for o, (factor, output) in enumerate(zip(b[:, i], outputs)):
            if gate is not None:
                factor = torch.add(factor, open_gates[o], out=weight)
            if i == 0:
                torch.mul(factor, entry, out=output)
            else:
                output.addcmul_(factor, entry)
    return outputs.view(len(b), *shape).to(dtype)


@torch.autocast("cpu", enabled=False)
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
    elementwise = b.shape[-1] == width
    product = torch.empty_like(output_grads[0])
    weight = product.new_empty((tokens, b.shape[-1]))
    if gate is not None:
        gate_dtype, gate = gate.dtype, gate.to(compute_dtype)
        gate_grad = torch.zeros_like(gate)

    grads = []
    for i, (entry, of_entry) in enumerate(zip(stack, of_entries)):
        gated = gate is not None and (of_entry or of_gate)
        dtype, entry = entry.dtype, entry.reshape(tokens, width).to(compute_dtype)
        total = entry_grads[i].reshape(tokens, width).to(compute_dtype) if entry_grads else None
        if gated:
            pre_activation = entry @ gate.mT
            open_gates = pre_activation.clamp(min=0).unsqueeze(-1).unbind(1)
            pre_activation_grad = torch.empty_like(pre_activation)
            pre_activation_grads = pre_activation_grad.unbind(1)
        for o, (factor, factor_grad, grad) in enumerate(zip(b[:, i], b_grad[:, i], output_grads)):
            if of_delta or gated:
                torch.mul(grad, entry, out=product)
            if of_delta and elementwise:
                torch.sum(product, 0, out=factor_grad)
            elif of_delta:
                factor_grad.fill_(product.sum())
            if gated:
                torch.sum(product, 1, out=pre_activation_grads[o])
            if not of_entry:
                continue
            if gated:
                factor = torch.add(factor, open_gates[o], out=weight)
            if total is None:
                total = factor * grad
            elif o == 0:
                total = torch.addcmul(total, factor, grad)  # what came in is not ours to write to
            else:
                total.addcmul_(factor, grad)
        if gated:
            # At exactly 0 the gate counts as open, so that one that starts at zero can learn.
            pre_activation_grad.masked_fill_(pre_activation < 0, 0)
        if gated and of_gate:
            gate_grad.addmm_(pre_activation_grad.mT, entry)
        if gated and of_entry:
            for column, row in zip(pre_activation_grad.unsqueeze(-1).unbind(1), gate):
                total.addcmul_(column, row)
        if of_entry:
            grads.append(total.view(shape).to(dtype))
    if of_delta:
        grads.append(b_grad.to(delta.dtype))
    if of_gate:
        grads.append(gate_grad.to(gate_dtype))
    return grads


def obstacle(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device}, and it is for those of the CPU"


generalized_residual_cpu = FusedGeneralizedResidual("cpu", forward, backward, obstacle)


__all__ = ["generalized_residual_cpu"]
