"""ResFormer: value residuals."""

import dataclasses

import torch
from torch import nn

from training.variants.scheme import Connection, Newest, Scheme, SchemeLayer


class OuterValues(nn.Linear):
    """The value projection of a block, which the block calls itself (`project`); the attention takes its values unchanged."""

    def __init__(self, projection: nn.Linear):
        super().__init__(projection.in_features, projection.out_features, projection.bias is not None, device="meta")
        self.weight, self.bias = projection.weight, projection.bias

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


class ValueMix(Connection):
    """`l_1 V_1 + l_2 V_n`."""

    static = ("l",)

    def __init__(self):
        super().__init__()
        self.l = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, first: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (self.l[0] * first + self.l[1] * own).to(own.dtype)


class ResFormerLayer(SchemeLayer):
    """The state is the residual stream, and the values of the first block `(batch, sequence, value heads * head_dim)` before it."""

    def __init__(self, layer, mix: ValueMix | None):
        super().__init__(layer)
        self.self_attn.v_proj = OuterValues(self.self_attn.v_proj)
        self.mix = mix

    def forward(self, *state: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        stream = state[-1]
        normed = self.normed(stream)
        values = self.self_attn.v_proj.project(normed)
        first = values if self.mix is None else state[0]
        if self.mix is not None:
            values = self.mix(first, values)
        stream = stream + self.attend(normed, normed, values, **kwargs)
        return first, stream + self.feed_forward(stream)


@dataclasses.dataclass
class ResFormer(Scheme):
    """
    ResFormer (Zhou et al., 2024, arXiv 2410.17897), with learned weights: the values of block `n > 1` are

        l_1 V_1 + l_2 V_n

    where `V` are those that the blocks' own projections give. Both start as 0.5, so that it does not start as the
    standard transformer. No weight decay. Parameters: 2 for each block but the first.
    """

    def build(self, layers, config):
        return [ResFormerLayer(layer, ValueMix() if i else None) for i, layer in enumerate(layers)], Newest()
