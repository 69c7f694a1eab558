"""The low-rank study: formulas against brute force, networks of the library's own residuals, and the page."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from modeling_dca.grn import GeneralizedResidual, generalized_residual
from tests.training.tiny import call, failure, snapshot
from training import low_rank as command
from training.studies import linear_networks, low_rank


SMALL = {"width": 24, "layers": 4, "rank": 2}
KINDS = ("positive", "indefinite", "diagonal", "normal", "rotation")


def network(scheme: str, seed: int = 0) -> linear_networks.LowRankNetwork:
    return linear_networks.LowRankNetwork(scheme, torch.Generator().manual_seed(seed), scale=0.3, **SMALL)


@pytest.mark.parametrize("scheme", linear_networks.SCHEMES)
def test_networks_are_generalized_residuals_of_low_rank_layers(scheme):
    model, inputs = network(scheme), torch.randn(5, SMALL["width"], dtype=torch.float64)
    residuals = [module for module in model.modules() if isinstance(module, GeneralizedResidual)]
    assert len(residuals) == SMALL["layers"] + 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # not those of the start, which make all schemes equal
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    stack = [inputs]
    for residual, layer in zip(residuals, [*model.layers, None]):
        if scheme == "standard":
            assert residual.delta is None
            hidden = sum(stack)
        else:
            assert residual.delta.shape[2] == (1 if scheme == "grn_v1" else SMALL["width"])
            assert (residual.gate is not None) == (scheme == "grn_v3")
            hidden = generalized_residual(stack, residual.delta, residual.gate)[0]
        if layer is not None:
            down, up = layer
            assert torch.linalg.matrix_rank(up.weight @ down.weight) == SMALL["rank"]
            stack.append(hidden @ (up.weight @ down.weight).T + up.bias)
    torch.testing.assert_close(model(inputs), hidden)


def test_all_schemes_start_alike_and_i_i_d_normal():
    inputs = torch.randn(5, SMALL["width"], dtype=torch.float64)
    first, *others = [network(scheme)(inputs).detach() for scheme in linear_networks.SCHEMES]
    for other in others:
        torch.testing.assert_close(first, other)
    assert all(not layer[1].bias.any() for layer in network("standard").layers)
    weights = torch.cat([p.flatten() for name, p in network("standard").named_parameters() if "weight" in name])
    weights = weights.detach()
    assert weights.std() == pytest.approx(0.3, rel=0.1)
    assert weights.mean() == pytest.approx(0, abs=0.05)


def test_training_is_deterministic_and_pairs_the_networks():
    first, again = (linear_networks.train("grn_v1", "random", 3, steps=5, **SMALL) for _ in range(2))
    assert first == again
    standard = linear_networks.train("standard", "random", 3, steps=5, **SMALL)
    assert standard["curve"][0] == pytest.approx(first["curve"][0])
    assert standard["curve"][4] != pytest.approx(first["curve"][4])
    assert linear_networks.train("grn_v1", "random", 4, steps=5, **SMALL)["curve"][0] != first["curve"][0]
    matrix, offset = linear_networks.make_task("random", 3, 50)
    assert matrix.std() == pytest.approx(1, rel=0.1) and offset.std() == pytest.approx(1, rel=0.3)


def test_loss_is_the_distance_to_the_task(monkeypatch):
    # Layers of zeros are the identity, and have no gradient but that of their biases, which this rate does not move.
    result = linear_networks.train("standard", "random", 0, scale=0.0, rate=1e-12, steps=2, **SMALL)
    matrix, offset = linear_networks.make_task("random", 0, SMALL["width"])
    expected = ((matrix - torch.eye(SMALL["width"])).square().sum() + offset.square().sum()) / SMALL["width"]
    assert result["loss"] == pytest.approx(expected.item(), rel=0.03)


def test_steps_are_clipped_and_the_learning_rate_falls_to_zero(monkeypatch):
    norms, rates = [], []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        (group,) = self.param_groups
        norms.append(math.sqrt(sum(each.grad.square().sum().item() for each in group["params"])))
        rates.append(group["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    linear_networks.train("grn_v3", "identity", 0, rate=0.5, steps=4, **SMALL)
    assert norms[0] == pytest.approx(1, rel=1e-4)
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_divergence_is_no_number():
    result = linear_networks.train("grn_v3", "identity", 0, scale=3.0, rate=100.0, steps=12, **SMALL)
    assert result["loss"] is None and len(result["curve"]) == 12
    assert result["curve"][0] > 0 and result["curve"][-1] is None
    assert (
        linear_networks.orders_below(1e-3, 1e2) == pytest.approx(5)
        and linear_networks.orders_below(None, 1.0) == -math.inf
    )
    assert low_rank.spread([1.0, None, 100.0]) == "1.0e+01 (1.0e+00 to 1.0e+02), 1 of 3 diverged"


def test_grn_v1_ends_six_orders_below_the_residual_network():
    # Narrower and shorter than figure 1, of the same depth and rank.
    standard, grn = (
        linear_networks.train(name, "identity", 0, steps=250, width=40) for name in ("standard", "grn_v1")
    )
    assert grn["loss"] < 1e-6 * standard["loss"]
    assert grn["curve"][-1] < 1e-5 and standard["curve"][-1] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_formulas_agree_with_brute_force(kind):
    width, rank = 6, 2
    difference = linear_networks.make_difference(kind, width, 0.3, seed=1)
    identity = np.eye(width)

    def best(shape: int, start_seed: int) -> float:
        """Minimize over all factors, and over what is added to the diagonal, by a quasi-Newton method."""

        def risk(x):
            x, left, right = np.split(x, [shape, shape + width * rank])
            diagonal = np.broadcast_to(x if shape else 0.0, width)
            left, right = left.reshape(width, rank), right.reshape(rank, width)
            error = difference - np.diag(diagonal) - left @ right
            slope = -2 * np.diag(error)
            slope = {0: slope[:0], 1: slope.sum(keepdims=True), width: slope}[shape]
            return (error**2).sum(), np.concatenate(
                [slope, (-2 * error @ right.T).ravel(), (-2 * left.T @ error).ravel()]
            )

        start = np.random.default_rng(start_seed).standard_normal(shape + 2 * width * rank)
        return minimize(risk, start, jac=True, options={"gtol": 1e-9, "maxiter": 5000}).fun

    found = {shape: min(best(shape, seed) for seed in range(8)) for shape in (0, 1, width)}
    assert linear_networks.resnet_risk(difference, rank) == pytest.approx(found[0], abs=1e-7)
    assert linear_networks.grn_v1_risk(difference, rank) == pytest.approx(found[1], abs=1e-6)
    assert found[1] <= linear_networks.grn_v1_bound(difference, rank) + 1e-7 <= found[0] + 2e-7
    assert found[width] <= linear_networks.grn_v2_bound(difference, rank) + 1e-7 <= found[0] + 2e-7
    # The bounds, by what their proofs choose: within the space of the leading directions nothing is lost.
    left, values, right = np.linalg.svd(difference)
    projection = identity - left[:, :rank] @ left[:, :rank].T
    leading = (left[:, :rank] * values[:rank]) @ right[:rank]
    shift = np.trace(difference - leading) / (width - rank)
    error = difference - leading - shift * projection
    assert linear_networks.grn_v1_bound(difference, rank) == pytest.approx((error**2).sum())
    without_diagonal = difference - leading - np.diag(np.diag(difference - leading))
    assert linear_networks.grn_v2_bound(difference, rank) == pytest.approx(
        min((error**2).sum(), (without_diagonal**2).sum())
    )


def test_risk_of_a_residual_network_between_whole_ranks_and_beyond():
    difference = np.diag([3.0, 2.0, 1.0])
    risks = [linear_networks.resnet_risk(difference, rank) for rank in (0, 1, 1.5, 2, 3, 7)]
    assert risks == pytest.approx([14, 5, 3, 1, 0, 0])


def test_targets_are_what_they_are_called():
    positive = linear_networks.make_difference("positive", 20, 0.4, seed=0)
    assert np.allclose(positive, positive.T)
    assert np.linalg.eigvalsh(positive) == pytest.approx(np.linspace(0.4, 1, 20))
    assert abs(positive - np.diag(np.diag(positive))).max() > 0.01
    assert np.diag(linear_networks.make_difference("diagonal", 20, 0.4, seed=0)) == pytest.approx(
        np.linspace(0.4, 1, 20)
    )
    assert np.linalg.eigvalsh(linear_networks.make_difference("indefinite", 20, 0.4, 0)).min() == pytest.approx(-1)
    rotation = linear_networks.make_difference("rotation", 20, 0.4, seed=0)
    assert np.allclose(rotation @ rotation.T, np.eye(20)) and not np.allclose(rotation, rotation.T)
    assert not np.allclose(positive, linear_networks.make_difference("positive", 20, 0.4, seed=1))


def test_gradient_descent_reaches_the_optima_whatever_the_size_of_the_target():
    differences = np.stack([size * linear_networks.make_difference("positive", 16, 0.2, 0) for size in (1, 1, 1000)])
    differences[1] = linear_networks.make_difference("normal", 16, 0.2, 0)
    for scheme, optimum in (("standard", linear_networks.resnet_risk), ("grn_v1", linear_networks.grn_v1_risk)):
        reached = linear_networks.descend(scheme, differences, 4, seed=0)
        assert reached == pytest.approx([optimum(each, 4) for each in differences], rel=0.01)
    reached = linear_networks.descend("grn_v2", differences, 4, seed=0)
    assert all(reached <= [1.01 * linear_networks.grn_v2_bound(each, 4) for each in differences])


def test_gain_is_that_at_equal_parameters():
    # Counted by hand: 10 layers have 45 pairs; 45 * 9 parameters more are worth 22.5 ranks of width 9, all that there are.
    assert linear_networks.extra_parameters("grn_v1", 9) == 45 and linear_networks.extra_parameters("grn_v2", 9) == 405
    difference = np.diag(np.arange(9, 0, -1.0))
    total = (difference**2).sum()
    assert linear_networks.gain("grn_v2", difference, 2, 1.0) == pytest.approx(-1 / total)
    # 45 / 18 = 2.5 ranks: half way between those of 4 and 5, 55 and 30.
    assert linear_networks.gain("grn_v1", difference, 2, 2.5) == pytest.approx((42.5 - 2.5) / total)


def test_smallest_possible_loss_is_that_of_the_task(monkeypatch):
    monkeypatch.setattr(linear_networks, "train", lambda *_, **__: {"loss": 1.0, "curve": [1.0] * 20})
    runs = {(run["task"], run["scheme"]): run for run in linear_networks.study_training([5])}
    assert len(runs) == 8 and all(len(run["curve"]) == 2 for run in runs.values())
    # Per feature, what remains of A - I but for its 30 largest singular values.
    matrix = linear_networks.make_task("random", 5)[0].numpy() - np.eye(100)
    expected = (np.linalg.svd(matrix, compute_uv=False)[30:] ** 2).sum() / 100
    assert runs["random", "standard"]["optimum"] == pytest.approx(expected)
    assert 0.9 * expected < runs["random", "grn_v1"]["optimum"] < expected
    assert runs["identity", "standard"]["optimum"] is None


def test_best_learning_rate_is_each_networks_own():
    losses = [(0.1, 3.0, 1e-3, None), (0.1, 2.0, 1e-2, 5.0), (0.5, 1.0, None, None)]
    rows = [dict(zip(("scale", "standard", "grn_v1", "grn_v3"), row), rate=1.0) for row in losses]
    best = low_rank.best_of_rates({"start": rows})
    assert best == {
        0.1: {"standard": 2.0, "grn_v1": 1e-3, "grn_v3": 5.0},
        0.5: {"standard": 1.0, "grn_v1": None, "grn_v3": None},
    }


@pytest.fixture(scope="module")
def bounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_networks, "descend", functools.partial(linear_networks.descend, steps=700))
        return [
            linear_networks.check_target(kind, 16, 0.5, 4, [0, 1]) for kind in ("positive", "normal", "indefinite")
        ]


def test_contradictions_to_the_theorem_are_found(bounds):
    assert low_rank.violations({"bounds": bounds}) == []
    for name, factor in (("grn_v1_reached", 2), ("grn_v2_reached", 2), ("standard_reached", 0.9), ("resnet", 0.9)):
        wrong = bounds[0] | {name: [factor * value for value in bounds[0][name]]}
        found = low_rank.violations({"bounds": [*bounds[1:], wrong]})
        assert len(found) == 1 and name in found[0] and "kind positive" in found[0]
    # Gradient descent may fall a little short, but what is exact may not.
    for name, violated in (("grn_v1_reached", 0), ("grn_v1_optimum", 2)):
        near = bounds[0] | {name: [value + 5e-5 for value in bounds[0]["grn_v1_bound"]]}
        assert len(low_rank.violations({"bounds": [near]})) == violated


def test_page_says_what_was_measured(tmp_path, monkeypatch, capsys, bounds):
    def reduced(name: str, value):
        for module in (linear_networks, low_rank):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    losses = {"standard": 200.0, "grn_v1": 2e-5, "grn_v2": 3.0, "grn_v3": None}

    def training(seeds):
        return [
            {
                "task": task,
                "scheme": scheme,
                "seed": seed,
                "loss": loss and loss * 10**seed,
                "optimum": 1.5 if task == "random" and scheme in ("standard", "grn_v1") else None,
                "curve": [100.0, loss],
            }
            for task in linear_networks.TASKS
            for scheme, loss in losses.items()
            for seed in seeds
        ]

    reduced("study_training", training)
    reduced("SCALES", (0.3,))
    reduced("RATES", (0.5, 1.0))
    reduced("BASE", {"rank": 4, "width": 16, "kappa": 0.5})
    reduced("CURVES", {"rank": ([2, 4], "r"), "width": ([8, 16], "d"), "kappa": ([0.1, 0.9], "kappa")})
    reduced("study_bounds", lambda seeds: bounds)
    small_train = linear_networks.train
    reduced("train", lambda *arguments: small_train(*arguments[:-1], 20, **SMALL))
    folder = tmp_path / "study"
    call(command.main, "--seeds", 0, 1, "--output_dir", folder)
    printed, page = capsys.readouterr().out, (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [(row["scale"], row["rate"]) for row in results["start"]] == [(0.3, 0.5), (0.3, 1.0)]
    assert [point["value"] for point in results["gains"]["kappa"]] == [0.1, 0.9]
    for table in (low_rank.training_table, low_rank.start_table, low_rank.bounds_table):
        assert table(results) in page and table(results) in printed
    assert "| 6.3e-05 (2.0e-05 to 2.0e-04)" in page and "| 7.0 to 7.0" in page
    assert "six orders or more in 0 of 2 settings" in page
    assert "**Agrees: figure 1 (a).**" in page and "**Agrees: theorem 4.2.**" in page
    assert "GRN-v1 < GRN-v2 < residual < GRN-v3" in page and "2 of 2 diverged" in page
    assert f"python -m training.low_rank --seeds 0 1 --output_dir {folder}\n" in page
    for figure in ("figure_1.png", "figure_5.png"):
        assert figure in page and (folder / figure).stat().st_size > 10_000

    # Worse numbers are not glossed over.
    losses["grn_v1"] = 2e-3
    results["training"] = training([0])
    results["bounds"] = [bounds[0] | {"grn_v1_reached": [1.0, 1.0]}]
    verdict = "\n".join(low_rank.verdicts(results))
    assert "**Does not agree: figure 1 (a).**" in verdict and "**Does not agree: theorem 4.2.**" in verdict

    call(command.main, "--seeds", 0, 1, "--output_dir", folder)  # its own results are replaced, by the same
    again = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert again["start"] == results["start"] and again["gains"] == results["gains"]


def test_command_writes_into_no_tracked_folder_unless_it_is_told_to(tmp_path, monkeypatch):
    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(low_rank, "output_folder", lambda folder, *_: written.append(folder) or sys.exit())
    with pytest.raises(SystemExit):
        call(command.main)
    assert written == [Path("runs/low_rank")]


def test_command_refuses_what_it_cannot_do(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "results.json").write_text('{"title": "other"}')
    before = snapshot(tmp_path)
    line = failure(capsys, command.main, "--output_dir", tmp_path)
    assert "which has a README.md that this command did not write" in line
    line = failure(capsys, command.main, "--output_dir", tmp_path / "README.md" / "below")
    assert "cannot be created" in line
    for seeds in (("1", "1"), ("-1",)):
        assert "different integers from 0" in failure(
            capsys, command.main, "--seeds", *seeds, "--output_dir", tmp_path / "new"
        )
    assert snapshot(tmp_path) == before
