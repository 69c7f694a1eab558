"""Measurements in rounds, so that other load on the machine affects all subjects alike."""

import ctypes
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm


#: The file that resets the peak of the process's resident memory, on Linux only.
PEAK_RESET = Path("/proc/self/clear_refs")

Subject = TypeVar("Subject")


def interleave(
    title: str,
    subjects: dict[str, Subject],
    meter: Callable[[Subject], float],
    rounds: int,
    warmup: int = 0,
) -> dict[str, list[float]]:
    """
    Measure each of `subjects` once in each round.

    Args:
        title: the text of the progress bar.
        subjects: what is measured, by name.
        meter: takes one measurement.
        rounds: the number of measured rounds.
        warmup: the number of warm-up rounds.

    Returns:
        The `rounds` values of each subject.
    """
    values = {name: [] for name in subjects}
    with tqdm(total=(warmup + rounds) * len(subjects), desc=title, leave=False) as bar:
        for number in range(-warmup, rounds):
            for name, subject in subjects.items():
                bar.set_postfix_str(name)
                value = meter(subject)
                if number >= 0:
                    values[name].append(value)
                bar.update()
    return values


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long `run` takes; on a GPU, until its stream has finished."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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


def summarize(values: dict[str, list[float]], baseline: str, speed: bool) -> dict[str, dict]:
    """
    Medians over the rounds, of the values and of their ratios to the baseline's of the same round.

    Args:
        values: those of each round, by name.
        baseline: the name that the others are compared with.
        speed: the values are times, and the ratio is that of speeds: above 1 is faster than the baseline. Otherwise
            it is that of the values: above 1 is more than the baseline.
    """
    summary = {}
    for name, own in values.items():
        pairs = zip(own, values[baseline])
        ratios = [base / value if speed else value / base for value, base in pairs]
        summary[name] = {"values": own, "median": median(own), **spread("ratio", ratios)}
    return summary


def spread(name: str, values: list[float]) -> dict[str, float | list[float]]:
    """The median of some values, called `name`, with the values and the least and greatest of them."""
    return {f"{name}s": values, name: median(values), "spread": [min(values), max(values)]}
