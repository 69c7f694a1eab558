"""Attention Residuals: attention over depth, to the outputs of all layers or of groups of them."""

import dataclasses

import torch
from torch import nn

from training.variants.scheme import EPS, Connection, Scheme, SchemeLayer, setting, weighted_sum, without_autocast


class DepthAttention(Connection):
    """`h = sum_i s_i v_i`, with `s` the softmax over `i` of `w . RMS_g(v_i)`; `w` and `g` are `(d,)`."""

    static = ("g",)

    def __init__(self, width: int):
        super().__init__()
        self.w, self.g = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))

    def logit(self, entry: torch.Tensor) -> torch.Tensor:
        entry = entry.to(torch.promote_types(entry.dtype, torch.float32))
        scale = torch.rsqrt(entry.square().mean(-1) + EPS)
        return entry @ (self.w * self.g).to(entry.dtype) * scale

    def forward(self, *entries: torch.Tensor) -> torch.Tensor:
        with without_autocast(entries[0]):
            weights = torch.stack([self.logit(entry) for entry in entries]).softmax(0)
            return weighted_sum(weights.unsqueeze(-1).unbind(), entries)


class DepthAttentionLayer(SchemeLayer):
    """
    The state is the embeddings, and the sum of the outputs of each group of layers so far.

    Args:
        starts: whether the attention, and the feed-forward module, are the first layers of their groups.
    """

    def __init__(self, layer, attentions: list[nn.Module], starts: list[bool]):
        super().__init__(layer)
        self.attention_over_depth, self.mlp_over_depth = attentions
        self.starts = starts

    def forward(self, *entries: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        output = self.attention(self.attention_over_depth(*entries), **kwargs)
        entries = self.add(entries, output, self.starts[0])
        return self.add(entries, self.feed_forward(self.mlp_over_depth(*entries)), self.starts[1])

    @staticmethod
    def add(entries: tuple[torch.Tensor, ...], output: torch.Tensor, starts: bool) -> tuple[torch.Tensor, ...]:
        return (*entries, output) if starts else (*entries[:-1], entries[-1] + output)


@dataclasses.dataclass
class AttentionResiduals(Scheme):
    """
    Attention Residuals (arXiv 2603.15031). Each attention and each feed-forward module is a layer `f_i`, its norm
    inside; with `v_0` the embedding and `v_i = f_i(h_i)`,

        h_l = sum_{i < l} s_{l,i} v_i,    s_l = softmax over i of w_l . RMS_g(v_i)

    and once more before the norm of the output. `RMS_g` has a learned weight; the values are not normalised. `w` is zero at
    the start: `h` is the mean of all entries, which norms before the modules (see `norm_placement`) map to the same as their
    sum. With these, it is the standard transformer, except for the norms' epsilon. `g` has no weight decay, and `w` that of
    the run. The first layer has a single entry to attend to, and no `w` and `g`. Parameters: `2 d` for each other layer, and
    for the output.
    """

    def num_groups(self, num_layers: int) -> int:
        return num_layers

    def build(self, layers, config):
        count, width = 2 * len(layers), config.hidden_size
        groups = [index * self.num_groups(count) // count for index in range(count)]
        starts = [index == 0 or groups[index] != groups[index - 1] for index in range(count)]
        attentions = [nn.Identity(), *(DepthAttention(width) for _ in range(count))]
        built = [
            DepthAttentionLayer(layer, attentions[2 * i : 2 * i + 2], starts[2 * i : 2 * i + 2])
            for i, layer in enumerate(layers)
        ]
        return built, attentions[-1]


@dataclasses.dataclass
class BlockAttentionResiduals(AttentionResiduals):
    """
    Attention Residuals in blocks (arXiv 2603.15031): the layers are in `groups`, as even as can be. With `b_0` the
    embedding and `b_n` the sum of the outputs of group `n`, its first layer attends to `b_0 .. b_{n-1}`, its others
    also to the sum of their own group so far, and the output to all. With as many groups as layers these are
    [`AttentionResiduals`]. Parameters: as there.
    """

    groups: int | None = setting(
        None, "The number of groups; by default 8, or the number of layers if that is less.", 1
    )

    def num_groups(self, num_layers):
        if self.groups is not None and self.groups > num_layers:
            raise ValueError(
                f"`groups` of `variant_fields` is {self.groups}, but there are {num_layers} layers, two a block."
            )
        return self.groups or min(8, num_layers)
