"""What looks into a computation besides the backward pass of eager autograd, and derivatives for whoever does."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch


def _nothing(*args) -> bool:
    return False


# torch has no public way to ask these. A release that has them no more must not keep a checkpoint from loading.
transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", _nothing)
is_in_torch_dispatch_mode = getattr(_python_dispatch, "is_in_torch_dispatch_mode", _nothing)
is_of_batched_grads = getattr(torch._C._functorch, "is_legacy_batchedtensor", _nothing)


def autograd_alone(*tensors: Tensor | None) -> bool:
    """
    Whether eager autograd is all that looks into what is computed with these tensors. If not, it should be plain PyTorch:
    under `torch.compile`, `torch.func`, derivatives in forward mode and `torch.jit.trace`, and for tensors of other
    classes, such as `DTensor`.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or transforms_are_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or any(type(tensor) not in (Tensor, nn.Parameter, type(None)) for tensor in tensors)
    )


def backward_alone(*grads: Tensor) -> bool:
    """Whether nothing but the backward pass of eager autograd looks into what is computed with these gradients."""
    if torch.is_grad_enabled() or not autograd_alone(*grads):
        return False
    return not any(is_of_batched_grads(grad) for grad in grads)


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], output_grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the inputs of `function`, as operations that have derivatives themselves; `None` if not needed."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another: of views, on which nothing else depends, we get the partial derivatives.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        needed = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(function(*inputs), needed, output_grads, create_graph=create_graph))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]
