"""How sure differences are, against figures that are computed by hand or known."""

import math

import numpy as np
import pytest
from scipy import stats

from training.studies.differences import differences, over_documents


def runs_of(variant, losses, **others):
    return [
        {"variant": variant, "seed": seed, "eval_loss": loss, **others} for seed, loss in enumerate(losses, start=1)
    ]


def test_pooled_interval_of_two_cells():
    runs = [*runs_of("a", [1.0, 2.0, 3.0]), *runs_of("b", [0.5, 1.7, 2.4]), *runs_of("c", [1.1, 2.2])]
    b, c = differences({None: runs}, "a", "eval_loss")
    # b is -0.5, -0.3 and -0.6 away, c 0.1 and 0.2: variances 0.0233 (2 degrees of freedom) and 0.005 (1).
    variance = (2 * np.var([-0.5, -0.3, -0.6], ddof=1) + np.var([0.1, 0.2], ddof=1)) / 3
    for cell, mean, seeds in ((b, -1.4 / 3, 3), (c, 0.15, 2)):
        assert cell["seeds"] == seeds and cell["mean"] == pytest.approx(mean)
        error = math.sqrt(variance / seeds)
        assert cell["pooled_half_width"] == pytest.approx(stats.t.ppf(0.975, 3) * error)
        assert cell["p"] == pytest.approx(2 * stats.t.cdf(-abs(mean) / error, 3))
    assert b["half_width"] == pytest.approx(stats.t.ppf(0.975, 2) * np.std([-0.5, -0.3, -0.6], ddof=1) / math.sqrt(3))


def test_one_cell_has_the_plain_interval():
    (cell,) = differences({None: [*runs_of("a", [1.0, 2.0]), *runs_of("b", [1.1, 2.3])]}, "a", "eval_loss")
    assert cell["pooled_half_width"] == pytest.approx(cell["half_width"])
    assert cell["p"] == pytest.approx(stats.ttest_rel([1.1, 2.3], [1.0, 2.0]).pvalue)


def test_seeds_that_the_baseline_lacks_do_not_count():
    runs = [*runs_of("a", [1.0, 2.0]), *runs_of("b", [1.1, 2.3, 9.0])]
    (cell,) = differences({None: runs}, "a", "eval_loss")
    assert cell["seeds"] == 2 and cell["mean"] == pytest.approx(0.2)


def test_one_seed_has_no_interval():
    (cell,) = differences({None: [*runs_of("a", [1.0]), *runs_of("b", [1.1])]}, "a", "eval_loss")
    assert cell["mean"] == pytest.approx(0.1)
    assert [cell[key] for key in ("half_width", "pooled_half_width", "p", "is_discovery")] == [None] * 4


def test_discoveries_are_those_of_benjamini_and_hochberg():
    # Ten groups whose differences are noise, and two where they are not; of the noise one is below 0.05 by itself.
    generator = np.random.default_rng(3)
    groups = {}
    for index in range(12):
        apart = generator.normal(scale=0.01, size=5) + (0.1 if index < 2 else 0)
        groups[index] = [*runs_of("a", [1.0] * 5), *runs_of("b", 1 + apart)]
    cells = differences(groups, "a", "eval_loss")
    order = sorted(cells, key=lambda cell: cell["p"])
    # Those up to the last whose p is at most its rank times 0.05 / 12.
    last = max((rank for rank, cell in enumerate(order, start=1) if cell["p"] <= rank * 0.05 / 12), default=0)
    assert [cell["group"] for cell in order if cell["is_discovery"]] == [cell["group"] for cell in order[:last]]
    assert last >= 2 and not all(cell["is_discovery"] for cell in cells)


def test_interval_over_documents_is_of_the_difference_by_token():
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 1000, size=40)
    apart = generator.normal(-0.05, 0.02, size=40)

    def run(seed, shift):
        documents = {str(i): [int(tokens[i]), 2 + shift * float(apart[i])] for i in range(40)}
        return {"variant": "ab"[bool(shift)], "seed": seed, "eval_loss": 2.0, "documents": documents}

    low, high = over_documents([(run(1, 1), run(1, 0)), (run(2, 3), run(2, 0))])
    mean = 2 * (apart * tokens).sum() / tokens.sum()
    assert low < mean < high
    # About two standard errors of a weighted mean on each side.
    error = 2 * np.sqrt(((tokens * (apart - mean / 2)) ** 2).sum()) / tokens.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize("documents", [None, {}, {"one": [5, 1.0]}])
def test_no_interval_over_documents_where_there_are_none_or_one(documents):
    run = {"eval_loss": 1.0, **({} if documents is None else {"documents": documents})}
    assert over_documents([(run, run)]) is None
