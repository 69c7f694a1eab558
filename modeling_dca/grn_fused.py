"""What makes a pair of kernels, forward and backward, an implementation of generalized residuals."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .grn import check_inputs, generalized_residual, output_dtype


class FusedGeneralizedResidual:
    """
    An implementation of [`~grn.generalized_residual`] made of two kernels, and called as that is.

    Both become operators of `torch.library`, which `torch.compile` takes as they are: its graph grows with the number of
    blocks, not with the number of pairs of blocks. Nothing but the stack is kept for the backward pass.

    Args:
        name (`str`): what `config.grn_implementation` calls it.
        forward (callable): `forward(stack, delta, gate)` returns the outputs as one contiguous tensor
            `(outputs, ..., d)`, in the type of `output_dtype(stack)`.
        backward (callable): `backward(output_grads, entry_grads, stack, delta, gate)` returns the gradients of the
            entries, each with its one of `entry_grads` added if there are any, of `delta` and, if given, of `gate`.
        obstacle (callable): `obstacle(device)` returns what keeps the kernels from running there, or `None`.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor],
        backward: Callable[
            [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None], list[Tensor]
        ],
        obstacle: Callable[[torch.device], str | None],
    ):
        # Code that came with a checkpoint is a module of another name, and has operators of its own.
        prefix = f"{__name__.replace('.', '_')}::{name}"
        arguments = "Tensor[] stack, Tensor delta, Tensor? gate"
        self.name = name
        self.obstacle = obstacle
        self.kernels = forward, backward
        self.operators = (
            torch.library.custom_op(f"{prefix}_forward", forward, mutates_args=(), schema=f"({arguments}) -> Tensor"),
            torch.library.custom_op(
                f"{prefix}_backward",
                backward,
                mutates_args=(),
                schema=f"(Tensor[] output_grads, Tensor[] entry_grads, {arguments}) -> Tensor[]",
            ),
        )
        for operator, fake in zip(self.operators, (_fake_forward, _fake_backward)):
            operator.register_fake(fake)

    def forward_and_backward(self, entry: Tensor) -> tuple[Callable, Callable]:
        """What to call for a stack with such an entry: an operator costs as much as a kernel does for one token."""
        return self.kernels if type(entry) is Tensor and not torch.compiler.is_compiling() else self.operators

    def __call__(self, stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
        """See [`~grn.generalized_residual`]."""
        return self.chained(stack, delta, gate)[0]

    def chained(
        self, stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """
        Returns the outputs, and the stack for whoever needs it next. An entry's gradient then comes from its last user
        through all others, and each adds its own while it has the entry at hand; without this chain, autograd would
        have to write and add up as many gradients as there are users.

        Raises:
            `ValueError`: the kernels cannot run on the device of the stack, or the shapes do not belong together.
        """
        check_inputs(stack, delta, gate)
        if obstacle := self.obstacle(stack[0].device):
            raise ValueError(
                f'The implementation {self.name!r} cannot run: {obstacle}; "auto" takes the best that can.'
            )
        if torch.is_grad_enabled():
            results = _Chained.apply(self, delta, gate, *stack)
            return results[: delta.shape[0]], results[delta.shape[0] :]
        forward, _ = self.forward_and_backward(stack[0])
        return forward(stack, delta, gate).unbind(), tuple(stack)


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, implementation, delta, gate, *stack):
        forward, ctx.backward_kernel = implementation.forward_and_backward(stack[0])
        ctx.save_for_backward(delta, gate, *stack)
        ctx.set_materialize_grads(False)
        return (*forward(stack, delta, gate).unbind(), *stack)

    @staticmethod
    def backward(ctx, *grads):
        delta, gate, *stack = ctx.saved_tensors
        outputs = delta.shape[0]
        if all(grad is None for grad in grads[:outputs]):
            return None, None, None, *grads[outputs:]
        output_grads = [_or_zeros(grad, stack[0], output_dtype(stack)) for grad in grads[:outputs]]
        entry_grads = []
        if any(grad is not None for grad in grads[outputs:]):
            entry_grads = [_or_zeros(grad, entry, entry.dtype) for grad, entry in zip(grads[outputs:], stack)]
        # A gradient that is to be differentiated once more is that of the reference.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = _reference_backward if twice else ctx.backward_kernel
        results = backward(output_grads, entry_grads, stack, delta, gate)
        gate_grad = None if gate is None else results[-1]
        return None, results[len(stack)], gate_grad, *results[: len(stack)]


def _or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad


def _fake_forward(stack, delta, gate):
    return stack[0].new_empty((delta.shape[0], *stack[0].shape), dtype=output_dtype(stack))


def _fake_backward(output_grads, entry_grads, stack, delta, gate):
    inputs = (*stack, delta) if gate is None else (*stack, delta, gate)
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _reference_backward(output_grads, entry_grads, stack, delta, gate):
    inputs = (*stack, delta) if gate is None else (*stack, delta, gate)
    grads = differentiable_gradients(
        lambda *inputs: generalized_residual(inputs[: len(stack)], *inputs[len(stack) :]), inputs, output_grads
    )
    for i, entry_grad in enumerate(entry_grads):
        grads[i] = entry_grad if grads[i] is None else grads[i] + entry_grad
    return grads


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], output_grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the inputs of `function`, as operations that have derivatives themselves; `None` if not needed."""
    # One input may depend on another: of views, on which nothing else depends, we get the partial derivatives.
    inputs = [tensor.view_as(tensor) for tensor in inputs]
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(function(*inputs), needed, output_grads, create_graph=True))
    return [next(grads) if tensor.requires_grad else None for tensor in inputs]
