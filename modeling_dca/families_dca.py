"""
The families of trained models that can become DCA, and the mapping of their fields and weights.

To add a family, add a [`Family`] to `TEXT_FAMILIES` or `VISION_FAMILIES`, under its `model_type`; the README of this folder
shows how.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from .configuration_dca import DCABaseConfig, DCAConfig, DCAVisionConfig


@dataclass(frozen=True)
class Move:
    """
    How the weights of one module of the source are renamed and changed.

    Args:
        targets (`tuple[str, ...]`): names of modules or parameters of the DCA model; empty if nothing reads the weight.
        convert (`Callable`, *optional*): from the source's configuration and tensor to the tensors of the targets, or of
            the first ones.
        revert (`Callable`, *optional*): from the source's configuration and the targets' tensors to that of the source.
        join (`Callable`, *optional*): combines the tensor that another weight gave to the target with that of this one.
        rounds (`bool`, *optional*, defaults to `False`): whether the conversion rounds the weights, in any type.
    """

    targets: tuple[str, ...]
    convert: Callable[[PreTrainedConfig, torch.Tensor], tuple[torch.Tensor, ...]] = lambda config, tensor: (tensor,)
    revert: Callable[..., torch.Tensor] = lambda config, tensor: tensor
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    rounds: bool = False


def own_storage(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copies that share no memory, as tensors that share memory cannot be saved."""
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)


def transposed(*targets: str) -> Move:
    """GPT-2's `Conv1D`, `(in, out)`, as one projection or several side by side; a bias has only one dimension."""
    return Move(
        targets,
        lambda config, tensor: own_storage(tensor.t().chunk(len(targets))),
        lambda config, *tensors: torch.cat(tensors).t().contiguous(),
    )


def fused(*targets: str, sizes: Callable[[PreTrainedConfig], list[int]] | None = None) -> Move:
    """Projections that the source has in one matrix, one below the other, with equal sizes or with `sizes`."""

    def convert(config, tensor):
        return own_storage(tensor.chunk(len(targets)) if sizes is None else tensor.split(sizes(config)))

    return Move(targets, convert, lambda config, *tensors: torch.cat(tensors))


def grouped(attention: str, groups: Callable[[PreTrainedConfig], int]) -> Move:
    """Queries, keys and values in one matrix, group by group: the heads of some queries, and their head of keys and values."""

    def convert(config, tensor):
        tensor = tensor.unflatten(0, (groups(config), -1, head_dim(config)))
        return own_storage((tensor[:, :-2].flatten(0, 2), tensor[:, -2].flatten(0, 1), tensor[:, -1].flatten(0, 1)))

    def revert(config, *tensors):
        tensors = [tensor.unflatten(0, (groups(config), -1, head_dim(config))) for tensor in tensors]
        return torch.cat(tensors, dim=1).flatten(0, 2)

    return Move(tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")), convert, revert)


def interleaved(target: str) -> Move:
    """
    A projection to heads whose features the source rotates in neighbouring pairs. DCA rotates the first half with the second,
    as Llama does.
    """
    return Move(
        (target,),
        lambda config, tensor: (halves_of_heads(config, tensor),),
        lambda config, tensor: neighbours_of_heads(config, tensor),
    )


def rotary_order(config: PreTrainedConfig) -> torch.Tensor:
    """The indices that reorder the features of a head from neighbouring pairs to halves."""
    width = getattr(config, "rotary_dim", None)
    if width is None:
        width = int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
    rotated = torch.arange(width).view(-1, 2).t().flatten()
    return torch.cat((rotated, torch.arange(width, head_dim(config))))


def halves_of_heads(config: PreTrainedConfig, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(0, (-1, head_dim(config)))[:, rotary_order(config)].flatten(0, 1)


def neighbours_of_heads(config: PreTrainedConfig, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(0, (-1, head_dim(config)))[:, rotary_order(config).argsort()].flatten(0, 1)


def sharded(attention: str, shards: int) -> Move:
    """Interleaved queries, values, and interleaved keys in one matrix, shard by shard of the machines that trained it."""

    def convert(config, tensor):
        query, value, key = (part.flatten(0, 1) for part in tensor.unflatten(0, (shards, 3, -1)).unbind(1))
        return own_storage((halves_of_heads(config, query), halves_of_heads(config, key), value))

    def revert(config, query, key, value):
        parts = (neighbours_of_heads(config, query), value, neighbours_of_heads(config, key))
        return torch.stack([part.unflatten(0, (shards, -1)) for part in parts], dim=1).flatten(0, 2)

    return Move(tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")), convert, revert)


def scaled(target: str, factor: Callable[[PreTrainedConfig], float]) -> Move:
    """Weights whose products the source multiplies by a constant."""
    return Move(
        (target,),
        lambda config, tensor: (tensor * factor(config),),
        lambda config, tensor: tensor / factor(config),
        rounds=True,
    )


def plus_one(target: str) -> Move:
    """Weights to which the source adds 1."""
    return Move((target,), lambda config, tensor: (tensor + 1,), lambda config, tensor: tensor - 1, rounds=True)


def shared(*targets: str, when: Callable[[PreTrainedConfig], bool] = lambda config: True) -> Move:
    """A norm of the source that DCA has separately for each module that reads it."""

    def convert(config, tensor):
        return own_storage([tensor] * len(targets)) if when(config) else (tensor,)

    def revert(config, first, *others):
        if when(config) and not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"The model cannot be converted back: {' and '.join(targets)} are not the same, but a {config.model_type!r} model has "
                "one norm for both."
            )
        return first

    return Move(targets, convert, revert)


def averaged(target: str, second: bool) -> Move:
    """One of two classifiers, each on its own token, whose logits the source averages."""

    def join(first, second):
        return first + second if first.ndim == 1 else torch.cat((first, second), dim=1)

    def revert(config, tensor):
        return tensor if tensor.ndim == 1 else 2 * tensor.chunk(2, dim=1)[second]

    return Move((target,), lambda config, tensor: (tensor / 2,), revert, join)


@dataclass(frozen=True)
class Family:
    """
    How the models of one `model_type` are converted to DCA.

    Args:
        fields (`dict`): for a field of the DCA configuration the source's field, or a function of its configuration,
            whose `architectures` name the class that has the head of the DCA model.
        constants (`dict`): fields of the DCA configuration that are the same for all models of the family.
        weights (`dict`): for a module or parameter of the source without a head, with `*` for the number of a layer, its
            name in the DCA model without a head or a [`Move`]. The first matching entry counts. A weight with the target
            `.layer_scale` of a projection is multiplied into the projection.
        heads (`dict`): the same for heads that are not a single projection.
        obstacles (`Callable`): from the source's configuration to the reasons why this model cannot become DCA.
        bare_norms (`Callable`): whether the source's norms have no parameters; those of the DCA model are then 1 and 0.
    """

    fields: dict[str, str | Callable[[PreTrainedConfig], Any]]
    weights: dict[str, str | Move]
    constants: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Move] = field(default_factory=dict)
    obstacles: Callable[[PreTrainedConfig], Iterable[str]] = lambda config: ()
    bare_norms: Callable[[PreTrainedConfig], bool] = lambda config: False

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The fields of the DCA configuration."""
        values = {
            name: getattr(config, source) if isinstance(source, str) else source(config)
            for name, source in self.fields.items()
        }
        return values | self.constants

    @property
    def rounds(self) -> bool:
        """Whether the conversion multiplies weights, and so rounds them."""
        targets = [move for move in self.weights.values() if isinstance(move, str)]
        moves = [move for move in self.weights.values() if isinstance(move, Move)]
        return any(move.rounds for move in moves) or any(target.endswith(".layer_scale") for target in targets)


def find_move(entries: dict[str, str | Move], name: str) -> tuple[str, Move] | None:
    """The first entry that matches the source's weight `name`: its pattern, and its move with the full names of the targets."""
    for pattern, move in entries.items():
        expected, own = pattern.split("."), name.split(".")
        if len(expected) <= len(own) and all(part in ("*", o) for part, o in zip(expected, own)):
            move = Move((move,)) if isinstance(move, str) else move
            layer = next((o for part, o in zip(expected, own) if part == "*"), "")
            rest = own[len(expected) :]
            targets = (".".join([target.replace("*", layer), *rest]) for target in move.targets)
            return pattern, replace(move, targets=tuple(targets))
    return None


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def whole_rope_parameters(config: PreTrainedConfig) -> dict:
    """The parameters of rotary positions for families whose default type always rotates the whole head."""

    def whole(parameters):
        if parameters["rope_type"] == "default":
            return {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
        return dict(parameters)

    if "rope_type" in config.rope_parameters:
        return whole(config.rope_parameters)
    return {kind: whole(each) for kind, each in config.rope_parameters.items() if kind in config.layer_types}


def gpt2_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.add_cross_attention:
        yield "`add_cross_attention` is set, but a DCA block has no cross-attention"
    if config.scale_attn_by_inverse_layer_idx:
        yield "`scale_attn_by_inverse_layer_idx` is set, but DCA scales the attention of all layers alike"
    if config.reorder_and_upcast_attn:
        yield "`reorder_and_upcast_attn` is set, but DCA computes attention in the model's own precision"
    if not config.scale_attn_weights:
        yield "`scale_attn_weights` is not set, but DCA scales attention by the width of a head"


def opt_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if not config.do_layer_norm_before:
        yield "`do_layer_norm_before` is not set, but a DCA block has its norms before attention and feed-forward module"
    if config.word_embed_proj_dim != config.hidden_size:
        yield (
            f"`word_embed_proj_dim` ({config.word_embed_proj_dim}) is not `hidden_size` ({config.hidden_size}), but DCA "
            "does not project embeddings"
        )
    if config._remove_final_layer_norm:
        yield "`_remove_final_layer_norm` is set, but DCA has a norm before the output embedding"


def olmo_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.clip_qkv is not None:
        yield f"`clip_qkv` is {config.clip_qkv}, but DCA does not clip queries, keys and values"


def gemma_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.use_bidirectional_attention:
        yield "`use_bidirectional_attention` is set, but DCA's language models are causal"


def cohere_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if getattr(config, "use_qk_norm", False):
        yield "`use_qk_norm` is set, but DCA has one norm for all heads, not one for each"


def stablelm_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.qk_layernorm:
        yield "`qk_layernorm` is set, but DCA has one norm for all heads, not one for each"


def falcon_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.alibi:
        yield "its attention has biases by distance (ALiBi), which DCA's does not"


def gpt_bigcode_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.add_cross_attention:
        yield "`add_cross_attention` is set, but a DCA block has no cross-attention"


def gptj_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if not config.rotary_dim:
        yield f"`rotary_dim` is {config.rotary_dim}, with which its rotary positions are those of no head"


def dca_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.residual_scheme != "standard":
        yield "it is DCA already: load it with `from_pretrained`"


def dca_fields(config_class: type[DCABaseConfig]) -> dict[str, str]:
    chosen = {"residual_scheme", "last_k", "source_config"}
    own = [
        each.name
        for each in fields(config_class)
        if each.name in config_class.__annotations__ | DCABaseConfig.__annotations__
    ]
    return same(*(name for name in own if name not in chosen), *LABEL_FIELDS)


LABEL_FIELDS = ("id2label", "label2id", "problem_type")
DECODER_FIELDS = same(
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    *LABEL_FIELDS,
)
LLAMA = Family(
    fields=DECODER_FIELDS
    | same("intermediate_size", "num_key_value_heads", "hidden_act", "initializer_range", "attention_dropout")
    | {"norm_eps": "rms_norm_eps", "head_dim": head_dim, "rope_parameters": whole_rope_parameters},
    constants={"gated_mlp": True},
    weights=same("embed_tokens", "layers", "norm"),
)
BIASES = same("attention_bias", "mlp_bias")
SLIDING = {
    "layer_types": "layer_types",
    "sliding_window": lambda config: config.sliding_window if "sliding_attention" in config.layer_types else None,
}
#: Where the default type rotates as much of the head as is written there.
PARTIAL_ROPE = {"rope_parameters": "rope_parameters"}


def like(family: Family, fields: dict = {}, constants: dict = {}, weights: dict = {}, **others) -> Family:  # noqa: B006
    """`family` with some entries of its own, which go before."""
    return replace(
        family,
        fields={name: source for name, source in family.fields.items() if name not in constants} | fields,
        constants={name: value for name, value in family.constants.items() if name not in fields} | constants,
        weights=weights | {name: move for name, move in family.weights.items() if name not in weights},
        **others,
    )


LAYER_NORM = {"norm_type": "layer_norm"}
LLAMA_WITH_BIASES = like(LLAMA, fields=BIASES)
GEMMA = like(
    LLAMA,
    fields=same("attention_bias") | {"embedding_multiplier": lambda config: config.hidden_size**0.5},
    constants={"norm_type": "zero_centered_rms_norm"},
    obstacles=gemma_obstacles,
)
GEMMA2_FIELDS = SLIDING | {
    "hidden_act": "hidden_activation",
    "attention_scaling": lambda config: config.query_pre_attn_scalar**-0.5,
    "logit_softcap": "final_logit_softcapping",
}
SANDWICH_OF_GEMMA = {
    "layers.*.post_attention_layernorm": "layers.*.attention_output_norm",
    "layers.*.pre_feedforward_layernorm": "layers.*.post_attention_layernorm",
    "layers.*.post_feedforward_layernorm": "layers.*.mlp_output_norm",
}
OLMO2 = like(
    LLAMA,
    fields=same("attention_bias"),
    constants={"norm_placement": "post_module", "qk_norm": "all_heads"},
    weights={
        "layers.*.post_attention_layernorm": "layers.*.attention_output_norm",
        "layers.*.post_feedforward_layernorm": "layers.*.mlp_output_norm",
    },
)
GATE_AND_UP = {"layers.*.mlp.gate_up_proj": fused("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj")}
INTERLEAVED = {
    f"layers.*.self_attn.{name}": interleaved(f"layers.*.self_attn.{name}") for name in ("q_proj", "k_proj")
}
GLM = like(
    LLAMA,
    fields=PARTIAL_ROPE | same("attention_bias"),
    constants={"attention_output_bias": False},
    weights=INTERLEAVED | GATE_AND_UP,
)
GRANITE = like(
    LLAMA,
    fields=BIASES
    | {
        "embedding_multiplier": "embedding_multiplier",
        "attention_scaling": "attention_multiplier",
        "logit_multiplier": lambda config: 1 / config.logits_scaling,
    },
    weights={
        f"layers.*.{name}": scaled(f"layers.*.{name}", lambda config: config.residual_multiplier)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    },
)
COHERE = like(
    LLAMA,
    fields=same("attention_bias") | {"norm_eps": "layer_norm_eps", "logit_multiplier": "logit_scale"},
    constants=LAYER_NORM | {"parallel_blocks": True},
    weights=INTERLEAVED
    | {"layers.*.input_layernorm": shared("layers.*.input_layernorm", "layers.*.post_attention_layernorm")},
    obstacles=cohere_obstacles,
    bare_norms=lambda config: True,
)
GPT2 = Family(
    fields=DECODER_FIELDS
    | same("initializer_range")
    | {
        "intermediate_size": lambda config: config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
    },
    constants=LAYER_NORM | {"position_embedding": "learned", "attention_bias": True, "mlp_bias": True},
    weights={
        "wte": "embed_tokens",
        "wpe": "embed_positions",
        "h.*.ln_1": "layers.*.input_layernorm",
        "h.*.attn.c_attn": transposed(
            "layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"
        ),
        "h.*.attn.c_proj": transposed("layers.*.self_attn.o_proj"),
        "h.*.ln_2": "layers.*.post_attention_layernorm",
        "h.*.mlp.c_fc": transposed("layers.*.mlp.up_proj"),
        "h.*.mlp.c_proj": transposed("layers.*.mlp.down_proj"),
        "ln_f": "norm",
    },
    obstacles=gpt2_obstacles,
)
OPT = Family(
    fields=DECODER_FIELDS
    | same("attention_dropout")
    | {
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "initializer_range": "init_std",
        "attention_bias": "enable_bias",
        "mlp_bias": "enable_bias",
    },
    constants=LAYER_NORM | {"norm_eps": 1e-5, "position_embedding": "learned", "positions_by_mask": True},
    weights={
        # Positions start at 2: nothing but padding has those before.
        "decoder.embed_positions": Move(
            ("embed_positions",),
            lambda config, tensor: (tensor[2:].clone(),),
            lambda config, tensor: torch.cat((torch.zeros_like(tensor[:2]), tensor)),
        ),
        "decoder.layers.*.self_attn_layer_norm": "layers.*.input_layernorm",
        "decoder.layers.*.self_attn.out_proj": "layers.*.self_attn.o_proj",
        "decoder.layers.*.self_attn": "layers.*.self_attn",
        "decoder.layers.*.final_layer_norm": "layers.*.post_attention_layernorm",
        "decoder.layers.*.fc1": "layers.*.mlp.up_proj",
        "decoder.layers.*.fc2": "layers.*.mlp.down_proj",
        "decoder.final_layer_norm": "norm",
        "decoder.embed_tokens": "embed_tokens",
    },
    obstacles=opt_obstacles,
    bare_norms=lambda config: not config.layer_norm_elementwise_affine,
)
GPTJ = like(
    GPT2,
    fields={
        "rope_parameters": lambda config: {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": config.rotary_dim / head_dim(config),
        }
    },
    constants={"position_embedding": "rope", "attention_bias": False, "parallel_blocks": True, "lm_head_bias": True},
    weights={
        "h.*.ln_1": shared("layers.*.input_layernorm", "layers.*.post_attention_layernorm"),
        **{f"h.*.attn.{name}": interleaved(f"layers.*.self_attn.{name}") for name in ("q_proj", "k_proj")},
        "h.*.attn.v_proj": "layers.*.self_attn.v_proj",
        "h.*.attn.out_proj": "layers.*.self_attn.o_proj",
        "h.*.mlp.fc_in": "layers.*.mlp.up_proj",
        "h.*.mlp.fc_out": "layers.*.mlp.down_proj",
    },
    obstacles=gptj_obstacles,
)
GPT_NEOX = like(
    LLAMA,
    fields=PARTIAL_ROPE
    | same("attention_bias")
    | {
        "norm_eps": "layer_norm_eps",
        "parallel_blocks": "use_parallel_residual",
        "num_key_value_heads": "num_attention_heads",
    },
    constants=LAYER_NORM | {"gated_mlp": False, "mlp_bias": True},
    weights={
        "embed_in": "embed_tokens",
        "layers.*.attention.query_key_value": grouped("layers.*.self_attn", lambda config: config.num_attention_heads),
        "layers.*.attention.dense": "layers.*.self_attn.o_proj",
        "layers.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
        "layers.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        "layers": "layers",
        "final_layer_norm": "norm",
    },
)
PHI = like(
    LLAMA,
    fields=PARTIAL_ROPE | {"norm_eps": "layer_norm_eps", "qk_norm": "qk_layernorm"},
    constants=LAYER_NORM
    | {"gated_mlp": False, "parallel_blocks": True, "attention_bias": True, "mlp_bias": True, "lm_head_bias": True},
    weights={
        "layers.*.input_layernorm": shared("layers.*.input_layernorm", "layers.*.post_attention_layernorm"),
        "layers.*.self_attn.dense": "layers.*.self_attn.o_proj",
        "layers.*.self_attn.q_layernorm": "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_layernorm": "layers.*.self_attn.k_norm",
        "layers.*.mlp.fc1": "layers.*.mlp.up_proj",
        "layers.*.mlp.fc2": "layers.*.mlp.down_proj",
        "final_layernorm": "norm",
    },
)


def gpt_bigcode_groups(config: PreTrainedConfig) -> int:
    """How many heads of keys and values there are."""
    return 1 if config.multi_query else config.num_attention_heads


def falcon_groups(config: PreTrainedConfig) -> int:
    """How many heads of keys and values there are."""
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


FALCON = Family(
    fields=DECODER_FIELDS
    | same("initializer_range", "attention_dropout")
    | PARTIAL_ROPE
    | {
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": falcon_groups,
        "hidden_act": "activation",
        "norm_eps": "layer_norm_epsilon",
        "rope_parameters": whole_rope_parameters,
        "attention_bias": "bias",
        "mlp_bias": "bias",
        "parallel_blocks": "parallel_attn",
    },
    constants=LAYER_NORM,
    weights={
        "word_embeddings": "embed_tokens",
        "h.*.ln_attn": "layers.*.input_layernorm",
        "h.*.ln_mlp": "layers.*.post_attention_layernorm",
        "h.*.input_layernorm": shared(
            "layers.*.input_layernorm",
            "layers.*.post_attention_layernorm",
            when=lambda config: config.parallel_attn,
        ),
        "h.*.post_attention_layernorm": "layers.*.post_attention_layernorm",
        "h.*.self_attention.query_key_value": grouped("layers.*.self_attn", falcon_groups),
        "h.*.self_attention.dense": "layers.*.self_attn.o_proj",
        "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
        "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        "ln_f": "norm",
    },
    obstacles=falcon_obstacles,
)

TEXT_FAMILIES: dict[str, Family] = {
    "llama": LLAMA_WITH_BIASES,
    "exaone": LLAMA_WITH_BIASES,
    "internlm3": LLAMA_WITH_BIASES,
    "iquestcoder": LLAMA_WITH_BIASES,
    "mistral": like(LLAMA, fields=same("sliding_window")),
    "ministral": like(LLAMA, fields=SLIDING),
    "cwm": like(LLAMA, fields=SLIDING | same("mlp_bias")),
    "qwen2": like(LLAMA, fields=SLIDING, constants={"attention_bias": True, "attention_output_bias": False}),
    "qwen3": like(LLAMA, fields=SLIDING | same("attention_bias"), constants={"qk_norm": True}),
    "smollm3": like(
        LLAMA,
        fields=SLIDING | BIASES | {"no_rope_layers": lambda config: config.no_rope_layers[: config.num_hidden_layers]},
    ),
    "seed_oss": like(LLAMA, fields=BIASES | {"attention_output_bias": "attention_out_bias"}),
    "arcee": like(LLAMA, fields=BIASES, constants={"gated_mlp": False}),
    "jais2": like(LLAMA, fields=BIASES | {"norm_eps": "layer_norm_eps"}, constants=LAYER_NORM | {"gated_mlp": False}),
    "olmo": like(
        LLAMA,
        fields=same("attention_bias"),
        constants=LAYER_NORM | {"norm_eps": 1e-5},
        obstacles=olmo_obstacles,
        bare_norms=lambda config: True,
    ),
    "olmo2": OLMO2,
    "olmo3": like(OLMO2, fields=SLIDING),
    "exaone4": like(
        LLAMA,
        fields=SLIDING
        | {
            "no_rope_layers": lambda config: [
                int(config.sliding_window is None or kind == "sliding_attention") for kind in config.layer_types
            ]
        },
        constants={"norm_placement": "post_module", "qk_norm": True},
        weights={
            "layers.*.post_attention_layernorm": "layers.*.attention_output_norm",
            "layers.*.post_feedforward_layernorm": "layers.*.mlp_output_norm",
        },
    ),
    "gemma": GEMMA,
    "gemma2": like(
        GEMMA,
        fields=GEMMA2_FIELDS | {"attention_softcap": "attn_logit_softcapping"},
        constants={"norm_placement": "sandwich"},
        weights=SANDWICH_OF_GEMMA,
    ),
    "vaultgemma": like(
        GEMMA,
        fields=GEMMA2_FIELDS | {"attention_softcap": "attn_logit_softcapping"},
        weights={"layers.*.pre_feedforward_layernorm": "layers.*.post_attention_layernorm"},
        obstacles=lambda config: (),
    ),
    "gemma3_text": like(
        GEMMA,
        fields=GEMMA2_FIELDS,
        constants={"norm_placement": "sandwich", "qk_norm": True},
        weights=SANDWICH_OF_GEMMA,
    ),
    "glm": GLM,
    "glm4": like(
        GLM,
        constants={"norm_placement": "sandwich"},
        weights={
            "layers.*.post_self_attn_layernorm": "layers.*.attention_output_norm",
            "layers.*.post_mlp_layernorm": "layers.*.mlp_output_norm",
        },
    ),
    "ernie4_5": like(
        LLAMA,
        fields={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        constants={"attention_dropout": 0.0},
        weights=INTERLEAVED,
    ),
    "helium": like(LLAMA, fields=BIASES, constants={"attention_output_bias": False}, weights=INTERLEAVED),
    "granite": GRANITE,
    "hyperclovax": like(
        GRANITE,
        fields={
            "norm_placement": lambda config: "sandwich" if config.use_post_norm else "pre",
            "logit_multiplier": "logits_scaling",
        },
        weights={
            # Where the norms are there, the multiplier goes into them.
            "layers.*.post_norm1": scaled("layers.*.attention_output_norm", lambda config: config.residual_multiplier),
            "layers.*.post_norm2": scaled("layers.*.mlp_output_norm", lambda config: config.residual_multiplier),
        }
        | {
            f"layers.*.{name}": scaled(
                f"layers.*.{name}", lambda config: 1.0 if config.use_post_norm else config.residual_multiplier
            )
            for name in ("self_attn.o_proj", "mlp.down_proj")
        },
    ),
    "phi3": like(
        LLAMA,
        fields=PARTIAL_ROPE
        | same("sliding_window")
        | {
            "cache_restart_length": lambda config: (
                config.original_max_position_embeddings if config.rope_parameters["rope_type"] == "longrope" else None
            )
        },
        weights=GATE_AND_UP
        | {
            "layers.*.self_attn.qkv_proj": fused(
                *(f"layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
                sizes=lambda config: [
                    head_dim(config) * heads
                    for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])
                ],
            )
        },
    ),
    "starcoder2": like(
        LLAMA,
        fields={"norm_eps": "norm_epsilon", "attention_bias": "use_bias", "mlp_bias": "use_bias"}
        | same("sliding_window"),
        constants=LAYER_NORM | {"gated_mlp": False},
        weights={"layers.*.mlp.c_fc": "layers.*.mlp.up_proj", "layers.*.mlp.c_proj": "layers.*.mlp.down_proj"},
    ),
    "stablelm": like(
        LLAMA,
        fields=PARTIAL_ROPE
        | {
            "norm_eps": "layer_norm_eps",
            "attention_bias": "use_qkv_bias",
            "parallel_blocks": "use_parallel_residual",
        },
        constants=LAYER_NORM | {"attention_output_bias": False},
        weights={
            "layers.*.input_layernorm": shared(
                "layers.*.input_layernorm",
                "layers.*.post_attention_layernorm",
                when=lambda config: config.use_parallel_residual,
            )
        },
        obstacles=stablelm_obstacles,
    ),
    "cohere": COHERE,
    "cohere2": like(
        COHERE,
        fields=SLIDING
        | {"no_rope_layers": lambda config: [int(kind == "sliding_attention") for kind in config.layer_types]},
    ),
    "phi": PHI,
    "gpt_neox": GPT_NEOX,
    "persimmon": like(
        GPT_NEOX,
        fields={"qk_norm": "qk_layernorm"},
        constants={"parallel_blocks": False, "attention_bias": True},
        weights={
            "embed_tokens": "embed_tokens",
            "layers.*.self_attn.query_key_value": grouped(
                "layers.*.self_attn", lambda config: config.num_attention_heads
            ),
            "layers.*.self_attn.dense": "layers.*.self_attn.o_proj",
            "layers.*.self_attn.q_layernorm": "layers.*.self_attn.q_norm",
            "layers.*.self_attn.k_layernorm": "layers.*.self_attn.k_norm",
            "final_layernorm": "norm",
        },
    ),
    "falcon": FALCON,
    "gpt2": GPT2,
    "gpt_bigcode": like(
        GPT2,
        fields={
            "num_key_value_heads": gpt_bigcode_groups,
            "attention_scaling": lambda config: None if config.scale_attn_weights else 1.0,
        },
        weights={
            "h.*.attn.c_attn": grouped("layers.*.self_attn", gpt_bigcode_groups),
            "h.*.attn.c_proj": "layers.*.self_attn.o_proj",
            "h.*.mlp.c_fc": "layers.*.mlp.up_proj",
            "h.*.mlp.c_proj": "layers.*.mlp.down_proj",
        },
        obstacles=gpt_bigcode_obstacles,
    ),
    "gpt_neo": like(
        GPT2,
        fields={
            "intermediate_size": lambda config: config.intermediate_size or 4 * config.hidden_size,
            "attention_dropout": "attention_dropout",
            "sliding_window": lambda config: config.window_size if "local" in config.attention_layers else None,
            "layer_types": lambda config: [
                "sliding_attention" if kind == "local" else "full_attention" for kind in config.attention_layers
            ],
        },
        constants={"attention_bias": False, "attention_output_bias": True, "attention_scaling": 1.0},
        weights={
            "h.*.attn.attention.out_proj": "layers.*.self_attn.o_proj",
            "h.*.attn.attention": "layers.*.self_attn",
            "h.*.mlp.c_fc": "layers.*.mlp.up_proj",
            "h.*.mlp.c_proj": "layers.*.mlp.down_proj",
        },
        obstacles=lambda config: (),
    ),
    "gptj": GPTJ,
    "codegen": like(
        GPTJ,
        fields={"pad_token_id": lambda config: getattr(config, "pad_token_id", None)},
        weights={"h.*.attn.qkv_proj": sharded("layers.*.self_attn", shards=4)},
    ),
    "nemotron": like(
        LLAMA,
        fields=PARTIAL_ROPE | BIASES | same("norm_eps"),
        constants=LAYER_NORM | {"gated_mlp": False},
        weights={
            f"{name}.weight": plus_one(f"{name}.weight")
            for name in ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm")
        },
    ),
    "opt": OPT,
    "biogpt": Family(
        fields=DECODER_FIELDS
        | same("intermediate_size", "hidden_act", "initializer_range")
        | {
            "attention_dropout": "attention_probs_dropout_prob",
            "embedding_multiplier": lambda config: config.hidden_size**0.5 if config.scale_embedding else 1.0,
        },
        constants=LAYER_NORM
        | {"norm_eps": 1e-5, "position_embedding": "learned", "attention_bias": True, "mlp_bias": True},
        weights={
            pattern.removeprefix("decoder."): move for pattern, move in OPT.weights.items() if "final" not in pattern
        }
        | {"layers.*.final_layer_norm": "layers.*.post_attention_layernorm", "layer_norm": "norm"},
    ),
    # The standard scheme of this family.
    "dca": Family(
        fields=dca_fields(DCAConfig),
        weights=same("embed_tokens", "embed_positions", "layers", "norm"),
        obstacles=dca_obstacles,
    ),
}

VIT = Family(
    fields=same(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "initializer_range",
        "image_size",
        "patch_size",
        "num_channels",
        *LABEL_FIELDS,
    )
    | {
        "head_dim": head_dim,
        "norm_eps": "layer_norm_eps",
        "attention_bias": "qkv_bias",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    constants={"attention_output_bias": True, "position_embedding": "learned", "pooling": "cls"},
    weights={
        # Only pre-training masks patches.
        "embeddings.mask_token": Move(()),
        "embeddings": "embeddings",
        "layers.*.layernorm_before": "layers.*.input_layernorm",
        "layers.*.attention": "layers.*.self_attn",
        "layers.*.layernorm_after": "layers.*.post_attention_layernorm",
        "layers.*.mlp.fc1": "layers.*.mlp.up_proj",
        "layers.*.mlp.fc2": "layers.*.mlp.down_proj",
        "layernorm": "norm",
        # No classifier has it.
        "pooler": Move(()),
    },
)


def dinov2_intermediate_size(config: PreTrainedConfig) -> int:
    width = int(config.hidden_size * config.mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width


def is_classifier(config: PreTrainedConfig) -> bool:
    return "ForImageClassification" in config.architectures[0]


DINOV2 = like(
    VIT,
    fields={
        "intermediate_size": dinov2_intermediate_size,
        "gated_mlp": "use_swiglu_ffn",
        "hidden_act": lambda config: "silu" if config.use_swiglu_ffn else config.hidden_act,
        "pooling": lambda config: "cls_mean" if is_classifier(config) else "cls",
    },
    constants={"interpolate_pos_encoding": True},
    weights={
        "embeddings.mask_token": Move(()),
        "embeddings": "embeddings",
        "encoder.layer.*.norm1": "layers.*.input_layernorm",
        # (The names within attention and gated module before transformers 5.23.)
        "encoder.layer.*.attention.attention.query": "layers.*.self_attn.q_proj",
        "encoder.layer.*.attention.attention.key": "layers.*.self_attn.k_proj",
        "encoder.layer.*.attention.attention.value": "layers.*.self_attn.v_proj",
        "encoder.layer.*.attention.output.dense": "layers.*.self_attn.o_proj",
        "encoder.layer.*.mlp.weights_in": fused("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
        "encoder.layer.*.mlp.weights_out": "layers.*.mlp.down_proj",
        "encoder.layer.*.attention": "layers.*.self_attn",
        "encoder.layer.*.layer_scale1.lambda1": "layers.*.self_attn.o_proj.layer_scale",
        "encoder.layer.*.norm2": "layers.*.post_attention_layernorm",
        "encoder.layer.*.mlp.fc1": "layers.*.mlp.up_proj",
        "encoder.layer.*.mlp.fc2": "layers.*.mlp.down_proj",
        "encoder.layer.*.mlp": "layers.*.mlp",
        "encoder.layer.*.layer_scale2.lambda1": "layers.*.mlp.down_proj.layer_scale",
        "layernorm": "norm",
    },
)

VISION_FAMILIES: dict[str, Family] = {
    "vit": VIT,
    "vit_msn": VIT,
    "ijepa": like(VIT, constants={"pooling": "mean"}),
    "deit": like(
        VIT,
        fields={
            "pooling": lambda config: "cls_registers" if config.architectures[0].endswith("WithTeacher") else "cls"
        },
        constants={"num_register_tokens": 1},
        weights={
            "embeddings.mask_token": Move(()),
            "embeddings.distillation_token": "embeddings.register_tokens",
        },
        heads={
            "cls_classifier": averaged("classifier", second=False),
            "distillation_classifier": averaged("classifier", second=True),
        },
    ),
    "dinov2": DINOV2,
    "dinov2_with_registers": like(
        DINOV2,
        fields=same("num_register_tokens"),
        constants={"antialias_pos_encoding": True},
        weights={
            "embeddings.mask_token": Move(()),
            # Registers have no positions there.
            "embeddings.position_embeddings": Move(
                ("embeddings.position_embeddings",),
                lambda config, tensor: (
                    torch.cat(
                        (
                            tensor[:, :1],
                            tensor.new_zeros(1, config.num_register_tokens, tensor.shape[2]),
                            tensor[:, 1:],
                        ),
                        1,
                    ),
                ),
                lambda config, tensor: torch.cat((tensor[:, :1], tensor[:, 1 + config.num_register_tokens :]), 1),
            ),
            "embeddings.register_tokens": Move(
                ("embeddings.register_tokens", "embeddings.position_embeddings"),
                revert=lambda config, tensor, positions: tensor + positions[:, 1 : 1 + tensor.shape[1]],
            ),
        },
    ),
    "dca_vision": Family(
        fields=dca_fields(DCAVisionConfig), weights=same("embeddings", "layers", "norm"), obstacles=dca_obstacles
    ),
}

#: The families by kind, which is named by the Auto class of most checkpoints.
FAMILIES = {"AutoModelForCausalLM": TEXT_FAMILIES, "AutoModelForImageClassification": VISION_FAMILIES}

#: The reasons why other well-known types cannot become DCA.
REFUSED = {
    "its norms are after the sum of the residual stream and a module's output, while a DCA block norms only the output": (
        *("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "openai-gpt"),
    ),
    "its feed-forward module is a mixture of experts, which a DCA block does not have": (
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "dbrx"),
        *("granitemoe", "glm4_moe", "llama4", "llama4_text", "jamba", "minimax"),
    ),
    "it normalizes queries and keys after rotating them, while DCA does so before": ("hunyuan_v1_dense", "nanochat"),
    "its attention has sinks, which DCA's does not": ("granite_swa",),
    "its attention scales queries by their position, which DCA's does not": ("ministral3",),
    "its attention has biases by distance (ALiBi), which DCA's does not": ("bloom", "mpt"),
    "its blocks are not transformer blocks": ("mamba", "mamba2", "falcon_mamba", "rwkv", "convnext", "convnextv2"),
    "it is a hierarchy of stages, while DCA has blocks of one size": (
        "swin",
        "swinv2",
        "pvt",
        "mobilevit",
        "segformer",
    ),
    "its attention has relative positions, which DCA's does not": ("beit", "data2vec-vision"),
    "its fixed sine and cosine positions start at 2, while DCA's start at 0": ("xglm",),
}

__all__ = ["FAMILIES", "REFUSED", "TEXT_FAMILIES", "VISION_FAMILIES", "Family", "Move", "find_move"]
