"""What a variant gains on the baseline at equal tokens, time and parameters, and what it saves at equal loss."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.studies.statistics import censored_median, difference, steps_to_reach


#: By their keys in `comparison.json`, how a table calls them.
GAINS = {
    "at_equal_tokens": "at equal tokens",
    "at_equal_time": "at equal time",
    "at_equal_parameters": "at equal parameters",
}


def loss_after(run: dict[str, Any], seconds: float) -> float | None:
    """
    The held-out loss of a run when it had trained so long, with straight lines between the evaluations; `None` before
    the first.

    Args:
        run: as `read_member` read it, with `held_out`, `seconds` and `steps`.
    """
    steps, losses = zip(*((step, loss) for step, loss, *_ in run["held_out"]))
    reached = seconds * run["steps"] / run["seconds"]
    return None if reached < steps[0] * (1 - 1e-9) else float(np.interp(reached, steps, losses))


def loss_at_size(runs: Sequence[dict[str, Any]], parameters: int) -> float | None:
    """
    The final held-out loss that a model of so many parameters would have, by those of other sizes, with straight lines
    between them over the logarithm of the parameters; `None` beyond the least and the largest.
    """
    sizes, losses = zip(*sorted((run["parameters"], run["eval_loss"]) for run in runs))
    if not sizes[0] <= parameters <= sizes[-1]:
        return None
    return float(np.interp(np.log(parameters), np.log(sizes), losses))


def gains(runs: Sequence[dict[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """
    What the variants of one group gain on the baseline; where that is known of no seed, `None`.

    Args:
        runs: what `read_member` made of them. Those of the baseline's scheme are the baseline at other sizes.
        baseline: the variant that the others are compared with, run of a seed by run of that seed.

    Returns:
        For each variant, if there is the baseline, `parameters`, `step_time` (as a multiple of the baseline's, in the
        mean), and the differences of `GAINS`.
    """
    reference = {run["seed"]: run for run in runs if run["variant"] == baseline}
    if not reference:
        return {}
    schemes = {run["scheme"] for run in reference.values()}
    sizes = {seed: [run for run in runs if run["seed"] == seed and run["scheme"] in schemes] for seed in reference}
    found = {}
    for variant in dict.fromkeys(run["variant"] for run in sorted(runs, key=lambda run: run["variant"] != baseline)):
        own = {run["seed"]: run for run in runs if run["variant"] == variant and run["seed"] in reference}
        pairs = {key: [] for key in GAINS}
        for seed, run in own.items():
            other = reference[seed]
            seconds = min(run["seconds"], other["seconds"])
            pairs["at_equal_tokens"].append((seed, run["eval_loss"], other["eval_loss"]))
            pairs["at_equal_time"].append((seed, loss_after(run, seconds), loss_after(other, seconds)))
            at_size = loss_at_size(sizes[seed], run["parameters"])
            pairs["at_equal_parameters"].append((seed, run["eval_loss"], at_size))
        differences = {}
        for key, values in pairs.items():
            known = [each for each in values if None not in each]
            differences[key] = difference({seed: a for seed, a, _ in known}, {seed: b for seed, _, b in known})
        every = [run for run in runs if run["variant"] == variant]
        times = [run["seconds"] / run["steps"] for run in every]
        unit = [run["seconds"] / run["steps"] for run in reference.values()]
        found[variant] = {
            "parameters": every[0]["parameters"],
            "step_time": float(np.mean(times) / np.mean(unit)),
            **differences,
        }
    return found


def savings(runs: Sequence[dict[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """
    In what part of the baseline's steps and time a residual scheme reaches the baseline's final loss, by complete runs of the scheme with
    different numbers of steps: each has cooled down, which a run that is still going has not. Between them, the loss is interpolated
    over the logarithm of the steps.

    Args:
        runs: what `read_member` made of those of one group.
        baseline: the variant that the others are compared with, seed by seed.

    Returns:
        For each scheme with runs of more than one length, `steps` and `time`, the medians over the seeds of the ratios to the
        baseline (`None` where it takes more steps than the runs had), and their `values` by seed, as pairs.
    """
    reference = {run["seed"]: run for run in runs if run["variant"] == baseline}
    of_schemes = {}
    for run in runs:
        if run["variant"] != baseline and run["seed"] in reference:
            of_schemes.setdefault(run["scheme"], {}).setdefault(run["seed"], []).append(run)
    found = {}
    for scheme, of_seed in of_schemes.items():
        if len({run["steps"] for own in of_seed.values() for run in own}) < 2:
            continue
        values = {}
        for seed, own in of_seed.items():
            other = reference[seed]
            points = sorted([math.log(run["steps"]), run["eval_loss"]] for run in own)
            steps = steps_to_reach(points, other["eval_loss"])
            part = None if steps is None else math.exp(steps) / other["steps"]
            pace = float(np.mean([run["seconds"] / run["steps"] for run in own]) * other["steps"] / other["seconds"])
            values[seed] = (part, part and part * pace)
        steps, time = (
            censored_median([math.inf if value is None else value for value in each]) for each in zip(*values.values())
        )
        found[scheme] = {"steps": steps, "time": time, "values": values}
    return found
