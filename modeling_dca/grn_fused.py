"""Implementations of generalized residuals from a pair of kernels, forward and backward."""

import hashlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autograd import (
    autograd_alone,
    backward_alone,
    differentiable_gradients,
    is_in_torch_dispatch_mode,
    transforms_are_active,
)
from .grn import check_inputs, find_implementation, generalized_residual, output_dtype
from .norm import rms_norm
from .sharding import is_sharded, on_shards
from .sums import MergedSum, take_sum


class FusedGeneralizedResidual:
    """
    An implementation of [`~grn.generalized_residual`] from two kernels, with the same call. A third kernel computes a block's
    residuals and norms in one operation ([`normalized`]).

    The two kernels become operators of `torch.library`, which `torch.compile` does not trace: its graph grows with the number
    of blocks, not of pairs of blocks. Only the stack is kept for the backward pass (instead of an entry that k-DCA has merged,
    its summands), and with norms their inputs. Shards of `DTensor`s are computed separately. Under other transforms than eager
    autograd (see [`~autograd.autograd_alone`]), the reference is used.

    Args:
        name (`str`): its name in `config.grn_implementation`.
        forward (callable): `forward(stack, delta, gate, norms=(), eps=0.0)` returns the outputs as one contiguous tensor
            `(outputs, ..., d)`, in the type of `output_dtype(stack)`; with `norms`, a weight `(d,)` of that type for each
            output, `(2 * outputs, ..., d)`: first the outputs after [`~norm.rms_norm`], then without it.
        backward (callable): `backward(output_grads, entry_grads, stack, delta, gate, needed)` returns the gradients of
            the entries, each plus its element of `entry_grads` if there are any, of `delta` and, if given, of `gate`:
            only those for which the list `needed`, in this order, is `True`.
        norm_backward (callable): `norm_backward(outputs, first_grad, grads, norms, eps)` returns the gradients of the
            outputs, and those of the norms' weights, for `grads` of the normalised outputs and, if given, `first_grad` of
            the first output before its norm.
        obstacle (callable): `obstacle(device)` returns the reason why the kernels cannot run there, or `None`.

    Attributes:
        operators (tuple of two `torch._ops.OpOverload`): forward and backward, for policies of selective activation
            checkpointing.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor],
        backward: Callable[
            [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None, Sequence[bool]], list[Tensor]
        ],
        norm_backward: Callable[
            [Sequence[Tensor], Tensor | None, Sequence[Tensor], Sequence[Tensor], float],
            tuple[Sequence[Tensor], Sequence[Tensor]],
        ],
        obstacle: Callable[[torch.device], str | None],
    ):
        self.name = name
        self.obstacle = obstacle
        self.kernels = forward, backward
        self.norm_backward = norm_backward
        self.operators = _define_operators(name, forward, backward)

    def __reduce__(self):
        return find_implementation, (self.name, torch.device("cpu"))  # of a name, the device decides nothing

    def forward_and_backward(self) -> tuple[Callable, Callable]:
        """The functions to call: the operators only if needed, as calling one takes as long as a kernel for one token."""
        seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return self.operators if seen else self.kernels

    def __call__(self, stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None = None) -> tuple[Tensor, ...]:
        """See [`~grn.generalized_residual`]."""
        return self.chained(stack, delta, gate)[0]

    def chained(
        self, stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """
        Returns the outputs, and the stack for the next block. The gradient of an entry then passes from its last user through
        all others, and each adds its own while it reads the entry; without this chain, autograd would have to write and sum
        a gradient for each user.

        Raises:
            `ValueError`: the kernels cannot run on the device of the stack, or the shapes do not match.
        """
        check_inputs(stack, delta, gate)
        self.check_device(stack[0].device)
        if is_sharded(stack):
            return on_shards(self.chained, stack, delta, gate)
        compiling = torch.compiler.is_compiling() and not transforms_are_active()
        if not (compiling or autograd_alone(*stack, delta, gate)):
            return generalized_residual(stack, delta, gate), tuple(stack)
        if _needs_gradients(*stack, delta, gate):
            if gate is None and not delta.requires_grad:
                # Only here the backward pass needs no entry, so that entries may be changed in place.
                return generalized_residual(stack, delta), tuple(stack)
            merged = take_sum(stack)
            return _split(stack, len(delta), _Chained.apply(self, 0.0, 0, merged, delta, gate, *stack), merged)
        forward, _ = self.forward_and_backward()
        return _separate(forward(stack, delta, gate)), tuple(stack)

    def normalized(
        self, stack: Sequence[Tensor], delta: Tensor, gate: Tensor | None, norms: Sequence[Tensor], eps: float
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """
        As `chained`, but also normalises the outputs without reading them again: returns the first output, then all outputs
        after [`~norm.rms_norm`] with their weights `norms`, and the stack.
        """
        if is_sharded(stack):
            return on_shards(
                lambda stack, delta, gate, *norms: self.normalized(stack, delta, gate, norms, eps),
                stack,
                delta,
                gate,
                *norms,
            )
        dtype = output_dtype(stack)
        if (
            (gate is None and not delta.requires_grad)
            or is_in_torch_dispatch_mode()
            or not autograd_alone(*stack, delta, gate, *norms)
            or dtype == torch.float64  # which the norm leaves for float32
            or any(norm.dtype != dtype for norm in norms)
        ):
            outputs, stack = self.chained(stack, delta, gate)
            return (outputs[0], *map(rms_norm, outputs, norms, itertools.repeat(eps))), stack
        check_inputs(stack, delta, gate)
        self.check_device(stack[0].device)
        outputs = len(delta)
        if _needs_gradients(*stack, delta, gate, *norms):
            merged = take_sum(stack)
            results = _Chained.apply(self, eps, outputs, merged, delta, gate, *norms, *stack)
            return _split(stack, 1 + outputs, results, merged)
        forward, _ = self.kernels
        results = _separate(forward(stack, delta, gate, norms, eps))
        return (results[outputs], *results[:outputs]), tuple(stack)

    def check_device(self, device: torch.device) -> None:
        if obstacle := self.obstacle(device):
            raise ValueError(
                f'The implementation {self.name!r} cannot run: {obstacle}; "auto" uses the best one that can.'
            )


class _Chained(torch.autograd.Function):
    """The outputs, with `num_norms` the first one and all of them normalised, and the entries that need a gradient."""

    @staticmethod
    def forward(ctx, implementation, eps, num_norms, merged, delta, gate, *norms_and_stack):
        ctx.implementation, ctx.eps, ctx.num_norms = implementation, eps, num_norms
        norms, stack = norms_and_stack[:num_norms], norms_and_stack[num_norms:]
        forward, _ = implementation.forward_and_backward()
        if norms:
            results = _separate(forward(stack, delta, gate, norms, eps))
            normalized, outputs = results[:num_norms], results[num_norms:]
            results = outputs[0], *normalized
        else:
            outputs, results = (), _separate(forward(stack, delta, gate))
        # Instead of the merged entry (the second), its summands are kept, which later blocks keep, too.
        kept, ctx.num_summands, ctx.merged = stack, 0, None
        if merged is not None:
            kept, ctx.num_summands = (stack[0], *merged.entries, *stack[2:]), len(merged.entries)
            ctx.merged = merged._replace(entries=())
        ctx.save_for_backward(delta, gate, *norms, *outputs, *kept)
        ctx.set_materialize_grads(False)
        later = [entry for entry, own in zip(stack, ctx.needs_input_grad[6 + num_norms :]) if own]
        if not torch.compiler.is_compiling():
            # A detached entry is not a view for autograd, but shares its version counter: changing it in place is an error in
            # the backward pass only, as with the reference.
            later = [entry.detach() for entry in later]
        return *results, *later

    @staticmethod
    def backward(ctx, *grads):
        delta, gate, *saved = ctx.saved_tensors
        num_norms = ctx.num_norms
        norms, outputs, stack = saved[:num_norms], saved[num_norms : 2 * num_norms], saved[2 * num_norms :]
        if ctx.merged is not None:
            summands, later = stack[1 : 1 + ctx.num_summands], stack[1 + ctx.num_summands :]
            stack = [stack[0], ctx.merged.again(summands), *later]
        of_parameters = ctx.needs_input_grad[4:6]
        of_entries = ctx.needs_input_grad[6 + num_norms :]
        num_results = 1 + num_norms if norms else len(delta)
        later = iter(grads[num_results:])
        entry_grads = [next(later) if own else None for own in of_entries]
        if all(grad is None for grad in grads[:num_results]):
            return None, None, None, None, None, None, *[None] * num_norms, *entry_grads
        dtype = output_dtype(stack)
        result_grads = [_or_zeros(grad, stack[0], dtype) for grad in grads[:num_results]]
        if any(grad is not None for grad in entry_grads):
            # (For an entry that needs no gradient, any tensor will do.)
            entry_grads = [
                _or_zeros(grad, entry, entry.dtype) if own else entry
                for grad, entry, own in zip(entry_grads, stack, of_entries)
            ]
        else:
            entry_grads = []
        needed = [*of_entries, *of_parameters]
        if gate is None:
            needed.pop()
        norm_grads = [None] * num_norms
        if torch.compiler.is_compiling() or backward_alone(*result_grads, *entry_grads):
            _, backward = ctx.implementation.forward_and_backward()
            if norms:
                result_grads, norm_grads = ctx.implementation.norm_backward(
                    outputs, grads[0], result_grads[1:], norms, ctx.eps
                )
            results = backward(result_grads, entry_grads, stack, delta, gate, needed) if any(needed) else []
        else:
            # A gradient that will be differentiated again, or under other transforms, is that of the reference.
            results, norm_grads = _reference_backward(
                result_grads, entry_grads, stack, delta, gate, needed, norms, ctx.eps
            )
        results = iter(results)
        results = [next(results) if own else None for own in needed]
        gate_grad = None if gate is None else results[-1]
        return None, None, None, None, results[len(stack)], gate_grad, *norm_grads, *results[: len(stack)]


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _split(
    stack: Sequence[Tensor], num_results: int, results: Sequence[Tensor], merged: MergedSum | None
) -> tuple[tuple[Tensor, ...], ...]:
    """Splits what the autograd function returns into the results, and the stack with the entries that it replaces."""
    later = iter(results[num_results:])
    stack = tuple(next(later) if entry.requires_grad else entry for entry in stack)
    if merged is not None:
        stack[1]._merged_sum = merged  # for `push`
    return results[:num_results], stack


def _separate(outputs: Tensor) -> tuple[Tensor, ...]:
    """As `unbind`, but the results are not views for autograd, so that they may be changed in place."""
    return outputs.flatten(0, 1).unsafe_chunk(len(outputs))


def _or_zeros(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad


def _define_operators(name: str, forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    # The code of a checkpoint is another module with its own operators. Their names depend on the code, not on its path or on
    # when it was loaded, so that a saved program finds them in another process.
    functions = (forward, backward, FusedGeneralizedResidual, generalized_residual, rms_norm)
    modules = dict.fromkeys(function.__module__ for function in functions)
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
        return module  # an application that is packaged without its sources, or a notebook


def _fake_forward(stack, delta, gate):
    return stack[0].new_empty((delta.shape[0], *stack[0].shape), dtype=output_dtype(stack))


def _fake_backward(output_grads, entry_grads, stack, delta, gate, needed):
    return [tensor.new_empty(tensor.shape) for tensor, own in zip((*stack, delta, gate), needed) if own]


def _forward_flops(stack, delta, gate, *args, **kwargs):
    """The FLOPs of the reference's matrix products, which PyTorch's counter counts."""
    return 0 if gate is None else 2 * len(stack) * math.prod(stack[0]) * delta[0]


def _backward_flops(output_grads, entry_grads, stack, delta, gate, needed, *args, **kwargs):
    if gate is None:
        return 0
    return _forward_flops(stack, delta, gate) // len(stack) * (sum(needed[: len(stack)]) + len(stack) * needed[-1])


def _reference_backward(output_grads, entry_grads, stack, delta, gate, needed, norms=(), eps=0.0):
    """Returns the same as the kernel, and the gradients of the norms' weights."""
    inputs = (*stack, delta, *norms) if gate is None else (*stack, delta, gate, *norms)

    def reference(*inputs):
        outputs = generalized_residual(inputs[: len(stack)], *inputs[len(stack) : len(inputs) - len(norms)])
        if norms:
            outputs = outputs[0], *map(rms_norm, outputs, inputs[-len(norms) :], itertools.repeat(eps))
        return outputs

    grads = differentiable_gradients(reference, inputs, output_grads)
    for i, entry_grad in enumerate(entry_grads):
        if needed[i]:
            grads[i] = grads[i] + entry_grad
    return [grad for grad, own in zip(grads, needed) if own], grads[len(needed) :]
