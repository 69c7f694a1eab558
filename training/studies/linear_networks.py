"""Low-rank linear networks whose residuals are the library's own: their training, and what theorem 4.2 says of them."""

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from modeling_dca import DCAConfig
from modeling_dca.grn import GeneralizedResidual, push


SCHEMES = {"standard": "residual", "grn_v1": "GRN-v1", "grn_v2": "GRN-v2", "grn_v3": "GRN-v3"}
TASKS = {"identity": "(a) identity", "random": "(b) y = A x + c"}

# Figure 1. What the paper does not state: the two factors of a layer are i.i.d. N(0, SCALE^2), its bias starts at zero, and
# one learning rate, for all networks, falls linearly to zero. The output of such a network is a million times its input at
# the start, so the norm of the gradient is clipped; a step then moves the parameters by RATE at most.
WIDTH, LAYERS, RANK, BATCH, STEPS = 100, 10, 3, 100, 1000
SCALE, RATE, CLIP = 0.5, 0.3, 1.0
HELD_OUT = 10_000
# Losses above this, or that are no numbers, are of networks that have diverged; the largest at the start is 1e13.
DIVERGED = 1e30
# How much hangs on that: identity, first seed.
STARTED, SCALES, RATES = ("standard", "grn_v1", "grn_v3"), (0.1, 0.2, 0.5), (0.1, 1.0, 3.0)

# Figure 5: collective rank, width and kappa, one of which varies at a time.
BASE = {"rank": 30, "width": 100, "kappa": 0.5}
CURVES = {
    "rank": (list(range(5, 96, 5)), "collective rank r*"),
    "width": (list(range(40, 101, 10)) + list(range(120, 401, 40)), "width d"),
    "kappa": ([i / 10 for i in range(11)], "kappa = smallest / largest eigenvalue of A - I"),
}
MARKED = {"rank": (10, 30, 50, 70, 90), "width": (50, 100, 160), "kappa": (0.0, 0.5, 0.9)}
DESCENT_STEPS, DESCENT_RATE = 1000, 0.05
# What counts as equal, as a share of `||A - I||_F^2`: between formulas, and by how much gradient descent may fall short.
EXACT, SHORT = 1e-9, 1e-4


class LowRankNetwork(nn.Module):
    """
    Linear layers of low rank, each with a bias, whose inputs, and the network's output, are generalized residuals of the
    input and all earlier outputs: the library's own modules, as a DCA model has them (figure 1).

    Args:
        scheme: "standard", "grn_v1", "grn_v2" or "grn_v3".
        generator: of the initial factors, which are i.i.d. normal with standard deviation `scale`; in float64.
    """

    def __init__(
        self,
        scheme: str,
        generator: torch.Generator,
        scale: float = SCALE,
        width: int = WIDTH,
        layers: int = LAYERS,
        rank: int = RANK,
    ):
        super().__init__()
        self.config = DCAConfig(
            residual_scheme=scheme, hidden_size=width, num_hidden_layers=layers, num_attention_heads=1
        )
        self.layers = nn.ModuleList()
        for _ in range(layers):
            down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
            for factor in (down, up):
                nn.init.normal_(factor.weight, std=scale, generator=generator)
            nn.init.zeros_(up.bias)
            self.layers.append(nn.Sequential(down, up))
        self.residuals = nn.ModuleList(GeneralizedResidual(self.config, layer) for layer in range(layers + 1))
        self.double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        stack = (inputs,)
        for residual, layer in zip(self.residuals, self.layers):
            hidden, stack = residual(*stack)
            stack = push(stack, layer(hidden), self.config.max_stack_entries)
        return self.residuals[-1](*stack)[0]


def make_task(task: str, seed: int, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix `A` of shape `(width, width)` and the offset `c` of shape `(width,)` that are to be learned."""
    if task == "identity":
        return torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(10_000 + seed)
    return (
        torch.randn(width, width, generator=generator, dtype=torch.float64),
        torch.randn(width, generator=generator, dtype=torch.float64),
    )


def train(
    scheme: str,
    task: str,
    seed: int,
    scale: float = SCALE,
    rate: float = RATE,
    steps: int = STEPS,
    **shape: int,
) -> dict:
    """
    Train a network of figure 1 by SGD. Networks of one seed start from the same layers and see the same batches.

    Returns:
        `curve`, the squared error, as a mean over features, of every batch before its step, and `loss`, that of fresh
        inputs after the last; `None` where a network has diverged.
    """
    network = LowRankNetwork(scheme, torch.Generator().manual_seed(seed), scale, **shape)
    width = network.config.hidden_size
    matrix, offset = make_task(task, seed, width)
    batches = torch.Generator().manual_seed(20_000 + seed)

    def loss_of(examples: int) -> torch.Tensor:
        inputs = torch.randn(examples, width, generator=batches, dtype=torch.float64)
        return (network(inputs) - inputs @ matrix.T - offset).square().mean()

    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    curve = []
    for _ in range(steps):
        loss = loss_of(BATCH)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if not curve[-1] < DIVERGED:
            return {"curve": curve[:-1] + [None] * (steps - len(curve) + 1), "loss": None}
    with torch.no_grad():
        return {"curve": curve, "loss": loss_of(HELD_OUT).item()}


def remainder(difference: np.ndarray, rank: int) -> np.ndarray:
    """A matrix (`A - I` in theorem 4.2) minus its best approximation of a rank: Delta."""
    left, values, right = np.linalg.svd(difference)
    return (left[:, rank:] * values[rank:]) @ right[rank:]


def resnet_risk(difference: np.ndarray, rank: float) -> float:
    """
    The optimal excess risk of a residual network, `||Delta||_F^2` (theorem 4.2; Eckart and Young).

    Args:
        difference (array of shape `(d, d)`): `A - I`.
        rank: the collective rank; between whole ones the risk is read off a straight line, and from `d` on it is zero.
    """
    squares = np.linalg.svd(difference, compute_uv=False) ** 2
    risks = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return float(np.interp(rank, np.arange(len(risks)), risks))


def grn_v1_bound(difference: np.ndarray, rank: int) -> float:
    """What the optimal excess risk of GRN-v1 is at most: `||Delta||_F^2 - tr(Delta)^2 / (d - r*)` (theorem 4.2)."""
    delta = remainder(difference, rank)
    return float((delta**2).sum() - np.trace(delta) ** 2 / (len(delta) - rank))


def grn_v2_bound(difference: np.ndarray, rank: int) -> float:
    """The same for GRN-v2: `||Delta||_F^2 - max(sum_i Delta_ii^2, tr(Delta)^2 / (d - r*))` (theorem 4.2)."""
    delta = remainder(difference, rank)
    saved = max((np.diag(delta) ** 2).sum(), np.trace(delta) ** 2 / (len(delta) - rank))
    return float((delta**2).sum() - saved)


def grn_v1_risk(difference: np.ndarray, rank: int) -> float:
    """
    The optimal excess risk of GRN-v1, `a I + M`: for a given `a` the best `M` is Eckart and Young's, so one number is left
    to search, on a grid and then within its best cell.
    """
    reach = np.linalg.norm(difference, 2)
    identity = np.eye(len(difference))

    def risk(shift: float) -> float:
        return resnet_risk(difference - shift * identity, rank)

    grid = np.linspace(-reach, reach, 65)
    best = grid[np.argmin([risk(shift) for shift in grid])]
    cell = grid[1] - grid[0]
    found = minimize_scalar(risk, bounds=(best - cell, best + cell), method="bounded", options={"xatol": 1e-9 * reach})
    return float(min(found.fun, risk(best), risk(0.0)))


def descend(scheme: str, differences: np.ndarray, rank: int, seed: int, steps: int = DESCENT_STEPS) -> np.ndarray:
    """
    The excess risks that gradient descent (Adam) reaches on what theorem 4.1 says the networks can express: `I + M` for
    the residual one, `a I + M` for GRN-v1 and `D + M` for GRN-v2, with `M` a product of two factors. With isotropic inputs the
    risk is the squared Frobenius distance, so no examples are drawn.

    Args:
        differences (array of shape `(n, d, d)`): `A - I` of `n` targets, which are learned independently.

    Returns:
        `n` risks.
    """
    target = torch.from_numpy(differences)
    count, width, _ = target.shape
    generator = torch.Generator().manual_seed(seed)
    # As large as the target is, so that Adam's steps, which do not know its size, fit all.
    size = target.square().mean(dim=(1, 2), keepdim=True).sqrt() * math.sqrt(width)
    target = target / size

    def factor(*shape: int) -> torch.Tensor:
        values = torch.randn(count, *shape, generator=generator, dtype=torch.float64) / math.sqrt(width)
        return values.requires_grad_()

    left, right = factor(width, rank), factor(rank, width)
    diagonal = torch.zeros(count, {"standard": 0, "grn_v1": 1, "grn_v2": width}[scheme], dtype=torch.float64)
    parameters = [left, right] + [diagonal.requires_grad_()] * (scheme != "standard")
    optimizer = torch.optim.Adam(parameters, lr=DESCENT_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def risks() -> torch.Tensor:
        error = target - left @ right
        if scheme != "standard":
            error = error - torch.diag_embed(diagonal.expand(count, width))
        return error.square().sum(dim=(1, 2))

    for _ in range(steps):
        optimizer.zero_grad()
        risks().sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (risks() * size.flatten() ** 2).numpy()


def random_basis(width: int, generator: np.random.Generator) -> np.ndarray:
    """A rotation drawn uniformly."""
    basis, triangle = np.linalg.qr(generator.standard_normal((width, width)))
    return basis * np.sign(np.diag(triangle))


def make_difference(kind: str, width: int, kappa: float, seed: int) -> np.ndarray:
    """
    A target, as `A - I`, of shape `(width, width)`.

    Args:
        kind: "positive" is symmetric with eigenvalues spaced evenly from `kappa` to 1 and random eigenvectors (as
            theorem 4.3 has it); "indefinite" has them from -1 to 1; "diagonal" is "positive" with the coordinate axes as
            eigenvectors; "normal" has i.i.d. normal entries, and "rotation" is orthogonal: neither is symmetric.
    """
    generator = np.random.default_rng(seed)
    if kind == "normal":
        return generator.standard_normal((width, width)) / math.sqrt(width)
    basis = random_basis(width, generator)
    if kind == "rotation":
        return basis
    values = np.linspace(-1 if kind == "indefinite" else kappa, 1, width)
    return np.diag(values) if kind == "diagonal" else (basis * values) @ basis.T


def extra_parameters(scheme: str, width: int, layers: int = LAYERS) -> int:
    """What a generalized residual adds to the `2 d r*` parameters of a residual network, as the paper counts it."""
    return {"grn_v1": 1, "grn_v2": width}[scheme] * layers * (layers - 1) // 2


def gain(scheme: str, difference: np.ndarray, rank: int, risk: float) -> float:
    """
    How much smaller a risk is than that of the residual network with as many parameters, which has a larger collective
    rank for them, as a share of `||A - I||_F^2` (figure 5).
    """
    equal = rank + extra_parameters(scheme, len(difference)) / (2 * len(difference))
    return (resnet_risk(difference, equal) - risk) / float((difference**2).sum())


def check_target(kind: str, width: int, kappa: float, rank: int, seeds: list[int]) -> dict:
    """All that is known of the optimal risks for targets of one kind, as shares of `||A - I||_F^2`, by seed."""
    differences = np.stack([make_difference(kind, width, kappa, seed) for seed in seeds])
    norms = (differences**2).sum(axis=(1, 2))
    formulas = {
        "resnet": resnet_risk,
        "grn_v1_bound": grn_v1_bound,
        "grn_v1_optimum": grn_v1_risk,
        "grn_v2_bound": grn_v2_bound,
    }
    found = {name: np.array([formula(each, rank) for each in differences]) for name, formula in formulas.items()}
    for scheme in ("standard", "grn_v1", "grn_v2"):
        found[f"{scheme}_reached"] = descend(scheme, differences, rank, seed=seeds[0])
    for scheme in ("grn_v1", "grn_v2"):
        reached = found[f"{scheme}_reached"]
        found[f"{scheme}_gain"] = norms * [
            gain(scheme, *each) for each in zip(differences, [rank] * len(norms), reached)
        ]
    point = {"kind": kind, "width": width, "kappa": kappa, "rank": rank}
    return point | {name: [float(share) for share in values / norms] for name, values in found.items()}


def study_bounds(seeds: list[int]) -> list[dict]:
    """Theorem 4.2 against gradient descent, at the marked points of figure 5 and for targets of other kinds."""
    points = [BASE | {varied: value} for varied, values in MARKED.items() for value in values]
    points = [{"kind": "positive", **each} for index, each in enumerate(points) if each not in points[:index]]
    points += [{"kind": kind, **BASE} for kind in ("indefinite", "diagonal", "normal", "rotation")]
    return [check_target(**point, seeds=seeds) for point in points]


def study_gains(seeds: list[int]) -> dict[str, list[dict]]:
    """The gains of figure 5 from the bounds, over each of the three quantities."""
    curves = {}
    for varied, (values, _) in CURVES.items():
        curves[varied] = []
        for value in values:
            rank, width, kappa = (BASE | {varied: value}).values()
            differences = [make_difference("positive", width, kappa, seed) for seed in seeds]
            bounds = {"grn_v1": grn_v1_bound, "grn_v2": grn_v2_bound}
            gains = {
                scheme: [gain(scheme, each, rank, bound(each, rank)) for each in differences]
                for scheme, bound in bounds.items()
            }
            curves[varied].append({"value": value, **gains})
    return curves


def show(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.1e}"


def number(loss: float | None) -> float:
    """A loss as a number that can be compared, also where a network has diverged."""
    return math.inf if loss is None else loss


def orders_below(loss: float | None, baseline: float | None) -> float:
    """By how many orders of magnitude a loss is below another."""
    return math.log10(number(baseline)) - math.log10(number(loss))


def study_training(seeds: list[int], steps: int = STEPS) -> list[dict]:
    """The networks of figure 1, with every tenth value of their curves."""
    runs = []
    for task in TASKS:
        for scheme in SCHEMES:
            for seed in seeds:
                run = train(scheme, task, seed, steps=steps)
                optimum = None
                if task == "random" and scheme in ("standard", "grn_v1"):
                    difference = make_task(task, seed)[0].numpy() - np.eye(WIDTH)
                    risk = resnet_risk if scheme == "standard" else grn_v1_risk
                    optimum = risk(difference, LAYERS * RANK) / WIDTH
                run["curve"] = [value and float(f"{value:.5g}") for value in run["curve"][::10]]
                runs.append({"task": task, "scheme": scheme, "seed": seed, "optimum": optimum, **run})
                print(f"figure 1, {TASKS[task]}, {SCHEMES[scheme]}, seed {seed}: {show(run['loss'])}", flush=True)
    return runs


def study_start(seed: int, steps: int = STEPS) -> list[dict]:
    """The identity task, without GRN-v2, over the scale of the initial layers and the learning rate."""
    rows = []
    for scale in SCALES:
        for rate in RATES:
            losses = {scheme: train(scheme, "identity", seed, scale, rate, steps)["loss"] for scheme in STARTED}
            rows.append({"scale": scale, "rate": rate, "seed": seed, **losses})
            print(
                f"identity, scale {scale}, rate {rate}: " + ", ".join(map(show, losses.values())),
                flush=True,
            )
    return rows
