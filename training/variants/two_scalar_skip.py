"""The two-scalar skip of nanochat."""

import dataclasses

import torch
from torch import nn

from training.variants.scheme import Connection, Newest, Scheme, SchemeLayer, setting, weighted_sum, without_autocast


class TwoScalars(Connection):
    """`r x + s x_0`."""

    static = ("r", "s")

    def __init__(self):
        super().__init__()
        self.r, self.s = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, stream: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        with without_autocast(stream):
            return weighted_sum([self.r, self.s], [stream, embeddings])


class TwoScalarLayer(SchemeLayer):
    """The state is the embeddings and the residual stream."""

    def __init__(self, layer):
        super().__init__(layer)
        self.skip = TwoScalars()

    def forward(self, *state: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        embeddings, stream = state[0], state[-1]
        return embeddings, self.block(self.skip(stream, embeddings), **kwargs)


@dataclasses.dataclass
class TwoScalarSkip(Scheme):
    """
    The two-scalar skip of nanochat (Karpathy, 2025): before each block, with `x_0` the embeddings,

        x <- r x + s x_0

    `r` starts as 1 and `s` as 0: the standard transformer. `r` has a hundredth of the learning rate; no weight decay.
    (In nanochat `x_0` is normalised first; here it is the backbone's.) Parameters: 2 a block.
    """

    r_learning_rate: float = setting(0.01, "Learning rate of r, as a multiple of the other connections'.", 0)

    def learning_rate_of(self, parameter):
        return self.connection_learning_rate * (self.r_learning_rate if parameter == "r" else 1.0)

    def build(self, layers, config):
        return [TwoScalarLayer(layer) for layer in layers], Newest()
