"""Figures over the seeds of a variant, and of one run against another."""

import math
from typing import Any

import numpy as np
from scipy import stats


CONFIDENCE = 0.95

#: A spike is a logged training loss that lies further above the mean of those of the last `SPIKE_WINDOW` steps than
#: `SPIKE_DEVIATIONS` of their standard deviations; more within as many steps are the same. A run has diverged if its loss or
#: weights became NaN or infinite, or if the mean loss of its last `SPIKE_WINDOW` steps is more than `DIVERGENCE` nats above
#: the lowest one of as many steps before.
SPIKE_WINDOW, SPIKE_DEVIATIONS, DIVERGENCE = 200, 5.0, 0.2
#: Where losses are logged more rarely, a spike cannot be seen.
SPIKE_LOGGING_STEPS = 10


def steps_to_reach(held_out: list[list[float]], loss: float) -> float | None:
    """
    After how many steps the held-out loss first was no more than `loss`, with straight lines between the evaluations, or
    `None` if it never was.

    Args:
        held_out: steps and losses, one pair (or longer) for each evaluation, in order.
    """
    before = None
    for step, value, *_ in held_out:
        if value <= loss:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def censored_median(values: list[float]) -> float | None:
    """
    The median of values of which some are not known, only that they lie above all others (`inf`): a run that ended before
    it had got there. `None` where the median is one of these, or there are no values.
    """
    median = float(np.median(values)) if values else math.inf
    return median if math.isfinite(median) else None


def count_spikes(training: list[list[float]]) -> int:
    """How many spikes the logged training losses have, points of step and loss."""
    spikes, last = 0, -math.inf
    for step, loss in training:
        before = [other for at, other in training if step - SPIKE_WINDOW <= at < step]
        # In the first steps the loss falls fast, and there is little to compare with.
        if len(before) < SPIKE_WINDOW // SPIKE_LOGGING_STEPS:
            continue
        if loss > np.mean(before) + SPIKE_DEVIATIONS * np.std(before):
            spikes += step - last > SPIKE_WINDOW
            last = step
    return spikes


def has_diverged(training: list[list[float]]) -> bool:
    """Whether the loss ends far above where it was, see `DIVERGENCE`; `training` are points of step and loss."""
    if not training:
        return False
    steps, losses = np.array(training).T
    windows = [
        losses[(steps > end - SPIKE_WINDOW) & (steps <= end)].mean() for end in steps if end - SPIKE_WINDOW >= 0
    ]
    return bool(windows and windows[-1] > min(windows) + DIVERGENCE)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, and standard deviation over the seeds, which one seed has none of."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}


def difference(values: dict[int, float], baseline: dict[int, float]) -> dict[str, Any] | None:
    """
    The mean difference to the baseline's value of the same seed, and half the width of its confidence interval (Student's
    t), which one seed has none of.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    half = None
    if len(differences) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
        half = float(quantile * np.std(differences, ddof=1) / math.sqrt(len(differences)))
    return {"mean": float(np.mean(differences)), "half_width": half, "values": differences}


def summarize(runs: list[dict], baseline: str, metrics: list[str]) -> dict[str, dict]:
    """
    The figures of each variant of one group, over its seeds.

    Args:
        runs: what `read_member` made of them.
        baseline: the variant that the others are compared with, run of a seed by run of that seed.
        metrics: the held-out figures, by their keys in a run.
    """
    by_variant = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run
    reference = by_variant.get(baseline, {})
    # The baseline's own way to its final loss is measured as all others are.
    own = {seed: steps_to_reach(run["held_out"], run["eval_loss"]) for seed, run in reference.items()}
    summary = {}
    for variant, of_seed in by_variant.items():
        figures = {"seeds": list(of_seed)}
        for key in ("parameters", "steps", "examples", "seconds", "speed", *metrics):
            figures[key] = spread([run[key] for run in of_seed.values()])
        for key in metrics:
            figures[f"{key}_difference"] = difference(
                {seed: run[key] for seed, run in of_seed.items()}, {seed: run[key] for seed, run in reference.items()}
            )
        reached = {"steps": [], "seconds": [], "steps_ratio": [], "seconds_ratio": []}
        for seed in (seed for seed in of_seed if seed in reference):
            run, other = of_seed[seed], reference[seed]
            steps = steps_to_reach(run["held_out"], other["eval_loss"])
            steps = math.inf if steps is None else steps
            seconds = steps * run["seconds"] / run["steps"]
            reached["steps"].append(steps)
            reached["seconds"].append(seconds)
            reached["steps_ratio"].append(steps / own[seed])
            reached["seconds_ratio"].append(seconds / (own[seed] * other["seconds"] / other["steps"]))
        figures["reached"] = {key: censored_median(values) for key, values in reached.items()} | {
            "seeds": sum(map(math.isfinite, reached["steps"])),
            "of_seeds": len(reached["steps"]),
        }
        summary[variant] = figures
    return summary
