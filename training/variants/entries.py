"""Generalized residuals of only some entries of the stack (paper, table 9)."""

import torch
from transformers import PreTrainedModel

from modeling_dca import GeneralizedResidual


class ChosenResidual(GeneralizedResidual):
    """
    A generalized residual of some entries of the stack; the others are left out, not merged.

    Args:
        first, last (`int`): the number of first and of last entries that it takes.
    """

    def __init__(self, whole: GeneralizedResidual, first: int, last: int):
        outputs, entries, _ = whole.delta.shape
        self.chosen = [i for i in range(entries) if i < first or i >= entries - last]
        self.chosen_spans = [whole.spans()[i] for i in self.chosen]
        super().__init__(whole.config, num_blocks=len(self.chosen) - 1, outputs=outputs)

    def forward(self, *stack: torch.Tensor) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]:
        *outputs, _ = super().forward(*(stack[i] for i in self.chosen))
        return *outputs, stack

    def spans(self) -> list[tuple[int, int]]:
        return self.chosen_spans


def choose_entries(first: int, last: int, model: PreTrainedModel) -> None:
    """Let the blocks and the output of a new model see only the `first` first and the `last` last entries."""
    network = model.base_model
    for module in (*network.layers, network):
        module.residual = ChosenResidual(module.residual, first, last)
