"""MUDD: multiway dynamic dense connections."""

import dataclasses

import torch
from torch import nn

from training.variants.scheme import Connection, Scheme, SchemeLayer, rms, setting, weighted_sum, without_autocast


class DynamicDense(Connection):
    """
    `A = gelu(RMS(X_i) W_1) W_2 + a` and, for each way `c`, `X^c = sum_j A^c_j X_j`.

    Args:
        width: `d`.
        entries: `i + 1`.
        ways: 4 for queries, keys, values and the residual stream, or 1 for only the latter.
        deep: the sources are normalised, and `z` times the normalised sum is added to `X_i`.
    """

    static = ("a", "z")

    def __init__(self, width: int, entries: int, ways: int, deep: bool):
        super().__init__()
        self.ways, hidden = ways, ways * entries
        self.W_1 = nn.Parameter(torch.empty(width, hidden).normal_(std=width**-0.5))
        self.W_2 = nn.Parameter(torch.zeros(hidden, ways * entries))
        self.a = nn.Parameter(torch.zeros(ways, entries))
        with torch.no_grad():
            self.a[:, -1] = 1.0
        self.z = nn.Parameter(torch.full((ways, width), 1e-3)) if deep else None

    def forward(self, *streams: torch.Tensor) -> list[torch.Tensor]:
        with without_autocast(streams[0]):
            normed = rms(streams[-1])
            A = nn.functional.gelu(normed @ self.W_1.to(normed.dtype)) @ self.W_2.to(normed.dtype)
            A = A.unflatten(-1, (self.ways, -1)) + self.a
            sources = streams if self.z is None else [rms(stream) for stream in streams]
            sums = [weighted_sum(weights.unsqueeze(-1).unbind(-2), sources) for weights in A.unbind(-2)]
            if self.z is not None:
                sums = [(streams[-1] + z * rms(each)).to(streams[-1].dtype) for z, each in zip(self.z, sums)]
            return sums


class MUDDLayer(SchemeLayer):
    """The state is the streams `X_0 .. X_i`."""

    def __init__(self, layer, dense: DynamicDense | None):
        super().__init__(layer)
        self.dense = dense

    def forward(self, *streams: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        if self.dense is None:
            return *streams, self.block(*streams, **kwargs)
        *inputs, residual = self.dense(*streams)
        return *streams, self.block(residual, *inputs, **kwargs)


class LastDense(DynamicDense):
    """The model's output, which has only the way of the residual stream."""

    def forward(self, *streams: torch.Tensor) -> torch.Tensor:
        (output,) = super().forward(*streams)
        return output


@dataclasses.dataclass
class MUDD(Scheme):
    """
    MUDD (Xiao et al., 2025, arXiv 2502.12170). With `X_0` the embeddings, block `i` gives `X_i`: attention of
    `LN(X^q)`, `LN(X^k)` and `LN(X^v)` is added to `X^r`, and the feed-forward module to that. After it, for each
    token,

        A = gelu(RMS(X_i) W_1) W_2 + a,    X^c = sum_{j <= i} A^c_j X_j    for c = q, k, v, r

    After the last block there is r alone, the output. `W_1` has `4 (i + 1)` columns (`T + 1` after the last block) and
    is normal with variance `1 / d` at the start, `W_2` is zero and `a` one-hot at `i`: the standard transformer. `LN`
    is the block's one norm, for all three. The feed-forward modules have one width at all depths, unlike the paper's.
    With `deep`, for many blocks, `X^c = X_i + z^c RMS(sum_j A^c_j RMS(X_j))`, where `z` `(d,)` is 1e-3 at the start
    (ours: learned), which is not quite the standard transformer. No weight decay on `a` and `z`, and that of the run
    on `W`. Parameters: `K d + K^2 + K` after each block but the last, with `K = 4 (i + 1)`, and after the last with `K
    = T + 1`.
    """

    deep: bool = setting(False, "Whether sources and sum are normalised, for deep models.")

    def build(self, layers, config):
        width = config.hidden_size
        dense = [None, *(DynamicDense(width, i + 1, 4, self.deep) for i in range(1, len(layers)))]
        return [MUDDLayer(*each) for each in zip(layers, dense)], LastDense(width, len(layers) + 1, 1, self.deep)
