"""How sure the differences of a study are: over seeds, over documents, and as one of many."""

import math
from typing import Any

import numpy as np
from scipy import stats

from training.studies.statistics import CONFIDENCE, difference


#: The share of false ones that is borne among the differences that are called real (Benjamini and Hochberg, 1995).
FALSE_DISCOVERY_RATE = 0.05


def differences(groups: dict[str | None, list[dict[str, Any]]], baseline: str, key: str) -> list[dict[str, Any]]:
    """
    The differences of all variants of all groups to the baseline of their group, run by run of the same seed.

    The pooled interval takes the variance of the differences to be the same in all cells of the study: with `s_i` their
    standard deviation over the `n_i` seeds of a cell, `s^2 = sum (n_i - 1) s_i^2 / sum (n_i - 1)`, and Student's t with as many
    degrees of freedom as the last sum. Two or three seeds of one cell say little of its own variance. The p-values are of the same
    statistic.

    Args:
        groups: the runs of each group, as `read_member` made them.
        key: the figure that is compared.

    Returns:
        For each variant of each group that has seeds in common with the baseline: `group`, `variant`, `seeds` (how many),
        `mean`, `half_width` (of the plain interval), `pooled_half_width`, `p`, `is_discovery` (`None`, all four, where there is
        one seed alone), and `documents`, the interval over documents (or `None`).
    """
    cells = []
    for group, runs in groups.items():
        reference = {run["seed"]: run for run in runs if run["variant"] == baseline}
        for variant in dict.fromkeys(run["variant"] for run in runs if run["variant"] != baseline):
            own = {run["seed"]: run for run in runs if run["variant"] == variant and run["seed"] in reference}
            apart = difference(*({seed: run[key] for seed, run in each.items()} for each in (own, reference)))
            if apart is not None:
                pairs = [(run, reference[seed]) for seed, run in own.items()]
                cells.append({"group": group, "variant": variant, "documents": over_documents(pairs), **apart})
    freedom = sum(len(cell["values"]) - 1 for cell in cells)
    squares = sum(np.var(cell["values"]) * len(cell["values"]) for cell in cells)
    for cell in cells:
        values = cell.pop("values")
        cell |= {"seeds": len(values), "pooled_half_width": None, "p": None, "is_discovery": None}
        if freedom and squares:
            error = math.sqrt(squares / freedom / len(values))
            cell["pooled_half_width"] = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * error)
            cell["p"] = float(2 * stats.t.sf(abs(cell["mean"]) / error, freedom))
    if freedom and squares:
        for cell, adjusted in zip(cells, stats.false_discovery_control([cell["p"] for cell in cells], method="bh")):
            cell["is_discovery"] = bool(adjusted <= FALSE_DISCOVERY_RATE)
    return cells


def over_documents(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[float] | None:
    """
    The confidence interval of a difference of losses over the held-out documents, with the seeds as they are: a bootstrap of
    documents (BCa) of the difference by token. It tells what other documents would have changed, and nothing of other seeds.

    Args:
        pairs: runs with `documents`, how many tokens each has and their mean loss, and those that they are compared with.
    """
    if not all(run.get("documents") for pair in pairs for run in pair):
        return None
    names = list(pairs[0][0]["documents"])
    tokens = np.array([pairs[0][0]["documents"][name][0] for name in names])
    apart = np.mean(
        [[run["documents"][name][1] - other["documents"][name][1] for name in names] for run, other in pairs], axis=0
    )
    if len(names) < 2 or not apart.any():
        return None

    def by_token(apart, tokens, axis=-1):
        return (apart * tokens).sum(axis) / tokens.sum(axis)

    found = stats.bootstrap(
        (apart, tokens), by_token, paired=True, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
    ).confidence_interval
    return [float(found.low), float(found.high)]
