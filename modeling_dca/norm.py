"""The norms: Llama's, in a version that keeps less for the backward pass, Gemma's, and the layer norm."""

from collections.abc import Sequence

import torch
from torch import nn

from .autograd import autograd_alone, backward_alone, differentiable_gradients, is_in_torch_dispatch_mode
from .configuration_dca import DCABaseConfig
from .grn import GeneralizedResidual, find_implementation


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Llama's root mean square norm in plain PyTorch, in float32 for any type of input."""
    dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + eps)
    return weight * hidden_states.to(dtype)


def inverse_rms(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last dimension, which it drops."""
    norms = torch.linalg.vector_norm(hidden_states, dim=-1)
    return norms.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()


def fused_rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[`rms_norm`] in fewer passes over memory, if nothing is rounded in between."""
    # (It writes in place, which selective activation checkpointing refuses.)
    if hidden_states.dtype == weight.dtype == torch.float32 and not is_in_torch_dispatch_mode():
        return (hidden_states * inverse_rms(hidden_states, eps).unsqueeze(-1)).mul_(weight)
    return rms_norm(hidden_states, weight, eps)


def rms_norm_backward(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The needed ones of the gradients of the input and of the weight of [`rms_norm`], in few passes."""
    widened, grad = (tensor.float().flatten(0, -2) for tensor in (hidden_states, grad))
    scale = inverse_rms(widened, eps)
    product = grad * widened
    input_grad = weight_grad = None
    if needed[1]:
        weight_grad = (scale @ product).to(weight.dtype)
    if needed[0]:
        # x / rms(x): the part of the gradient along x goes with the scale.
        along = (product @ weight.float()).mul_(scale.square()).div_(-widened.shape[-1])
        input_grad = torch.mul(grad, weight, out=product).addcmul_(widened, along.unsqueeze(1))
        input_grad = input_grad.mul_(scale.unsqueeze(1)).to(hidden_states.dtype).view_as(hidden_states)
    return input_grad, weight_grad


class RMSNormFunction(torch.autograd.Function):
    """
    [`rms_norm`] that keeps only its input for the backward pass. It saves memory, not time: with 12 layers of width 512 and
    512 tokens, DCA keeps 257 MiB instead of 306 in float32, 228 instead of 277 under autocast and 130 instead of 179 in
    bfloat16; the transformer 196 instead of 221, 197 instead of 222 and 99 instead of 124.
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.eps = eps
        return fused_rms_norm(hidden_states, weight, eps)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, weight = ctx.saved_tensors
        if not (torch.compiler.is_compiling() or backward_alone(grad)):
            return *differentiable_gradients(lambda *x: (rms_norm(*x, ctx.eps),), ctx.saved_tensors, (grad,)), None
        return *rms_norm_backward(hidden_states, weight, ctx.eps, grad, ctx.needs_input_grad[:2]), None


class DCARMSNorm(nn.Module):
    """Root mean square norm over the last dimension, as in Llama."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not autograd_alone(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype != torch.float64:
            # One kernel, which rounds once, after the weight. (In float64 Llama's norm computes in float32.)
            return torch.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        function = RMSNormFunction.apply if torch.is_grad_enabled() else fused_rms_norm
        return function(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class DCAZeroCenteredRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with the weight stored as its deviation from 1, as in Gemma."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        widened = hidden_states.float()
        normalized = widened * torch.rsqrt(widened.pow(2).mean(-1, keepdim=True) + self.eps)
        # Gemma rounds once, after the weight; Llama before and after.
        return (normalized * (1.0 + self.weight.float())).type_as(hidden_states)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


NORMS = {"rms_norm": DCARMSNorm, "layer_norm": nn.LayerNorm, "zero_centered_rms_norm": DCAZeroCenteredRMSNorm}


def build_norm(config: DCABaseConfig, size: int) -> nn.Module:
    """The norm that `config.norm_type` names, over the last dimension, of width `size`."""
    return NORMS[config.norm_type](size, eps=config.norm_eps)


# Private to torch, as are the functions in `autograd`.
has_global_hooks = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)


def call_is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is just the `forward` of `kind`, without hooks, wrappers or another class."""
    return type(module) is kind and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
    )


def normalized_residual(
    residual: GeneralizedResidual, stack: Sequence[torch.Tensor], norms: Sequence[nn.Module]
) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]:
    """
    The first output of `residual(*stack)`, each of its outputs after its norm of `norms`, and the stack. It is one operation
    if the implementation has it and the calls of the modules are plain: in eager mode the number of operations dominates.
    """
    if (
        call_is_plain(residual, GeneralizedResidual)
        and residual.delta is not None
        and all(call_is_plain(norm, DCARMSNorm) for norm in norms)
        and len({norm.variance_epsilon for norm in norms}) == 1
        and not has_global_hooks()
    ):
        implementation = find_implementation(residual.config.grn_implementation, stack[0].device)
        if hasattr(implementation, "normalized"):
            weights, eps = [norm.weight for norm in norms], norms[0].variance_epsilon
            outputs, stack = implementation.normalized(stack, residual.delta, residual.gate, weights, eps)
            return *outputs, stack
    *outputs, stack = residual(*stack)
    return outputs[0], *(norm(output) for norm, output in zip(norms, outputs)), stack


__all__ = ["NORMS", "DCARMSNorm", "DCAZeroCenteredRMSNorm", "build_norm", "normalized_residual"]
