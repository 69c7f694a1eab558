"""Generalized residuals alone, and the share of the machine's copy bandwidth that they reach."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_dca.grn import ALL_GRN_FUNCTIONS, generalized_residual
from training.support.timing import interleave, seconds, spread


#: Queries, keys and values.
OUTPUTS = 3
#: Bytes of the tensor that is copied: more than any cache holds.
COPY_BYTES = 512 * 2**20
#: The name of the copy among the implementations.
COPY = "copy"
FLA = "fla.ops.attnres, one output"


def pass_bytes(entries: int, entry_bytes: int, outputs: int = OUTPUTS) -> dict[str, int]:
    """
    The bytes that a single pass over the stack reads and writes: the entries and the outputs in the forward pass, the
    entries, the gradients of the outputs and those of the entries in the backward pass. (Parameters are negligible.)
    """
    return {"forward": (entries + outputs) * entry_bytes, "backward": (2 * entries + outputs) * entry_bytes}


def bandwidth_shares(moved: int, times: list[float], copied: int, copy_times: list[float]) -> list[float]:
    """For each round, the bandwidth relative to that of a copy that reads and writes `copied` bytes in total."""
    return [(moved / time) / (copied / copy_time) for time, copy_time in zip(times, copy_times)]


class Operation:
    """
    The generalized residuals of the last block, for each implementation.

    Args:
        entries: the number of entries of the stack.
        shape: the shape of an entry, `(batch, sequence, hidden_size)`.
        dtype: the type of entries and parameters.
        device: the device of all tensors.
        copy_bytes: the size of the tensor that is copied; by default `COPY_BYTES`.
    """

    def __init__(
        self,
        entries: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        copy_bytes: int | None = None,
    ):
        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, device=device)).to(dtype).requires_grad_()

        self.device = device
        self.stack = [random(*shape) for _ in range(entries)]
        self.delta, self.gate = random(OUTPUTS, entries, shape[-1], std=0.02), random(OUTPUTS, shape[-1], std=0.02)
        self.output_grads = [torch.randn_like(self.stack[0]) for _ in range(OUTPUTS)]
        self.bytes = pass_bytes(entries, self.stack[0].nbytes)
        self.bytes_of_one_output = pass_bytes(entries, self.stack[0].nbytes, outputs=1)
        self.source = torch.ones((copy_bytes or COPY_BYTES) // 4, device=device)
        self.target = torch.zeros_like(self.source)

    def implementations(self, names: Sequence[str] | None = None) -> tuple[dict[str, Callable], list[str]]:
        """The implementations that run here (of `names`, if given), and a sentence for each that does not."""
        found = {name: ALL_GRN_FUNCTIONS[name] for name in ALL_GRN_FUNCTIONS.valid_keys()}
        found["eager, compiled"] = torch.compile(generalized_residual, fullgraph=True, dynamic=False)
        if self.device.type == "cuda":
            found[FLA] = self._attnres
        if names is not None:
            found = {name: implementation for name, implementation in found.items() if name in names}
        notes = []
        for name, implementation in tqdm(list(found.items()), desc="implementations", leave=False):
            try:
                self.backward(implementation)()
            except Exception as error:
                reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
                notes.append(f"{name!r} does not run here ({reason}).")
                del found[name]
        return found, notes

    def _attnres(self, stack: list[Tensor], delta: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        """
        Another operation on the same stack, for comparison: a mean with softmax weights over the depth. It has one output.
        """
        from fla.ops.attnres import fused_attnres

        return (fused_attnres(gate[0], stack, delta[0, 0].detach()),)

    def forward(self, implementation: Callable) -> Callable[[], Any]:
        """A forward pass, as in training, ready to be timed."""
        self._settle()
        return lambda: implementation(self.stack, self.delta, self.gate)

    def backward(self, implementation: Callable) -> Callable[[], Any]:
        """A backward pass, for all gradients, ready to be timed."""
        outputs = implementation(self.stack, self.delta, self.gate)
        inputs, grads = [*self.stack, self.delta, self.gate], self.output_grads[: len(outputs)]
        self._settle()
        return lambda: torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    def copy(self) -> Callable[[], Any]:
        """What the passes are compared with."""
        self._settle()
        return lambda: self.target.copy_(self.source)

    def _settle(self) -> None:
        """Flush the caches, and keep a GPU busy until everything to be timed is queued."""
        self.target.zero_()
        if self.device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles: about 10 ms


def measure_operation(
    operation: Operation, title: str, rounds: int, warmup: int, names: Sequence[str] | None = None
) -> tuple[dict, list[str]]:
    """
    Times and shares of the copy bandwidth of all implementations, or those of `names`, forward and backward.

    Returns:
        A dictionary for the file of results, and a sentence for each implementation that does not run here.
    """
    implementations, notes = operation.implementations(names)
    copied = 2 * operation.source.nbytes
    results = {"entries": len(operation.stack)}
    for direction in ("forward", "backward"):
        prepare = getattr(operation, direction)
        # Each of them prepares what is timed, outside of the measurement.
        works = {COPY: operation.copy, **{name: partial(prepare, each) for name, each in implementations.items()}}
        times = interleave(
            f"{title}, {direction}", works, lambda work: seconds(work(), operation.device), rounds, warmup
        )
        moved = operation.bytes[direction]
        others = {COPY: copied, FLA: operation.bytes_of_one_output[direction]}
        summary = {}
        for name, own in times.items():
            shares = bandwidth_shares(others.get(name, moved), own, copied, times[COPY])
            summary[name] = {"values": own, "median": median(own), **spread("share", shares)}
        results[direction] = {"unit": "seconds", "bytes": moved, "copied_bytes": copied, "implementations": summary}
    return results, notes
