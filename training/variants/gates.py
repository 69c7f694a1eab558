"""Other forms of the gate."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_dca import GeneralizedResidual
from modeling_dca.grn import GATE_NORM_EPS


class AlteredGate(GeneralizedResidual):
    """A generalized residual in plain PyTorch with another form of the gate."""

    def pre_activations(self, entry: torch.Tensor) -> torch.Tensor:
        """`w . n(f)` of an entry `(..., hidden_size)`: `(..., outputs)`."""
        scale = torch.rsqrt(entry.square().mean(-1, keepdim=True) + GATE_NORM_EPS)
        return nn.functional.linear(entry, self.gate) * scale

    def weight(self, b: torch.Tensor, pre_activation: torch.Tensor) -> torch.Tensor:
        """The weight of an entry, from `b` `(hidden_size,)` and `pre_activation` `(..., 1)`."""
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
    """A gate that starts at zero with `torch.relu`, whose gradient at 0 is 0: it never learns (the first reading)."""

    def weight(self, b, pre_activation):
        return b + torch.relu(pre_activation)


class RawGate(AlteredGate):
    """`b + relu(w . f)`: the gate sees the entry without a norm, and grows with it (the second reading)."""

    def pre_activations(self, entry):
        return nn.functional.linear(entry, self.gate)

    def weight(self, b, pre_activation):
        return b + pre_activation.clamp(min=0)  # clamp: open at exactly 0


class BiasInsideGate(AlteredGate):
    """`relu(b + w . n(f))`: live at the start by itself, and no weight is negative (the fourth reading)."""

    def weight(self, b, pre_activation):
        return (b + pre_activation).clamp(min=0)


def set_gates(gate_class: type[AlteredGate], model: PreTrainedModel) -> None:
    """
    Give all generalized residuals of a new model another form of gate.

    Raises:
        `ValueError`: the model has no gates.
    """
    network = model.base_model
    if network.residual.gate is None:
        raise ValueError(f"`residual_scheme` is {model.config.residual_scheme!r}, which has no gate to alter.")
    for module in (*network.layers, network):
        whole = module.residual
        module.residual = gate_class(model.config, whole.num_blocks, outputs=len(whole.delta))


dead_gate, raw_gate, bias_inside_gate = (partial(set_gates, each) for each in (DeadGate, RawGate, BiasInsideGate))


@torch.no_grad()
def random_gate(model: PreTrainedModel) -> None:
    """Gates that start at small random values, as other weights do: the model does not start as the plain residual sum."""
    for name, parameter in model.named_parameters():
        if name.endswith("residual.gate"):
            parameter.normal_(std=model.config.initializer_range)


def no_gate(model: PreTrainedModel) -> None:
    """DCA with `b` alone: the gates are gone."""
    network = model.base_model
    for module in (*network.layers, network):
        module.residual.gate = None


def three_norms(model: PreTrainedModel) -> None:
    """The residual sum, of which queries, keys and values have a norm each, and nothing else of DCA."""
    no_gate(model)
    network = model.base_model
    for module in (*network.layers, network):
        module.residual.delta.requires_grad_(False)  # at its start, 0, it is the sum
