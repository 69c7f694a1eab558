"""
DeepCrossAttention (DCA) language models: Llama's parts, in Llama's places, around generalized residuals.

Heddes et al., "DeepCrossAttention: Supercharging Transformer Residual Connections", ICML 2025, arXiv 2502.06785.
"""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import AutoModel, modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dca import DCABaseConfig, DCAConfig, nearest_name
from .grn import GeneralizedResidual, push
from .grn_cpu import generalized_residual_cpu  # noqa: F401 (it registers itself)
from .grn_triton import generalized_residual_triton  # noqa: F401 (it registers itself)
from .norm import NORMS, DCAZeroCenteredRMSNorm, build_norm, normalized_residual
from .sums import without_sums


if TYPE_CHECKING:
    from .pipeline import DCAPipelineStage

#: The installed transformers' name of the key-value cache: `past_key_values` until 5.23, `cache` since.
CACHE_NAME = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"


A_CACHE = (Cache, type(None))

#: Arguments that any forward passes on to the model's modules: those of transformers for all models, and those that it adds.
HANDED_ON = {
    *TransformersKwargs.__annotations__,
    "return_dict",
    "use_cache",
    "debug_io",
    "debug_io_dir",
    "prune_layers",
}
#: Those of them that are only for text.
OF_TEXT = {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
#: What transformers' models took before 5, and have taken no notice of since: the cache knows its length. Tools still give it.
DROPPED = {"cache_position"}


def named_arguments(forward: Callable) -> Callable:
    """
    Decorates a `forward` with `**kwargs`. The caller may name the key-value cache `cache` or `past_key_values`, with every
    version of transformers. An argument that no module takes is an error.

    Raises:
        `TypeError`: an argument, other than `None`, is no parameter of `forward`, of the attention function or of the
            loss; or the cache is of another type than `Cache`.
        `ValueError`: the call has two caches.
    """
    parameters = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]
    names = ("cache", "past_key_values")
    name, other = names if "past_key_values" not in parameters else reversed(names)
    known = {*parameters, *HANDED_ON} - (OF_TEXT if "pixel_values" in parameters else set())

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        if isinstance(kwargs.get(name), A_CACHE) and kwargs.keys() <= known:
            return forward(self, *args, **kwargs)  # the fast path, for every block and token
        for key in names:
            if isinstance(kwargs.get(key), (tuple, list, dict, torch.Tensor)):
                raise TypeError(
                    f"`{key}` is a {type(kwargs[key]).__name__}; give a `Cache`, such as `DynamicCache()`."
                )
        # Continuous batching has a cache of another class, and arguments that only it and the attention function use.
        paged = name in parameters and ("paged_cache" in kwargs or not isinstance(kwargs.get("cache"), A_CACHE))
        if paged and CACHE_NAME != "cache" and "cache" in kwargs:
            # Before 5.24 the attention function takes it as `cache`, and no other module does.
            kwargs["paged_cache"] = kwargs.pop("cache")
        if name in parameters and (cache := kwargs.pop(other, None)) is not None:
            if kwargs.get(name) is not None:
                raise ValueError(
                    "`cache` and `past_key_values` are names of the same argument: give only one of them."
                )
            if other != CACHE_NAME == "cache" and not torch.compiler.is_compiling():
                warnings.warn(
                    f"`{other}` is deprecated: `cache` is its name since transformers 5.24.", FutureWarning, 2
                )
            kwargs[name] = cache
        unknown = () if paged else [key for key in kwargs if key not in known]
        for key in unknown:
            if kwargs[key] is None or key in DROPPED and name in parameters:
                kwargs.pop(key)
            else:
                check_unknown(self, key, parameters)
        return forward(self, *args, **kwargs)

    return wrapper


def check_unknown(module: nn.Module, name: str, parameters: Iterable[str]) -> None:
    """Raises `TypeError` if neither the attention function nor, in models with `labels`, the loss takes `name`."""
    functions = [ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)]
    if "labels" in parameters:
        functions.append(module.loss_function)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    if name not in known - {"kwargs", "cache", "past_key_values"}:
        message = f"{type(module).__name__} takes no `{name}`; "
        if name == "token_type_ids":
            raise TypeError(message + "call the tokenizer with `return_token_type_ids=False`.")
        raise TypeError(message + nearest_name(name, parameters))


def take_loss_arguments(model: PreTrainedModel, kwargs: dict) -> dict:
    """Moves the arguments that only the loss of `model` takes, such as `shift_labels`, out of `kwargs`; returns them."""
    names = [name for name in kwargs if name not in HANDED_ON]
    known = inspect.signature(model.loss_function).parameters if names else ()
    return {name: kwargs.pop(name) for name in names if name in known}


class DCAScaledEmbedding(nn.Embedding):
    """An embedding times a constant, as in Gemma."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, multiplier: float):
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.multiplier = multiplier

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(input_ids)
        # Gemma rounds the constant to the type of the embeddings.
        return embeddings * embeddings.new_full((), self.multiplier)


def build_embedding(config: DCAConfig) -> nn.Embedding:
    """The token embedding, times `config.embedding_multiplier`."""
    padding = config.pad_token_id
    # (Some tokenizers have a padding id outside of the vocabulary.)
    padding = None if padding is None or padding >= config.vocab_size else padding
    sizes = (config.vocab_size, config.hidden_size, padding)
    if config.embedding_multiplier == 1:
        return nn.Embedding(*sizes)
    return DCAScaledEmbedding(*sizes, config.embedding_multiplier)


class DCARotaryEmbedding(nn.Module):
    """Llama's rotary embedding. With a `partial_rotary_factor` it rotates the first features of each head."""

    def __init__(self, config: DCAConfig, layer_type: str | None = None):
        super().__init__()
        if layer_type is not None:
            config = copy.copy(config)
            config.rope_parameters = config.rope_parameters[layer_type]
        self.config = config
        # `dynamic_rope_update` reads these, for frequencies that depend on the length.
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init_frequencies = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init_frequencies = ROPE_INIT_FUNCTIONS[self.rope_type]
        frequencies, self.attention_scaling = init_frequencies(config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DCAConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """The frequencies of the `"default"` type `(width / 2,)`, and the factor of cosine and sine."""
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return (1.0 / config.rope_parameters["rope_theta"] ** exponents).to(device), 1.0

    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of `position_ids`, `(batch, sequence, width)` each, in type and on device of `hidden_states`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """Rotates queries and keys. Name and arguments are those of transformers' models, for which the Hub has kernels."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotated(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(q), rotated(k)


def rotate(
    query_states: torch.Tensor, key_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first `cos.shape[-1]` features of both, `(batch, heads, sequence, head_dim)`."""
    width = cos.shape[-1]
    if width == query_states.shape[-1]:
        return apply_rotary_pos_emb(query_states, key_states, cos, sin)
    query_part, key_part = apply_rotary_pos_emb(query_states[..., :width], key_states[..., :width], cos, sin)
    return (
        torch.cat((query_part, query_states[..., width:]), dim=-1),
        torch.cat((key_part, key_states[..., width:]), dim=-1),
    )


def soft_capped(values: torch.Tensor, softcap: float) -> torch.Tensor:
    return torch.tanh(values / softcap) * softcap


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch, with transformers' interface. It also returns the attention weights."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        weights = soft_capped(weights, softcap)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def sincos_embedding(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed sine and cosine embedding, `(..., width)` in float32, of `positions` `(...)`; `width` is even."""
    frequencies = torch.arange(width // 2, device=positions.device, dtype=torch.float32) / max(width // 2 - 1, 1)
    angles = positions[..., None].float() * 10000.0**-frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class DCAMLP(nn.Module):
    """The feed-forward module without gating, as in the paper."""

    def __init__(self, config: DCABaseConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class DCAGatedMLP(nn.Module):
    """The feed-forward module with gating, as in Llama."""

    def __init__(self, config: DCABaseConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_kernelized_func(apply_rotary_pos_emb)
class DCAAttention(nn.Module):
    """Llama's attention. Queries, keys and values may be projections of different inputs."""

    def __init__(self, config: DCABaseConfig, layer_idx: int, is_causal: bool = True):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        # (Only passed on if set, as not all attention functions support it.)
        self.softcap = {} if config.attention_softcap is None else {"softcap": config.attention_softcap}
        # Vision models have no layer types and no rotary positions.
        slides = getattr(config, "layer_types", None) and config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if slides else None
        no_rope_layers = getattr(config, "no_rope_layers", None)
        self.use_rope = no_rope_layers is None or bool(no_rope_layers[layer_idx])

        query_width = config.num_attention_heads * self.head_dim
        key_value_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=output_bias)
        self.norms_all_heads = config.qk_norm == "all_heads"
        widths = (query_width, key_value_width) if self.norms_all_heads else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (build_norm(config, width) if config.qk_norm else nn.Identity() for width in widths)

    @named_arguments
    def forward(
        self,
        query_input: torch.Tensor,
        key_input: torch.Tensor,
        value_input: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = query_input.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states, key_states = self.q_proj(query_input), self.k_proj(key_input)
        if self.norms_all_heads:
            query_states = self.q_norm(query_states).view(hidden_shape).transpose(1, 2)
            key_states = self.k_norm(key_states).view(hidden_shape).transpose(1, 2)
        else:
            query_states = self.q_norm(query_states.view(hidden_shape)).transpose(1, 2)
            key_states = self.k_norm(key_states.view(hidden_shape)).transpose(1, 2)
        value_states = self.v_proj(value_input).view(hidden_shape).transpose(1, 2)

        if position_embeddings is not None and self.use_rope:
            query_states, key_states = rotate(query_states, key_states, *position_embeddings)

        if cache is not None:
            # The cache of continuous batching adds to `kwargs` what its attention function needs.
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)
        elif "paged_cache" in kwargs:
            kwargs["cache"] = kwargs.pop("paged_cache")

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.config.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **self.softcap,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


class DCALayer(GradientCheckpointingLayer):
    """
    The DCA block (paper, figure 4). It takes and returns the stack: `stack = layer(*stack, ...)`, tensors `(batch, sequence,
    hidden_size)`. The last one is the newest: `f_t`, the layer output. The block's own input reaches both the attention and
    the feed-forward module, but is not part of `f_t`. By default, norms are before the modules, and the feed-forward module
    sees the output of the attention; `config.norm_placement` and `config.parallel_blocks` change this.

    With the scheme `"standard"`, the stack is one tensor, the residual stream, which the block returns as Llama's does. A hook
    on a block then sees the residual stream; with the other schemes it sees a tuple, whose last tensor is `f_t`.
    """

    def __init__(self, config: DCABaseConfig, layer_idx: int, is_causal: bool = True):
        super().__init__()
        self.config = config
        self.residual = GeneralizedResidual(config, num_blocks=layer_idx)
        self.input_layernorm = self.build_norm_before(config)
        # The norm above is the queries'. Keys and values have norms of their own where their inputs differ.
        separate_inputs = config.residual_scheme == "dca"
        self.key_layernorm = self.build_norm_before(config) if separate_inputs else None
        self.value_layernorm = self.build_norm_before(config) if separate_inputs else None
        self.self_attn = DCAAttention(config, layer_idx, is_causal)
        self.post_attention_layernorm = self.build_norm_before(config)
        self.mlp = DCAGatedMLP(config) if config.gated_mlp else DCAMLP(config)
        # The norms after the attention and the feed-forward module. The paper's block has none.
        after = config.norm_placement != "pre"
        self.attention_output_norm = build_norm(config, config.hidden_size) if after else None
        self.mlp_output_norm = build_norm(config, config.hidden_size) if after else None

    @staticmethod
    def build_norm_before(config: DCABaseConfig) -> nn.Module:
        return nn.Identity() if config.norm_placement == "post_module" else build_norm(config, config.hidden_size)

    @named_arguments
    def forward(
        self,
        *stack: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        norms = [self.input_layernorm]
        if self.key_layernorm is not None:
            norms += [self.key_layernorm, self.value_layernorm]
        residual, *inputs, stack = normalized_residual(self.residual, stack, norms)
        query_input, key_input, value_input = inputs if len(inputs) == 3 else 3 * inputs

        attn_output, _ = self.self_attn(
            query_input=query_input,
            key_input=key_input,
            value_input=value_input,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        if self.attention_output_norm is not None:
            attn_output = self.attention_output_norm(attn_output)
        mlp_input = residual if self.config.parallel_blocks else residual + attn_output
        mlp_output = self.mlp(self.post_attention_layernorm(mlp_input))
        if self.mlp_output_norm is not None:
            mlp_output = self.mlp_output_norm(mlp_output)
        output = attn_output + mlp_output
        # `residual` returned the stack whose gradients are chained (see `FusedGeneralizedResidual.chained`).
        stack = push(stack, output, self.config.max_stack_entries)
        return stack if len(stack) > 1 else stack[0]


@dataclass
class BlockInputRecorder(OutputRecorder):
    """
    Records the queries' input of each block as its hidden state, and the model's output as the last. With the scheme
    `"standard"` these are the hidden states of any residual model.
    """

    capture_initial_hidden_state: bool = False
    num_hidden_layers_key: str = "num_residual_inputs"


def _check_gates(model: PreTrainedModel, name: str | os.PathLike | None, kwargs: dict) -> None:
    """Raises `ValueError` if the checkpoint `name` has gates of release 0.1 (without a norm) that are not zero."""
    gates = [module.gate for module in model.modules() if isinstance(module, GeneralizedResidual)]
    if name is None or all(gate is None or not gate.is_meta and not gate.any() for gate in gates):
        return
    of_the_hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    try:
        saved, _ = model.config.get_config_dict(name, **{key: kwargs[key] for key in of_the_hub if key in kwargs})
    except OSError:
        return  # a checkpoint without a configuration, which the caller has
    if "gate_norm" not in saved:
        raise ValueError(
            f"The gates of {str(name)!r} are from modeling-dca 0.1, where they had no norm, so that this release would compute "
            "another model: load it with the code in the checkpoint (`trust_remote_code=True`, in a process that does not "
            "import `modeling_dca`), or with modeling-dca 0.1."
        )


class DCAPreTrainedModel(PreTrainedModel):
    """The base of all DCA models: initialization, loading, saving, and the features of transformers that they support."""

    config_class = DCAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DCALayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": BlockInputRecorder(GeneralizedResidual),
        "attentions": DCAAttention,
    }

    @property
    def _auto_map(self) -> dict[str, str]:
        return self.config._auto_map

    def __init__(self, config: DCABaseConfig, *args, **kwargs):
        # The caller may have changed a field since the configuration was made.
        config.validate()
        if config.attention_softcap is not None:
            self._supports_sdpa = False
            if config._attn_implementation == "sdpa":
                raise ValueError(
                    f"`attention_softcap` is {config.attention_softcap}, which the attention 'sdpa' does not support: choose "
                    "'eager' or 'flex_attention' as `attn_implementation`."
                )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, GeneralizedResidual):
            # b = 1 and w = 0: the plain residual sum (section 3.1).
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, DCAZeroCenteredRMSNorm):
            init.zeros_(module.weight)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        super()._set_gradient_checkpointing(enable, without_sums(gradient_checkpointing_func), **kwargs)

    def _check_recording(self, kwargs: dict) -> None:
        """Raises `ValueError` if the caller asks for hidden states or attentions that would have no gradients."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return
        checkpoint = self.layers[0]._gradient_checkpointing_func
        for name in ("output_hidden_states", "output_attentions"):
            asked = kwargs.get(name, getattr(self.config, name, False))
            # (0 is an index: that of the first hidden state.)
            if asked not in (None, False) and getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
                raise ValueError(
                    f"With reentrant gradient checkpointing, the results of `{name}` have no gradients: enable checkpointing "
                    'with `{"use_reentrant": False}`.'
                )

    def freeze_backbone(self, norms: bool = False) -> None:
        """
        Freezes all parameters, including heads, except those of the generalized residuals (`delta` and `gate`).

        Args:
            norms (`bool`, *optional*, defaults to `False`): also leave all norms trainable.

        Raises:
            `ValueError`: the residual scheme is `"standard"`, which has no such parameters, and `norms` is not set.
        """
        if self.config.residual_scheme == "standard" and not norms:
            raise ValueError(
                "The 'standard' scheme has no residual parameters to train: choose another `residual_scheme`."
            )
        self.requires_grad_(False)
        trained = (GeneralizedResidual, *NORMS.values()) if norms else GeneralizedResidual
        for module in self.modules():
            if isinstance(module, trained):
                module.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Self:
        """
        As in transformers.

        Raises:
            `ValueError`: the weights do not fit a field that is among the arguments, or the gates are those of release
                0.1.
        """
        overrides = {name: kwargs[name] for name in cls.config_class.own_fields() & kwargs.keys()}
        # (The Auto classes make the configuration first, and pass it on.)
        overrides |= getattr(kwargs.get("config"), "_overrides", {})
        try:
            result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            _check_gates(result[0] if isinstance(result, tuple) else result, pretrained_model_name_or_path, kwargs)
            return result
        except RuntimeError as error:
            if not overrides or "ignore_mismatched_sizes" not in str(error):
                raise
            fields = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
            raise ValueError(
                f"The weights of {str(pretrained_model_name_or_path)!r} do not fit {fields}: leave it out, or pass "
                "`ignore_mismatched_sizes=True` to initialize the weights in the report above randomly."
            ) from error

    @property
    def supports_pp_plan(self) -> bool:
        """As in transformers. Raises `ValueError` for vLLM, which without a plan would guess how to split the model."""
        if self.config._attn_implementation == "vllm":
            raise ValueError(
                "DCA models cannot be split into a pipeline, as every block needs the outputs of all earlier ones: use "
                "`--tensor-parallel-size` instead of `--pipeline-parallel-size`."
            )
        return super().supports_pp_plan

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        """As in transformers. Raises `ValueError` for a pipeline, whose stages pass one tensor and not a stack."""
        config = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or object)
        if (config.get("pp_size") or 1) > 1:
            raise ValueError(
                f"`pp_size` is {config['pp_size']}, but stages of transformers' pipelines pass one tensor, and every DCA block "
                "needs the outputs of all earlier ones: split a `DCAForCausalLM` with `pipeline_stage`, or use `tp_size`, "
                "`fsdp_size` or `device_map`."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. The modelling code is saved with the weights, so that they load without this library."""
        self.config.auto_map = dict(self._auto_map)
        # FSDP replaces the model's class by one of torch, whose code would be saved.
        current_class = type(self)
        self.__class__ = next(each for each in current_class.__mro__ if not each.__module__.startswith("torch."))
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = current_class


class ResidualConversionMixin:
    """Conversion of models: from a trained residual model to DCA, and back."""

    @classmethod
    def from_residual(cls, source: str | os.PathLike | PreTrainedModel, **config_overrides: Any) -> Self:
        """
        Converts a trained residual model to DCA. Initially it computes the same, as the generalized residuals start as the
        residual sum (paper, table 4).

        The result has the source's type, its attention function and, if the source is loaded, its device. It is in
        evaluation mode, and has the source's generation configuration. It has no dropout except on attention weights.

        Args:
            source (`PreTrainedModel`, path or Hub id): a model of a supported family (see `families_dca`). A classifier may
                have another head than this class, or none, if `num_labels` is given. A loaded model is copied, so that
                training one does not change the other. A checkpoint is memory-mapped, and only the weights that change are
                copied, one at a time (all projections of GPT-2, and those of DINOv2 with a layer scale): pass the path if
                memory is scarce. A GGUF file can be given by its path, or by its name in a folder or repository as
                `gguf_file`; its weights are dequantized.
            config_overrides: fields of the configuration that do not follow from the source, e.g. `last_k=2` or
                `residual_scheme="grn_v2"`. For a classifier also `num_labels`, `id2label`, `label2id` and `problem_type`: if
                the source's head has another number of labels, the model gets a new head, which the log mentions, as with
                `from_pretrained`. For a path or Hub id also `dtype` (by default that of the checkpoint), and the arguments
                of `from_pretrained` that locate it (`revision`, `token`, `cache_dir`, ...).

        Raises:
            `ValueError`: the source's family is not supported, DCA cannot represent the source exactly, the source has
                weights that DCA does not have, or lacks some, or has another head and `num_labels` is not given, or an
                override is invalid.

        Example:

        ```python
        >>> from modeling_dca import DCAForCausalLM

        >>> model = DCAForCausalLM.from_residual("HuggingFaceTB/SmolLM2-135M", last_k=2)
        >>> model.freeze_backbone()
        ```
        """
        from .conversion_dca import from_residual

        return from_residual(cls, source, **config_overrides)

    def to_residual(self) -> PreTrainedModel:
        """
        Converts back: returns a copy of the model in the family that `from_residual` converted it from. Layer scales were
        multiplied into the projections, and become 1.

        Raises:
            `ValueError`: the model was not made by `from_residual`, a generalized residual is not the residual sum, or
                the norms of a block's queries, keys and values differ. The message says which.
        """
        from .conversion_dca import to_residual

        return to_residual(self)


class DCAModel(ResidualConversionMixin, DCAPreTrainedModel):
    """The DCA decoder without a head. Each block takes the stack: the embeddings and the outputs of all earlier blocks."""

    _auto_class = "AutoModel"

    def __init__(self, config: DCAConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = build_embedding(config)
        self.embed_positions = self.rotary_emb = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding == "rope":
            rotary = {kind: DCARotaryEmbedding(config, kind) for kind in config.rope_parameters_by_type}
            self.rotary_emb = rotary[None] if None in rotary else nn.ModuleDict(rotary)
        self.layers = nn.ModuleList([DCALayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.residual = GeneralizedResidual(config, num_blocks=config.num_hidden_layers, outputs=1)
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False

        self.post_init()

    @named_arguments
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Arguments and result as in [`~transformers.LlamaModel`]. `hidden_states[i]`, if requested, is the input of the queries
        of block `i`, `(batch, sequence, hidden_size)`. The last one is the model's output.

        Raises:
            `ValueError`: not exactly one of `input_ids` and `inputs_embeds` is given, or the sequence is longer than
                the learned positions.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        given_cache = cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        position_ids, mask_mapping = self._positions_and_masks(
            inputs_embeds, attention_mask, position_ids, cache, given_cache, kwargs
        )
        hidden_states = self._add_positions(inputs_embeds, position_ids)
        position_embeddings = self._rotate(hidden_states, position_ids)

        self._check_recording(kwargs)
        stack = (hidden_states,)
        layers = self.layers[: self.config.num_hidden_layers]
        if isinstance(cache, DynamicCache) and len(cache.layers) > len(layers):
            # Early exit: a cache with layers that stay empty cannot be cropped.
            del cache.layers[len(layers) :]
        for layer_type, decoder_layer in zip(self.config.layer_types, layers):
            stack = decoder_layer(
                *stack,
                attention_mask=mask_mapping[layer_type],
                position_embeddings=position_embeddings.get(layer_type),
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
            stack = (stack,) if isinstance(stack, torch.Tensor) else stack

        if len(layers) < len(self.layers) and self.residual.delta is not None:
            delta = self.residual.delta[:, : len(stack)]
            hidden_states, _ = functional_call(self.residual, {"delta": delta}, tuple(stack))
        else:
            hidden_states, _ = self.residual(*stack)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _positions_and_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        given_cache: Cache | None,
        kwargs: dict,
    ) -> tuple[torch.LongTensor, dict[str, torch.Tensor | None]]:
        """The positions of the tokens, and the attention mask of each type of block."""
        # (The cache of continuous batching holds many sequences. Their positions are given.)
        past_seen_tokens = cache.get_seq_length() if isinstance(cache, Cache) else 0
        # (Creating the mask searches given positions for packed sequences, which waits for the device: it gets no others.)
        given_position_ids = position_ids
        if self.config.positions_by_mask and position_ids is None and getattr(attention_mask, "ndim", None) == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if self.embed_positions is not None and (position_ids is None or isinstance(cache, Cache)):
            # (Packed sequences have positions of their own. Together they may be longer.)
            self._check_learned_positions(past_seen_tokens, inputs_embeds.shape[1], position_ids)
        if given_position_ids is None and "flash" not in str(self.config._attn_implementation):
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
                if kwargs.get(name) is not None:
                    raise ValueError(
                        f"`{name}` is given without `position_ids`, which the attention {self.config._attn_implementation!r} "
                        "needs to tell packed sequences apart: give these, too."
                    )
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        # `generate` may have prepared the masks already.
        if not isinstance(mask_mapping := attention_mask, dict):
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "position_ids": given_position_ids,
                # With a cache, even an empty one, the mask does not look for packed sequences.
                CACHE_NAME: given_cache,
            }
            mask_mapping = {}
            if "full_attention" in self.config.layer_types:
                mask_mapping["full_attention"] = create_causal_mask(**mask_kwargs)
            if "sliding_attention" in self.config.layer_types:
                mask_mapping["sliding_attention"] = create_sliding_window_causal_mask(**mask_kwargs)
        return position_ids, mask_mapping

    def _rotate(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosine and sine of the positions, for each type of block that has them."""
        if isinstance(self.rotary_emb, nn.ModuleDict):
            return {kind: rotary(hidden_states, position_ids) for kind, rotary in self.rotary_emb.items()}
        if self.rotary_emb is not None:
            return dict.fromkeys(self.config.layer_types, self.rotary_emb(hidden_states, position_ids))
        return {}

    def _check_learned_positions(
        self, past_seen_tokens: int | torch.Tensor, num_tokens: int, position_ids: torch.LongTensor | None
    ):
        # A static cache counts its tokens on the device: to read the count is to wait for the device.
        past_seen_tokens = past_seen_tokens if isinstance(past_seen_tokens, int) else 0
        length = past_seen_tokens + num_tokens
        too_long = length > self.config.max_position_embeddings
        if too_long and position_ids is not None and not torch.compiler.is_compiling():
            length = int(position_ids.max()) + 1  # padding on the left has none
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The sequence has {length} tokens, but the model has only `max_position_embeddings` = "
                f"{self.config.max_position_embeddings} learned positions: shorten the sequence."
            )

    def _add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.LongTensor) -> torch.Tensor:
        if self.embed_positions is not None:
            return inputs_embeds + self.embed_positions(position_ids)
        if self.config.position_embedding == "sincos":
            return inputs_embeds + sincos_embedding(position_ids, self.config.hidden_size).to(inputs_embeds.dtype)
        return inputs_embeds


def scale_logits(logits: torch.Tensor, config: DCAConfig) -> torch.Tensor:
    """Logits times `config.logit_multiplier`, and within `config.logit_softcap`."""
    if config.logit_multiplier != 1:
        logits = logits * config.logit_multiplier
    if config.logit_softcap is not None:
        logits = soft_capped(logits, config.logit_softcap)
    return logits


class DCAForCausalLM(ResidualConversionMixin, DCAPreTrainedModel, GenerationMixin):
    """The DCA language model: the decoder with a linear head over the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DCAConfig):
        super().__init__(config)
        self.model = DCAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

        self.post_init()

    @named_arguments
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Arguments and result as in [`~transformers.LlamaForCausalLM`].

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_dca import DCAForCausalLM

        >>> model = DCAForCausalLM.from_pretrained("runs/demo/text")
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/demo/text")
        >>> inputs = tokenizer("def __init__(self", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0])
        ```
        """
        loss_kwargs = take_loss_arguments(self, kwargs)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )

        # Logits of the requested tokens, in the model's own type.
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, slice_indices, :]), self.config)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs, **loss_kwargs
            )

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def pipeline_stage(self, index: int, count: int) -> "DCAPipelineStage":
        """
        Stage `index` of `count` pipeline stages of the model, for `torch.distributed.pipelining`; see
        [`~pipeline.DCAPipelineStage`]. It shares its modules with the model.

        Raises:
            `ValueError`: there are fewer blocks than stages, or `index` is out of range.
        """
        from .pipeline import DCAPipelineStage

        return DCAPipelineStage(self, index, count)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks into its signature
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        """As in transformers, except for `config.cache_restart_length`."""
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)  # (for `generate` itself)
        restart, cache = self.config.cache_restart_length, kwargs.get(CACHE_NAME)
        if restart is not None and cache is not None and input_ids.shape[1] > restart >= cache.get_seq_length():
            kwargs |= {CACHE_NAME: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


def name_in_tables(model_type: str, class_names: dict[str, str]) -> None:
    """
    Adds a model's classes to transformers' tables of names, which `register` does not change. The Trainer uses them to shift
    labels (label smoothing), pipelines to check for support, and model cards to find the task.
    """
    for table, class_name in class_names.items():
        getattr(modeling_auto, table, {}).setdefault(model_type, class_name)


class DCAGenericHead(ResidualConversionMixin, DCAPreTrainedModel):
    """The base of the generic heads. They build their backbone through AutoModel, where DCA is registered here."""

    def __init__(self, config: DCAConfig):
        # Not `DCAConfig`: the code of a checkpoint has its own configuration class.
        AutoModel.register(type(config), DCAModel, exist_ok=True)
        super().__init__(config)


class DCAForSequenceClassification(GenericForSequenceClassification, DCAGenericHead):
    """The DCA decoder with a linear classifier on the last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"
    forward = named_arguments(GenericForSequenceClassification.forward)


class DCAForTokenClassification(GenericForTokenClassification, DCAGenericHead):
    """The DCA decoder with a linear classifier on each token."""

    _auto_class = "AutoModelForTokenClassification"
    forward = named_arguments(GenericForTokenClassification.forward)


class DCAForQuestionAnswering(GenericForQuestionAnswering, DCAGenericHead):
    """The DCA decoder with a linear head for the start and the end of an answer in the text."""

    _auto_class = "AutoModelForQuestionAnswering"
    forward = named_arguments(GenericForQuestionAnswering.forward)


name_in_tables(
    DCAConfig.model_type,
    {
        "MODEL_MAPPING_NAMES": "DCAModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "DCAForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "DCAForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "DCAForTokenClassification",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "DCAForQuestionAnswering",
    },
)


__all__ = [
    "DCAForCausalLM",
    "DCAForQuestionAnswering",
    "DCAForSequenceClassification",
    "DCAForTokenClassification",
    "DCAModel",
    "DCAPreTrainedModel",
]
