"""
Train a language model with one part of DCA altered, for studies of what that part is good for:

    python -m training.altered CONFIGURATION.yaml --alteration NAME [--field value ...]

All else is as in `training.causal_lm`. The alterations are in `ALTERATIONS` below; they are not for models to be used.
"""

import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import nn
from transformers import TrainerCallback

from modeling_dca import ALL_GRN_FUNCTIONS, DCAConfig, DCAForCausalLM, GeneralizedResidual, generalized_residual
from modeling_dca.configuration_dca import nearest_name
from training.arguments import Run, parse_run
from training.causal_lm import CausalLMArguments, train_language_model
from training.errors import UserError, command
from training.text import TextDataArguments


class AlteredForCausalLM(DCAForCausalLM):
    """A model that is DCA but for one part, and whose code is not saved with it."""

    _auto_class = None
    _auto_map = {}


def literal_generalized_residual(
    stack: Sequence[torch.Tensor], delta: torch.Tensor, gate: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """[`generalized_residual`] with `torch.relu`, whose gradient at exactly 0 is 0."""
    outputs = list(generalized_residual(stack, delta))
    for entry in () if gate is None else stack:
        open_gates = torch.relu(nn.functional.linear(entry, gate))
        for index in range(len(outputs)):
            outputs[index] = outputs[index] + open_gates[..., index, None] * entry
    return tuple(outputs)


ALL_GRN_FUNCTIONS.register("literal", literal_generalized_residual)


class LiteralGateForCausalLM(AlteredForCausalLM):
    """Gates as the paper writes them, zero behind a `relu`."""

    def __init__(self, config: DCAConfig):
        config.grn_implementation = "literal"
        super().__init__(config)


class RandomGateForCausalLM(AlteredForCausalLM):
    """Gates that start at small random values, as all other weights do: the model does not start as the plain residual sum."""

    @torch.no_grad()
    def __init__(self, config: DCAConfig):
        super().__init__(config)
        for name, parameter in self.named_parameters():
            if name.endswith("residual.gate"):
                parameter.normal_(std=config.initializer_range)


class ChosenResidual(GeneralizedResidual):
    """
    A generalized residual of some entries of the stack; the others are left out, not merged.

    Args:
        first, last (`int`): how many of the first and of the last entries it takes.
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


class ChosenOutputsForCausalLM(AlteredForCausalLM):
    """Blocks, and the model's output, that see some entries alone (paper, table 9)."""

    first, last = 0, 0

    def __init__(self, config: DCAConfig):
        super().__init__(config)
        for module in (*self.model.layers, self.model):
            module.residual = ChosenResidual(module.residual, self.first, self.last)


class LastFourForCausalLM(ChosenOutputsForCausalLM):
    last = 4


class InputAndLastThreeForCausalLM(ChosenOutputsForCausalLM):
    first, last = 1, 3


class DecayOfB(TrainerCallback):
    """
    Puts another pull on `b = 1 + delta` in the place of AdamW's, which draws it to 1 by `lr * weight_decay * delta` in a
    step: one that draws it to 0, by `lr * weight_decay * b`, or none.
    """

    def __init__(self, to_zero: bool):
        self.to_zero = to_zero

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        deltas = (parameter for name, parameter in model.named_parameters() if name.endswith("residual.delta"))
        self.before = [(delta, delta.clone()) for delta in deltas]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        pull = optimizer.param_groups[0]["lr"] * args.weight_decay
        for delta, before in self.before:
            delta.add_(pull * before)
            if self.to_zero:
                delta.sub_(pull * (1 + before))


#: By name: the model, and callbacks of the trainer.
ALTERATIONS = {
    "literal_gate": (LiteralGateForCausalLM, ()),
    "random_gate": (RandomGateForCausalLM, ()),
    "last_4": (LastFourForCausalLM, ()),
    "input_and_last_3": (InputAndLastThreeForCausalLM, ()),
    "decay_b_to_0": (DCAForCausalLM, (DecayOfB(to_zero=True),)),
    "no_decay_of_b": (DCAForCausalLM, (DecayOfB(to_zero=False),)),
}


@dataclasses.dataclass
class AlteredArguments(CausalLMArguments):
    """The fields of a language model's run, and what is altered."""

    alteration: str | None = dataclasses.field(
        default=None, metadata={"help": f"What is altered: {', '.join(ALTERATIONS)}."}
    )

    def __post_init__(self):
        if self.alteration is not None and self.alteration not in ALTERATIONS:
            raise ValueError(f"`alteration` is {self.alteration!r}; {nearest_name(self.alteration, ALTERATIONS)}")
        super().__post_init__()


def check_alteration(run: Run) -> None:
    """
    Raises:
        [`UserError`]: there is nothing to alter, more would be altered, or less, than the run's own model, or it would be
            published as what it is not.
    """
    altered = f"`alteration` is {run.training.alteration!r}"
    if run.config.residual_scheme == "standard":
        raise UserError(
            f"{altered}, but the 'standard' scheme has nothing to alter: choose another `residual_scheme`."
        )
    if run.training.baseline not in (None, "none"):
        raise UserError(f"{altered}, which the `baseline` would have, too: leave `baseline` out, and train it alone.")
    if run.initial_checkpoint is not None:
        raise UserError(f"{altered}, which is for models that start anew: leave `initial_checkpoint` out.")
    if run.training.push_to_hub:
        raise UserError(f"{altered}, which makes a model that is not for use: leave `push_to_hub` out.")


@command
def main():
    run = parse_run(
        sys.argv[1:],
        "training.altered",
        "Train a language model with one part of DCA altered.",
        DCAForCausalLM,
        TextDataArguments,
        AlteredArguments,
    )
    if run.training.alteration is not None:
        check_alteration(run)
    model_class, callbacks = ALTERATIONS.get(run.training.alteration, (DCAForCausalLM, ()))
    train_language_model(run, model_class, callbacks=list(callbacks))


if __name__ == "__main__":
    main()
