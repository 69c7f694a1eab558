"""DenseFormer: depth-weighted averages of the residual streams."""

import dataclasses

import torch
from torch import nn

from training.variants.scheme import Connection, Scheme, SchemeLayer, setting, weighted_sum, without_autocast


class DepthWeightedAverage(Connection):
    """
    `Y_i = sum_j a_ij X_j` over those `j <= i` with `j = i (mod dilation)`. After blocks without an average, `Y_i = X_i`.

    Args:
        block: `i`, the number of blocks before.
    """

    static = ("a",)

    def __init__(self, block: int, dilation: int, period: int):
        super().__init__()
        self.entries = range(block % dilation, block + 1, dilation)
        self.a = None
        if block > 0 and block % period == 0:
            self.a = nn.Parameter(torch.zeros(len(self.entries)))
            with torch.no_grad():
                self.a[-1] = 1.0

    def forward(self, *streams: torch.Tensor) -> torch.Tensor:
        if self.a is None:
            return streams[-1]
        with without_autocast(streams[0]):
            return weighted_sum(self.a.unbind(), [streams[j] for j in self.entries])


class DenseFormerLayer(SchemeLayer):
    """`X_i = Block_i(Y_{i-1})`; the state is `X_0 .. X_i`."""

    def __init__(self, layer, average: DepthWeightedAverage):
        super().__init__(layer)
        self.average = average

    def forward(self, *streams: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        return *streams, self.block(self.average(*streams), **kwargs)


@dataclasses.dataclass
class DenseFormer(Scheme):
    """
    DenseFormer (Pagliardini et al., 2024, arXiv 2402.02622). With `X_0` the embeddings, and whole pre-norm blocks,
    their residual sums inside,

        X_i = Block_i(Y_{i-1}),    Y_i = sum_{j <= i} a_ij X_j,    Y_0 = X_0,

    and the output is `Y_T`. At the start `a_ii = 1` and the rest 0: the standard transformer, exactly. Its entries are
    the residual streams, each of which holds all before it; those of GRN-v1 are what the blocks add to the stream.
    `1x1` is dilation 1 and period 1.

    Parameters: `a`, of `floor(i / dilation) + 1` numbers after each block `i` that `period` divides.
    """

    dilation: int = setting(1, "Only streams j = i (mod dilation) are averaged.", 1)
    period: int = setting(1, "Averages are taken only after every `period` blocks.", 1)

    def build(self, layers, config):
        averages = [DepthWeightedAverage(i, self.dilation, self.period) for i in range(len(layers) + 1)]
        if all(average.a is None for average in averages):
            raise ValueError(
                f"`period` is {self.period}, but there are {len(layers)} blocks: nothing would be averaged."
            )
        return [DenseFormerLayer(*each) for each in zip(layers, averages)], averages[-1]
