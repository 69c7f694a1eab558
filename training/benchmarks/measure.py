"""What a benchmark measures beside the time: compilation, bytes kept, peak memory."""

import ctypes
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.support.timing import seconds


#: The file that resets the peak of the process's resident memory, on Linux only.
PEAK_RESET = Path("/proc/self/clear_refs")


def compile_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How much longer than the second the first call of `run` takes, with nothing compiled and no cache on disk."""
    from torch._inductor.utils import fresh_cache  # takes a second to import

    torch._dynamo.reset()
    with fresh_cache():
        return seconds(run, device) - seconds(run, device)


def kept_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """
    The bytes that autograd keeps for the backward pass of `forward`, without those of `parameters`.

    Each storage counts once and whole, however many tensors share it. What a `torch.autograd.Function` keeps without
    `save_for_backward` is not counted.
    """
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # held until the end, so that no address is used twice
    del outputs
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """
    The peak memory of `run`, on top of what was in use before: that of the allocator on a GPU, and the resident memory of the
    process on the CPU (see `PEAK_RESET`).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Memory that is freed but not returned to the system could be reused without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    PEAK_RESET.write_text("5")  # sets the peak to the current size
    before = _resident_bytes("VmRSS")
    run()
    return max(1, _resident_bytes("VmHWM") - before)  # a small step may need no new pages


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)[1])
