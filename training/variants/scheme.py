"""
Other residual schemes, on the backbone of a standard transformer: its blocks run without their residual sums, which the scheme
replaces.

A scheme passes a state from block to block: a tuple of tensors, initially only the embeddings `(batch, sequence,
hidden_size)`. Attention, feed-forward module, norms, positions and their initial weights are those of the standard
transformer with the same seed. The parameters of a scheme are in [`Connection`]s, in plain PyTorch.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from modeling_dca import DCABaseConfig, GeneralizedResidual
from modeling_dca.configuration_dca import nearest_name
from modeling_dca.grn import output_dtype
from modeling_dca.modeling_dca import DCALayer
from training.support.errors import UserError


EPS = 1e-6


# Operations


def rms(states: torch.Tensor) -> torch.Tensor:
    """`RMS(x)` over the last dimension, without a weight, in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + EPS)


def without_autocast(states: torch.Tensor):
    """A context without autocast, so that residual streams are not rounded: it is meant for matrix products."""
    return maybe_autocast(states.device.type, enabled=False)


def weighted_sum(weights: Sequence[torch.Tensor], entries: Sequence[torch.Tensor]) -> torch.Tensor:
    """`sum_j w_j x_j` of weights, scalars or `(..., 1)`, and entries `(..., d)`, with the sum in float32 at least."""
    dtype = output_dtype(entries)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    total = weights[0].to(compute_dtype) * entries[0].to(compute_dtype)
    for weight, entry in zip(weights[1:], entries[1:], strict=True):
        total = torch.addcmul(total, weight.to(compute_dtype), entry.to(compute_dtype))
    return total.to(dtype)


# Parts of schemes


class Connection(nn.Module):
    """
    The parameters of a scheme in one place. For those that `static` names, such as the weight of the residual stream, 0 is
    not neutral, and weight decay would be harmful.
    """

    static: ClassVar[tuple[str, ...]] = ()


class SchemeLayer(GradientCheckpointingLayer):
    """
    The modules of a standard block, with their norms and without the residual sums. A scheme's `forward` takes the state and
    returns the new one; its keyword arguments are for the attention.
    """

    def __init__(self, layer: DCALayer):
        super().__init__()
        self.residual = layer.residual  # returns its only entry; hidden states are recorded there
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.attention_output_norm, self.mlp_output_norm = layer.attention_output_norm, layer.mlp_output_norm

    def normed(self, attention_input: torch.Tensor) -> torch.Tensor:
        """The normed input of the attention, if queries, keys and values share one."""
        attention_input, _ = self.residual(attention_input)
        return self.input_layernorm(attention_input)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs) -> torch.Tensor:
        """The output of the attention for normed inputs."""
        output, _ = self.self_attn(query, key, value, **kwargs)
        return output if self.attention_output_norm is None else self.attention_output_norm(output)

    def attention(self, query: torch.Tensor, *others: torch.Tensor, **kwargs) -> torch.Tensor:
        """The output of the attention for the input of the queries, and those of keys and values if they differ."""
        inputs = [self.normed(query), *map(self.input_layernorm, others)]
        return self.attend(*(inputs if others else 3 * inputs), **kwargs)

    def feed_forward(self, mlp_input: torch.Tensor) -> torch.Tensor:
        """The output of the feed-forward module."""
        output = self.mlp(self.post_attention_layernorm(mlp_input))
        return output if self.mlp_output_norm is None else self.mlp_output_norm(output)

    def block(self, stream: torch.Tensor, *inputs: torch.Tensor, **kwargs) -> torch.Tensor:
        """The whole standard block, with its sums, on a stream; `inputs` are those of the attention, if they differ."""
        stream = stream + self.attention(*(inputs or (stream,)), **kwargs)
        return stream + self.feed_forward(stream)


class ModuleLayer(SchemeLayer):
    """
    A block of a scheme that treats the attention and the feed-forward module alike, each as a layer `f`.

    Args:
        connections: one for each of the two modules. Each takes the state and `f`, a function of one tensor that includes
            the norms, and returns the new state, a tuple.
    """

    def __init__(self, layer: DCALayer, connections: Sequence[Connection]):
        super().__init__(layer)
        self.attention_connection, self.mlp_connection = connections

    def forward(self, *state: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        state = self.attention_connection(state, partial(self.attention, **kwargs))
        return self.mlp_connection(state, self.feed_forward)


class Newest(nn.Module):
    """The model's output is the last tensor of the state."""

    def forward(self, *state: torch.Tensor) -> torch.Tensor:
        return state[-1]


class Output(nn.Module):
    """
    Replaces the generalized residual that forms the model's output.

    Args:
        residual: that of the standard transformer, which returns its only entry; the last hidden state is recorded there.
        connection: forms the output `(batch, sequence, hidden_size)` from the state of the last block.
    """

    delta = gate = None

    def __init__(self, residual: GeneralizedResidual, connection: nn.Module):
        super().__init__()
        self.residual, self.connection = residual, connection

    def forward(self, *state: torch.Tensor) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], ...]:
        return self.residual(self.connection(*state))


# Settings

#: The types of settings, for error messages.
WORDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


def setting(default: Any, help: str, least: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


@dataclasses.dataclass
class Scheme:
    """
    A residual scheme: its settings (the `variant_fields` of a run), and how it builds a model.

    Raises:
        `ValueError`: a setting has another type than its default, or is too small.
    """

    connection_learning_rate: float = setting(1.0, "Learning rate of the connections, as a multiple of the run's.", 0)
    static_weight_decay: float = setting(0.0, "Weight decay of connections for which 0 is not neutral.", 0)
    dynamic_weight_decay: float | None = setting(None, "Weight decay of other connections; by default the run's.", 0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), getattr(field.type, "__args__", (field.type,))
            named, least = f"`{field.name}` of `variant_fields` is {value!r}", field.metadata["least"]
            if float in kinds and type(value) in (int, str):
                with contextlib.suppress(ValueError):
                    value = float(value)  # in YAML 1.1, 1e-3 is not a number
            if type(value) not in kinds:
                raise ValueError(f"{named}; it must be {' or '.join(WORDS[kind] for kind in kinds)}.")
            if value is not None and least is not None and not least <= value < math.inf:
                raise ValueError(f"{named}; it must be at least {least}, and finite.")
            setattr(self, field.name, value)

    def build(self, layers: Sequence[DCALayer], config: DCABaseConfig) -> tuple[list[SchemeLayer], nn.Module]:
        """
        The blocks of a model, made from those of a new standard transformer, and the module that forms the model's output
        from the last state.

        Raises:
            `ValueError`: a setting does not fit the model.
        """
        raise NotImplementedError

    def learning_rate_of(self, parameter: str) -> float:
        """The learning rate of a connection's parameter, by its name, as a multiple of the run's."""
        return self.connection_learning_rate


def read_settings(scheme_class: type[Scheme], fields: dict[str, Any]) -> Scheme:
    """
    A scheme with the settings of a run.

    Raises:
        `ValueError`: a setting is unknown, or has an invalid value.
    """
    known = [field.name for field in dataclasses.fields(scheme_class)]
    for name in fields:
        if name not in known:
            raise ValueError(f"`variant_fields` has an unknown field {name!r}; {nearest_name(name, known)}")
    return scheme_class(**fields)


def set_scheme(scheme_class: type[Scheme], model: PreTrainedModel) -> None:
    """
    Give a new standard transformer another residual scheme, with the settings in `config.variant_fields`.

    Raises:
        `ValueError`: the model is not a standard transformer, or a setting is invalid.
    """
    config, network = model.config, model.base_model
    if config.residual_scheme != "standard":
        raise ValueError(
            f"`residual_scheme` is {config.residual_scheme!r}, but the variant is itself a scheme: it must be 'standard'."
        )
    if config.parallel_blocks:
        raise ValueError(
            "`parallel_blocks` is true, but the variant needs attention and feed-forward module in sequence: leave it out."
        )
    scheme = read_settings(scheme_class, getattr(config, "variant_fields", None) or {})
    layers, output = scheme.build(network.layers, config)
    network.layers, network.residual = nn.ModuleList(layers), Output(network.residual, output)
    network.scheme = scheme
    for each in (network, model):  # (units of sharding and device placement)
        each._no_split_modules = sorted({type(layer).__name__ for layer in layers})


def set_connection_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """
    Put the connections of a scheme's model into separate parameter groups of a new optimizer, with the scheme's learning rates
    and weight decays. Other models are not changed.

    Raises:
        [`UserError`]: the optimizer does not support it.
    """
    scheme = next(
        (module.scheme for module in model.modules() if isinstance(getattr(module, "scheme", None), Scheme)), None
    )
    if scheme is None:
        return
    decay = max((group.get("weight_decay", 0.0) for group in optimizer.param_groups), default=0.0)
    settings = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, Connection) else ():
            of_others = decay if scheme.dynamic_weight_decay is None else scheme.dynamic_weight_decay
            own = scheme.static_weight_decay if name in module.static else of_others
            settings[id(parameter)] = (scheme.learning_rate_of(name), own)
    added = {}
    for index, group in enumerate(optimizer.param_groups):
        kept = []
        for parameter in group["params"]:
            if id(parameter) in settings:
                added.setdefault((index, *settings.pop(id(parameter))), []).append(parameter)
            else:
                kept.append(parameter)
        group["params"] = kept
    if settings or any(group.get("lr") is None for group in optimizer.param_groups):
        raise UserError(
            f"`optim` is a {type(optimizer).__name__}, which does not support separate learning rates and weight decays for the "
            "connections of the variant: choose 'adamw_torch'."
        )
    for (index, learning_rate, own_decay), parameters in added.items():
        group = {**optimizer.param_groups[index], "params": parameters}
        optimizer.add_param_group({**group, "lr": learning_rate * group["lr"], "weight_decay": own_decay})
