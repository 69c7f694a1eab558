"""LAuReL: learned augmented residual layers."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from training.variants.scheme import Connection, ModuleLayer, Newest, Scheme, setting, weighted_sum, without_autocast


class ResidualWeights(Connection):
    """`x' = a f(x) + b x` with `(a, b) = 2 softmax(w)`."""

    static = ("w",)

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, state: tuple[torch.Tensor, ...], f: Callable) -> tuple[torch.Tensor, ...]:
        (x,) = state
        output = f(x)
        with without_autocast(x):
            a, b = (2 * self.w.softmax(0)).unbind()
            return (weighted_sum([b, a], [x, output]),)


class LowRank(Connection):
    """
    `x' = f(x) + x + h(x)` with `h(x) = B A x`; `A` is normal with variance `1 / d` at the start, and `B` zero.

    Args:
        streams: the number of last streams that `h` sees, with the weights `g`: `h(sum_j g_j x_{i-j})`, which equals `sum_j
            g_j h(x_{i-j})`. If `None`, it sees only the layer's own input, without a weight.
        kept: the number of streams in the new state.
    """

    static = ("g",)

    def __init__(self, width: int, rank: int, streams: int | None = None, kept: int = 1):
        super().__init__()
        self.kept = kept
        self.A = nn.Parameter(torch.empty(rank, width).normal_(std=width**-0.5))
        self.B = nn.Parameter(torch.zeros(width, rank))
        self.g = None if streams is None else nn.Parameter(torch.ones(streams))

    def forward(self, state: tuple[torch.Tensor, ...], f: Callable) -> tuple[torch.Tensor, ...]:
        x = seen = state[-1]
        if self.g is not None:
            with without_autocast(x):
                seen = weighted_sum(self.g.unbind(), state[::-1])
        low_rank = nn.functional.linear(nn.functional.linear(seen, self.A), self.B)
        return (*state, f(x) + x + low_rank)[-self.kept :]


@dataclasses.dataclass
class LaurelRW(Scheme):
    """
    LAuReL-RW (Menghani et al., 2024, arXiv 2411.07501), of each attention and each feed-forward module `f`:

        x' = a f(x) + b x,    (a, b) = 2 softmax(w)

    `w` is zero at the start: the standard transformer. Parameters: 2 a module.
    """

    def build(self, layers, config):
        return [ModuleLayer(layer, [ResidualWeights(), ResidualWeights()]) for layer in layers], Newest()


@dataclasses.dataclass
class LaurelLR(Scheme):
    """
    LAuReL-LR (arXiv 2411.07501), of each attention and each feed-forward module `f`:

        x' = f(x) + B A x + x

    `B` is zero at the start: the standard transformer. Parameters: `2 rank d` a module.
    """

    rank: int = setting(8, "Rank of B A in each attention and each feed-forward module: 16 a block.", 1)

    def build(self, layers, config):
        width = config.hidden_size
        return [ModuleLayer(layer, [LowRank(width, self.rank) for _ in range(2)]) for layer in layers], Newest()


@dataclasses.dataclass
class LaurelPA(LaurelLR):
    """
    LAuReL-PA (arXiv 2411.07501), of each attention and each feed-forward module `f`, over its input `x_i` and the
    streams before it:

        x_{i+1} = f(x_i) + x_i + sum_{j < k} g_j h(x_{i-j}),    h(x) = B A x

    `B` is zero at the start: the standard transformer. `g` is 1 (ours: the paper does not say; zero would leave all
    without a gradient). Parameters: `2 rank d + k` a module, fewer `g` where there are not yet `k` streams. With rank
    8 these are 0.10M at 6 blocks of 512.
    """

    k: int = setting(3, "The number of last streams that a layer sees.", 1)

    def build(self, layers, config):
        def connection(index: int) -> LowRank:
            seen, kept = (min(self.k, streams) for streams in (index + 1, index + 2))
            return LowRank(config.hidden_size, self.rank, seen, kept)

        pairs = [[connection(2 * i), connection(2 * i + 1)] for i in range(len(layers))]
        return [ModuleLayer(*each) for each in zip(layers, pairs)], Newest()
