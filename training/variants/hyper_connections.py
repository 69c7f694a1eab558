"""Hyper-Connections, static, dynamic, and on the manifold of doubly stochastic matrices (mHC)."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from training.variants.scheme import Connection, ModuleLayer, Scheme, rms, setting, without_autocast


class Streams(Connection):
    """
    `n` streams of width `d` around a layer `f`: the state is one tensor `(batch, sequence, n, d)`.

    Args:
        index: the index of the layer in the model; the first one gets the embeddings, and makes `n` streams of them.
    """

    def __init__(self, n: int, index: int):
        super().__init__()
        self.n, self.index = n, index

    def coefficients(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The coefficients that read the layer's input from the streams `(..., n)`, mix the streams `(..., n, n)`, with a row
        for each new stream, and write the layer's output to each `(..., n)`. They may be the same for all tokens.
        """
        raise NotImplementedError

    def forward(self, state: tuple[torch.Tensor, ...], f: Callable) -> tuple[torch.Tensor, ...]:
        (streams,) = state
        if self.index == 0:
            streams = streams.unsqueeze(-2).expand(*streams.shape[:-1], self.n, -1)
        with without_autocast(streams):
            read, mix, write = (each.to(streams.dtype) for each in self.coefficients(streams))
            layer_input = torch.einsum("...n,...nd->...d", read, streams)
        output = f(layer_input)
        with without_autocast(streams):
            mixed = torch.einsum("...jn,...nd->...jd", mix, streams)
            return (mixed + write.unsqueeze(-1) * output.unsqueeze(-2).to(streams.dtype),)


class SumOfStreams(nn.Module):
    """The model's output: the sum of the streams."""

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        return streams.sum(-2)


class HyperConnection(Streams):
    """`A_m` `(n,)`, `A_r` `(n, n)` and `B` `(n,)`, the same for all tokens."""

    static = ("A_m", "A_r", "B")

    def __init__(self, n: int, index: int, width: int):
        super().__init__(n, index)
        self.A_m = nn.Parameter(torch.eye(n)[index % n].clone())
        self.A_r = nn.Parameter(torch.eye(n))
        self.B = nn.Parameter(torch.ones(n))

    def coefficients(self, streams):
        return self.A_m, self.A_r.mT, self.B  # A_r has a row for each old stream: A_r^T H


class DynamicHyperConnection(HyperConnection):
    """Adds terms that depend on the token: `W_m` and `W_b` `(d, 1)`, `W_r` `(d, n)`, and the scalars `s_a` and `s_b`."""

    def __init__(self, n: int, index: int, width: int):
        super().__init__(n, index, width)
        self.W_m, self.W_b = (nn.Parameter(torch.zeros(width, 1)) for _ in range(2))
        self.W_r = nn.Parameter(torch.zeros(width, n))
        self.s_a, self.s_b = (nn.Parameter(torch.tensor(0.01)) for _ in range(2))

    def coefficients(self, streams):
        normed = rms(streams)
        projections = torch.cat([self.W_m, self.W_b, self.W_r], dim=1).to(normed.dtype)
        m, b, r = (normed @ projections).tanh().split([1, 1, self.n], dim=-1)
        A_m = self.s_a * m.squeeze(-1) + self.A_m
        A_r = self.s_a * r + self.A_r
        return A_m, A_r.mT, self.s_b * b.squeeze(-1) + self.B


@dataclasses.dataclass
class HyperConnections(Scheme):
    """
    Static Hyper-Connections (Zhu et al., 2024, arXiv 2409.19606). Around each attention and each feed-forward module
    `f`, its norm inside, with the state `H` `(n, d)`, all rows the embedding at first:

        h = A_m^T H,    H' = B^T f(h) + A_r^T H

    and the output is the sum of the streams. At the start `B` is ones, `A_m` the unit vector of stream `layer mod n`
    and `A_r` the identity: on `n` equal streams the standard transformer, but that the output projections of attention
    and feed-forward module start `sqrt(n)` times as large (`scale_output_init`), by which it differs. No weight decay.
    Parameters: `n + n^2 + n` a module.
    """

    n: int = setting(4, "The number of streams.", 1)
    scale_output_init: bool = setting(
        True, "Whether output projections start sqrt(n) times as large, as in the paper."
    )

    connection = HyperConnection

    def build(self, layers, config):
        if self.scale_output_init:
            with torch.no_grad():
                for layer in layers:
                    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                        projection.weight.mul_(math.sqrt(self.n))
        pairs = [
            [self.connection(self.n, 2 * i + j, config.hidden_size) for j in range(2)] for i in range(len(layers))
        ]
        return [ModuleLayer(*each) for each in zip(layers, pairs)], SumOfStreams()


@dataclasses.dataclass
class DynamicHyperConnections(HyperConnections):
    """
    Dynamic Hyper-Connections (arXiv 2409.19606): as the static ones, with coefficients that depend on the token. With
    `Hn = RMS(H)` over `d`,

        B = s_b tanh(Hn W_b)^T + B_0,    A_m = s_a tanh(Hn W_m) + A_m0,    A_r = s_a tanh(Hn W_r) + A_r0

    `W` are zero at the start and `s` 0.01. The norm has no weight (ours), which could be multiplied into `W`. No
    weight decay on `B_0`, `A_m0` and `A_r0`, and that of the run on `W` and `s`. Parameters: those of the static ones
    and `d + d + d n + 2` a module: 0.02M at 6 blocks of 512 with n = 2, 0.04M with n = 4 (the paper of DCA has 0.03M,
    and no n).
    """

    connection = DynamicHyperConnection


# The initial weight of a stream in its new value, and of the one stream that a layer reads.
NEAR_ONE = 0.9


def sinkhorn(R: torch.Tensor, rounds: int) -> torch.Tensor:
    """`exp(R)` `(..., n, n)` after `rounds` normalisations of its rows and columns: nearly doubly stochastic."""
    M = (R - R.amax((-2, -1), keepdim=True)).exp()  # (so `exp` cannot overflow; a common factor is normalised away)
    for _ in range(rounds):
        M = M / M.sum(-1, keepdim=True)
        M = M / M.sum(-2, keepdim=True)
    return M


class ManifoldConnection(Streams):
    """`W_p`, `W_o` `(n d, n)`, `W_r` `(n d, n^2)`, `b_p`, `b_o` `(n,)`, `b_r` `(n, n)`, and the scalars `a_p`, `a_o`, `a_r`."""

    static = ("b_p", "b_o", "b_r")

    def __init__(self, n: int, index: int, width: int, rounds: int):
        super().__init__(n, index)
        self.rounds = rounds
        self.W_p, self.W_o = (nn.Parameter(torch.zeros(n * width, n)) for _ in range(2))
        self.W_r = nn.Parameter(torch.zeros(n * width, n * n))
        self.a_p, self.a_o, self.a_r = (nn.Parameter(torch.tensor(0.01)) for _ in range(3))
        near_identity = torch.full((n, n), (1 - NEAR_ONE) / (n - 1)).fill_diagonal_(NEAR_ONE)
        self.b_p = nn.Parameter(near_identity[index % n].logit())
        self.b_o = nn.Parameter(torch.zeros(n))
        self.b_r = nn.Parameter(near_identity.log())

    def coefficients(self, streams):
        v = rms(streams.flatten(-2))
        projections = torch.cat([self.W_p, self.W_o, self.W_r], dim=1).to(v.dtype)
        p, o, r = (v @ projections).split([self.n, self.n, self.n**2], dim=-1)
        P = (self.a_p * p + self.b_p).sigmoid()
        O = 2 * (self.a_o * o + self.b_o).sigmoid()  # noqa: E741 (its name in the paper's equations)
        R = self.a_r * r.unflatten(-1, (self.n, self.n)) + self.b_r
        return P, sinkhorn(R, self.rounds), O


@dataclasses.dataclass
class ManifoldHyperConnections(Scheme):
    """
    mHC, manifold-constrained Hyper-Connections (Xie et al., 2025, arXiv 2512.24880). Around each attention and each
    feed-forward module `f`, with the state `x` `(n, d)`, all rows the embedding at first, and `v = RMS(vec x)` over
    all `n d`, in float32:

        p = a_p v W_p + b_p,    o = a_o v W_o + b_o,    R = a_r mat(v W_r) + b_r
        P = sigmoid(p),    O = 2 sigmoid(o),    M = Sinkhorn(R)
        x' = M x + O^T f(P x)

    Row `j` of `M` mixes the old streams into the new stream `j`. The output is the sum of the streams. The start of
    `b` and `W` is not published. Ours is nearest to the standard transformer: `W = 0`, `b_o = 0` (`O` is ones),
    `sigmoid(b_p)` is 0.9 for stream `layer mod n` and `0.1 / (n - 1)` for the others, and `exp(b_r)` is 0.9 on the
    diagonal and the same beside it, doubly stochastic. On `n` equal streams that is the standard transformer; as
    layers read different streams, these part. In the last layer `M` has no effect, as its columns sum to 1 and the
    output is the sum. No weight decay on `b`. Parameters: `n d (2 n + n^2) + 2 n + n^2 + 3` a module.
    """

    n: int = setting(4, "The number of streams.", 2)
    sinkhorn_rounds: int = setting(20, "The number of normalisations of rows and columns.", 1)

    def build(self, layers, config):
        def connection(index: int) -> ManifoldConnection:
            return ManifoldConnection(self.n, index, config.hidden_size, self.sinkhorn_rounds)

        pairs = [[connection(2 * i), connection(2 * i + 1)] for i in range(len(layers))]
        return [ModuleLayer(*each) for each in zip(layers, pairs)], SumOfStreams()
