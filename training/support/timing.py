"""Measurements in rounds, so that other load on the machine affects all subjects alike."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm


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
