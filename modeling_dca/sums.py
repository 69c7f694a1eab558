"""
The merged entry of k-DCA in the backward pass. At each block it is a new tensor, but it is the sum of outputs that are kept
anyway: these are kept instead, and summed again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .autograd import autograd_alone, is_in_torch_dispatch_mode


# When a sum is computed, every `EVERY`-th partial sum is cached for earlier blocks, and as many of the last ones: so each is
# computed at most twice, and not once for every later block.
EVERY = 8

# Devices whose tensors have storage to attach a note to. (XLA's have none.)
DEVICES = ("cpu", "cuda")

# Private to torch. Without it, the merged entry is kept.
hooks_on_what_is_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class SumsMade(dict):
    """Cached partial sums, by their number of summands; each adds one summand to the previous one."""

    most = 1  # the number of summands of the last one


class MergedSum(NamedTuple):
    """
    The summands of a merged entry.

    Args:
        entries (tuple of `torch.Tensor`): the summands, in the order in which [`~grn.push`] adds them.
        dtype (`torch.dtype`): the type that the sum is cast to before a summand is added.
        made (`SumsMade`): the cache that all merged entries of a model share.
        of (tuple): identifies the state of the tensor, to detect changes.
    """

    entries: tuple[Tensor, ...]
    dtype: torch.dtype
    made: SumsMade
    of: tuple

    def again(self, entries: Sequence[Tensor]) -> Tensor:
        """The sum of the summands that autograd has kept, identical to the last bit."""
        count = len(entries)
        # (Sums that may be differentiated again belong to a single graph.)
        made = {} if torch.is_grad_enabled() else self.made
        for number in [number for number in made if number > count]:
            del made[number]  # the backward pass does not need them any more
        start = max(made, default=1)
        total = made.get(start, entries[0])
        for number in range(start + 1, count + 1):
            total = total.to(self.dtype) + entries[number - 1]
            if number % EVERY == 0 or count - number < EVERY:
                made[number] = total
        return total


def _state(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor._version


def _take_note(entry: Tensor) -> MergedSum | None:
    # The note is on the storage, as wrappers of modules, such as FSDP, pass on other tensors with the same storage. It is
    # removed when it is read, so that a longer reference to the entry does not keep its summands.
    note = entry.untyped_storage().__dict__.pop("_merged_sum", None)
    return note if note is not None and note.of == _state(entry) else None


def _in_eager_autograd(*tensors: Tensor) -> bool:
    on_device = all(tensor.device.type in DEVICES for tensor in tensors)
    return on_device and torch.is_grad_enabled() and autograd_alone(*tensors) and not is_in_torch_dispatch_mode()


def note_sum(
    total: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype, before: MergedSum | None = None
) -> None:
    """Notes that `total` is `first.to(dtype) + second`, under plain eager autograd; `first` may be the sum `before`."""
    if _in_eager_autograd(total, first, second) and second.requires_grad and first.device == total.device:
        before = before or getattr(first, "_merged_sum", None)
        if before is None or before.of != _state(first):
            before = MergedSum((first,), dtype, SumsMade(), ())
        entries = (*before.entries, second)
        # (Another sum may already continue the same one.)
        made = before.made if before.made.most == len(before.entries) else SumsMade()
        made.most = len(entries)
        total.untyped_storage()._merged_sum = MergedSum(entries, dtype, made, _state(total))


def take_sum(stack: Sequence[Tensor]) -> MergedSum | None:
    """
    The summands of the second entry of a stack, if they should be kept instead of it: not within activation checkpointing,
    which keeps nothing for long, and not if kept tensors are copied (`save_on_cpu`), as the summands would be copied for every
    block.
    """
    if hooks_on_what_is_saved is None or len(stack) < 3 or not _in_eager_autograd(stack[1]):
        return None
    note, hooks = _take_note(stack[1]), hooks_on_what_is_saved(True)
    return None if hooks is not None and str(getattr(hooks[0], "__module__", "")).startswith("torch.") else note


def checkpoint_stack(function: Callable, *stack: Tensor, **options) -> tuple[Tensor, ...] | Tensor:
    """`torch.utils.checkpoint.checkpoint(function, *stack)` that keeps the summands of a merged entry instead of it."""
    total = take_sum(stack)
    if total is None:
        results = checkpoint(function, *stack, **options)
    else:
        count, at_first, total_alone = len(total.entries), [stack[1]], total._replace(entries=())

        def run(start, *rest):
            if at_first:
                merged = at_first.pop()
            else:
                with torch.no_grad():
                    merged = total_alone.again(rest[:count]).detach().requires_grad_()
            return function(start, merged, *rest[count:])

        results = checkpoint(run, stack[0], *(entry.detach() for entry in total.entries), *stack[2:], **options)
    if isinstance(results, tuple) and len(results) == len(stack) > 2 and _in_eager_autograd(*results):
        # Within the block the entry was the sum of two. (Unless a hook has changed it, or them.)
        note = _take_note(results[1])
        if note is not None and [entry.data_ptr() for entry in note.entries] == [
            entry.data_ptr() for entry in stack[1:3]
        ]:
            note_sum(results[1], stack[1], stack[2], note.dtype, total)
    return results


def without_sums(keep: Callable) -> Callable:
    """
    Changes a function of activation checkpointing, which keeps the inputs of blocks, to keep no merged entries. Selective and
    reentrant checkpointing, and other functions, are returned unchanged.
    """
    options = getattr(keep, "keywords", {})
    if getattr(keep, "func", None) is not checkpoint or options.get("use_reentrant") is not False:
        return keep
    return keep if "context_fn" in options else functools.partial(checkpoint_stack, **options)
