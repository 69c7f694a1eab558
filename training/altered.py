"""
Train a language model with one part of DCA altered, for studies of what that part is good for:

    python -m training.altered CONFIGURATION.yaml --alteration NAME [--field value ...]

All else is as in `training.causal_lm`. The alterations are in `ALTERATIONS` below; they are not for models to be used.
"""

import dataclasses
import sys

import torch
from torch import nn
from transformers import TrainerCallback

from modeling_dca import DCAConfig, DCAForCausalLM, GeneralizedResidual
from modeling_dca.configuration_dca import nearest_name
from modeling_dca.grn import GATE_NORM_EPS
from training.arguments import Run, parse_run
from training.causal_lm import CausalLMArguments, train_language_model
from training.errors import UserError, command
from training.text import TextDataArguments


class AlteredForCausalLM(DCAForCausalLM):
    """A model that is DCA but for one part, and whose code is not saved with it."""

    _auto_class = None
    _auto_map = {}


class AlteredGate(GeneralizedResidual):
    """A generalized residual in plain PyTorch, whose gate is of another form."""

    def pre_activations(self, entry: torch.Tensor) -> torch.Tensor:
        """`w . n(f)` of an entry `(..., hidden_size)`: `(..., outputs)`."""
        scale = torch.rsqrt(entry.square().mean(-1, keepdim=True) + GATE_NORM_EPS)
        return nn.functional.linear(entry, self.gate) * scale

    def weight(self, b: torch.Tensor, pre_activation: torch.Tensor) -> torch.Tensor:
        """What an entry is multiplied by, of `b` `(hidden_size,)` and `pre_activation` `(..., 1)`."""
        raise NotImplementedError

    def forward(self, *stack: torch.Tensor) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]:
        outputs = [0.0] * len(self.delta)
        for i, entry in enumerate(stack):
            pre_activations = self.pre_activations(entry)
            for output, delta in enumerate(self.delta[:, i]):
                weight = self.weight(1 + delta, pre_activations[..., output, None])
                outputs[output] = outputs[output] + weight * entry
        return *outputs, stack

    def gates(self, entry: torch.Tensor, index: int) -> torch.Tensor:
        pre_activations = self.pre_activations(entry.float())
        added = [
            (self.weight(1 + delta, pre_activations[..., output, None]) - (1 + delta)).mean(-1)
            for output, delta in enumerate(self.delta[:, index])
        ]
        return torch.stack(added, dim=-1)


class DeadGate(AlteredGate):
    """Zero behind `torch.relu`, whose gradient at exactly 0 is 0: the gate never learns (method, the first reading)."""

    def weight(self, b, pre_activation):
        return b + torch.relu(pre_activation)


class RawGate(AlteredGate):
    """`b + relu(w . f)`: the gate sees the entry as it is, and grows with it (the second reading)."""

    def pre_activations(self, entry):
        return nn.functional.linear(entry, self.gate)

    def weight(self, b, pre_activation):
        return b + pre_activation.clamp(min=0)  # clamp: open at exactly 0


class BiasInsideGate(AlteredGate):
    """`relu(b + w . n(f))`: live at the start by itself, and no weight is negative (the fourth reading)."""

    def weight(self, b, pre_activation):
        return (b + pre_activation).clamp(min=0)


class AlteredGateForCausalLM(AlteredForCausalLM):
    """A model whose gates are all of another form."""

    gate_class: type[AlteredGate]

    def __init__(self, config: DCAConfig):
        super().__init__(config)
        if self.model.residual.gate is None:
            raise ValueError(f"`residual_scheme` is {config.residual_scheme!r}, which has no gate to alter.")
        for module in (*self.model.layers, self.model):
            whole = module.residual
            module.residual = self.gate_class(config, whole.num_blocks, outputs=len(whole.delta))


class DeadGateForCausalLM(AlteredGateForCausalLM):
    gate_class = DeadGate


class RawGateForCausalLM(AlteredGateForCausalLM):
    gate_class = RawGate


class BiasInsideGateForCausalLM(AlteredGateForCausalLM):
    gate_class = BiasInsideGate


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
    "dead_gate": (DeadGateForCausalLM, ()),
    "raw_gate": (RawGateForCausalLM, ()),
    "bias_inside_gate": (BiasInsideGateForCausalLM, ()),
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
