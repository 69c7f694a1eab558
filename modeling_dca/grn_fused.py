"""What makes a pair of kernels, forward and backward, an implementation of generalized residuals."""

import hashlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils.flop_counter import register_flop_formula

from .grn import check_inputs, find_implementation, generalized_residual, output_dtype


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


class FusedGeneralizedResidual:
    """
    An implementation of [`~grn.generalized_residual`] made of two kernels, and called as that is.

    Both become operators of `torch.library`, which `torch.compile` takes as they are: its graph grows with the number of
    blocks, not with the number of pairs of blocks. Nothing but the stack is kept for the backward pass. Where
    more than eager autograd looks into the computation (see [`autograd_alone`]), the reference takes their place.

    Args:
        name (`str`): what `config.grn_implementation` calls it.
        forward (callable): `forward(stack, delta, gate)` returns the outputs as one contiguous tensor
            `(outputs, ..., d)`, in the type of `output_dtype(stack)`.
        backward (callable): `backward(output_grads, entry_grads, stack, delta, gate, needed)` returns the gradients of
            the entries, each with its one of `entry_grads` added if there are any, of `delta` and, if given, of `gate`:
            those alone for which the list `needed`, in this order, holds `True`.
        obstacle (callable): `obstacle(device)` returns what keeps the kernels from running there, or `None`.

    Attributes:
        operators (tuple of two `torch._ops.OpOverload`): forward and backward, as the policies of selective activation
            checkpointing name them.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor],
        backward: Callable[
            [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None, Sequence[bool]], list[Tensor]
        ],
        obstacle: Callable[[torch.device], str | None],
    ):
        self.name = name
        self.obstacle = obstacle
        self.kernels = forward, backward
        self.operators = _define_operators(name, forward, backward)

    def __reduce__(self):
        return find_implementation, (self.name, torch.device("cpu"))  # of a name, the device decides nothing

    def forward_and_backward(self) -> tuple[Callable, Callable]:
        """What to call: an operator, where something looks for it, costs as much as a kernel does for one token."""
        seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return self.operators if seen else self.kernels

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
        compiling = torch.compiler.is_compiling() and not transforms_are_active()
        if not (compiling or autograd_alone(*stack, delta, gate)):
            return generalized_residual(stack, delta, gate), tuple(stack)
        inputs = (*stack, delta) if gate is None else (*stack, delta, gate)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            if gate is None and not delta.requires_grad:
                # The only case in which no entry is needed in the backward pass: it may be changed in place until then.
                return generalized_residual(stack, delta), tuple(stack)
            results = iter(_Chained.apply(self, delta, gate, *stack))
            outputs = tuple(itertools.islice(results, len(delta)))
            return outputs, tuple(next(results) if entry.requires_grad else entry for entry in stack)
        forward, _ = self.forward_and_backward()
        return _separate(forward(stack, delta, gate)), tuple(stack)


class _Chained(torch.autograd.Function):
    """The outputs, and of the entries those that need a gradient."""

    @staticmethod
    def forward(ctx, implementation, delta, gate, *stack):
        ctx.implementation = implementation
        ctx.save_for_backward(delta, gate, *stack)
        ctx.set_materialize_grads(False)
        forward, _ = implementation.forward_and_backward()
        later = [entry for entry, own in zip(stack, ctx.needs_input_grad[3:]) if own]
        if not torch.compiler.is_compiling():
            # A detached entry is no view to autograd, but shares its count of changes in place: to change it then is an
            # error in the backward pass, as it is for the reference, and not before.
            later = [entry.detach() for entry in later]
        return *_separate(forward(stack, delta, gate)), *later

    @staticmethod
    def backward(ctx, *grads):
        delta, gate, *stack = ctx.saved_tensors
        outputs, (_, *of_parameters), of_entries = len(delta), ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
        later = iter(grads[outputs:])
        entry_grads = [next(later) if own else None for own in of_entries]
        if all(grad is None for grad in grads[:outputs]):
            return None, None, None, *entry_grads
        output_grads = [_or_zeros(grad, stack[0], output_dtype(stack)) for grad in grads[:outputs]]
        if any(grad is not None for grad in entry_grads):
            # (What is given for an entry that needs no gradient is not looked at.)
            entry_grads = [
                _or_zeros(grad, entry, entry.dtype) if own else entry
                for grad, entry, own in zip(entry_grads, stack, of_entries)
            ]
        else:
            entry_grads = []
        if torch.compiler.is_compiling() or backward_alone(*output_grads, *entry_grads):
            _, backward = ctx.implementation.forward_and_backward()
        else:
            # A gradient that is to be differentiated once more, or in other ways, is that of the reference.
            backward = _reference_backward
        needed = [*of_entries, *of_parameters]
        if gate is None:
            needed.pop()
        results = iter(backward(output_grads, entry_grads, stack, delta, gate, needed))
        results = [next(results) if own else None for own in needed]
        gate_grad = None if gate is None else results[-1]
        return None, results[len(stack)], gate_grad, *results[: len(stack)]


def _separate(outputs: Tensor) -> tuple[Tensor, ...]:
    """As `unbind`, but what comes out are no views to autograd, so that they may be changed in place."""
    return outputs.flatten(0, 1).unsafe_chunk(len(outputs))


def _or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad


def _define_operators(name: str, forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    # Code that came with a checkpoint is another module, whose operators are its own. They are named by what the code
    # is, and not by where it lies or when it was loaded: a saved program finds them in another process.
    modules = dict.fromkeys((forward.__module__, backward.__module__, __name__, generalized_residual.__module__))
    name = f"{name}_{hashlib.sha256(''.join(map(_source, modules)).encode()).hexdigest()[:12]}"
    names = itertools.chain([name], (f"{name}_{copy}" for copy in itertools.count(2)))
    name = next(name for name in names if not hasattr(torch.ops.modeling_dca, f"{name}_forward"))
    arguments = "Tensor[] stack, Tensor delta, Tensor? gate"
    schemas = {
        "forward": f"({arguments}) -> Tensor",
        "backward": f"(Tensor[] output_grads, Tensor[] entry_grads, {arguments}, bool[] needed) -> Tensor[]",
    }
    fakes, flops = (_fake_forward, _fake_backward), (_forward_flops, _backward_flops)
    operators = []
    for (suffix, schema), kernel, fake, count in zip(schemas.items(), (forward, backward), fakes, flops):
        operator = torch.library.custom_op(f"modeling_dca::{name}_{suffix}", kernel, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        packet = getattr(torch.ops.modeling_dca, f"{name}_{suffix}")
        register_flop_formula(packet)(count)
        operators.append(packet.default)
    return tuple(operators)


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return module  # an application that is packed without its sources, or a notebook


def _fake_forward(stack, delta, gate):
    return stack[0].new_empty((delta.shape[0], *stack[0].shape), dtype=output_dtype(stack))


def _fake_backward(output_grads, entry_grads, stack, delta, gate, needed):
    return [tensor.new_empty(tensor.shape) for tensor, own in zip((*stack, delta, gate), needed) if own]


def _forward_flops(stack, delta, gate, *args, **kwargs):
    """Those of the reference's products of matrices, which is what PyTorch's counter counts."""
    return 0 if gate is None else 2 * len(stack) * math.prod(stack[0]) * delta[0]


def _backward_flops(output_grads, entry_grads, stack, delta, gate, needed, *args, **kwargs):
    if gate is None:
        return 0
    return _forward_flops(stack, delta, gate) // len(stack) * (sum(needed[: len(stack)]) + len(stack) * needed[-1])


def _reference_backward(output_grads, entry_grads, stack, delta, gate, needed):
    inputs = (*stack, delta) if gate is None else (*stack, delta, gate)
    grads = differentiable_gradients(
        lambda *inputs: generalized_residual(inputs[: len(stack)], *inputs[len(stack) :]), inputs, output_grads
    )
    for i, entry_grad in enumerate(entry_grads):
        if needed[i]:
            grads[i] = grads[i] + entry_grad
    return [grad for grad, own in zip(grads, needed) if own]


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
