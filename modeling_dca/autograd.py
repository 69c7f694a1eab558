"""Detection of transforms other than the backward pass of eager autograd, and derivatives for them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch


def _nothing(*args) -> bool:
    return False


# torch has no public API for these. A checkpoint must still load with a release that has removed them.
transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", _nothing)
is_in_torch_dispatch_mode = getattr(_python_dispatch, "is_in_torch_dispatch_mode", _nothing)
is_of_batched_grads = getattr(torch._C._functorch, "is_legacy_batchedtensor", _nothing)


def autograd_alone(*tensors: Tensor | None) -> bool:
    """
    Whether only eager autograd sees the operations on these tensors. Otherwise they should be plain PyTorch: under
    `torch.compile`, `torch.func`, forward-mode derivatives and `torch.jit.trace`, and for tensors of other classes, such as
    `DTensor`.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or transforms_are_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or any(type(tensor) not in (Tensor, nn.Parameter, type(None)) for tensor in tensors)
    )


def backward_alone(*grads: Tensor) -> bool:
    """Whether only the backward pass of eager autograd sees the operations on these gradients."""
    if torch.is_grad_enabled() or not autograd_alone(*grads):
        return False
    return not any(is_of_batched_grads(grad) for grad in grads)


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], output_grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the inputs of `function`, as differentiable operations; `None` if not needed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another: views, on which nothing else depends, give the partial derivatives.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        needed = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(function(*inputs), needed, output_grads, create_graph=create_graph))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]
