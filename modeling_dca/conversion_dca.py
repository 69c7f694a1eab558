"""
Trained residual models into DCA, and back: which field and which weight of a family goes where.

A generalized residual whose `delta` and `gate` are zero is the residual sum, so that a DCA model with the weights of a
pre-norm transformer computes what that computes (paper, section 3.1 and table 4). To add a family, add a [`Family`].
"""

import copy
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from .configuration_dca import DCABaseConfig, DCAConfig, DCAVisionConfig, nearest_name


Model = TypeVar("Model", bound=PreTrainedModel)

#: Fields of the configuration that do not change what a converted model computes, and so are the user's to choose.
OVERRIDES = (
    "residual_scheme",
    "last_k",
    "grn_implementation",
    "attn_implementation",
    "attention_dropout",
    "initializer_range",
    "use_cache",
)
#: What `from_pretrained` may be told about a source that is not loaded yet.
LOADING_ARGUMENTS = (
    "cache_dir",
    "dtype",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "variant",
)


@dataclass(frozen=True)
class Move:
    """
    Where the weights of one module of the source go, and how they change on the way.

    Args:
        targets (`tuple[str, ...]`): names of modules or parameters of the DCA model; none if nothing reads the weight.
        convert (`Callable`, *optional*): from the source's tensor to those of the targets.
        revert (`Callable`, *optional*): from the targets' tensors to that of the source.
    """

    targets: tuple[str, ...]
    convert: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda tensor: (tensor,)
    revert: Callable[..., torch.Tensor] = lambda tensor: tensor


def transposed(*targets: str) -> Move:
    """GPT-2's `Conv1D`, `(in, out)`, as one linear map or several side by side; a bias has but one dimension."""
    return Move(
        targets,
        lambda tensor: parts(tensor.t(), len(targets)),
        lambda *tensors: torch.cat(tensors).t().contiguous(),
    )


def fused(*targets: str) -> Move:
    """Linear maps of one size that the source keeps in one matrix, one below the other."""
    return Move(targets, lambda tensor: parts(tensor, len(targets)), lambda *tensors: torch.cat(tensors))


def parts(tensor: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    # Each with a storage of its own: those that share one cannot be saved.
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(number))


@dataclass(frozen=True)
class Family:
    """
    How the models of one `model_type` become DCA.

    Args:
        fields (`dict`): for a field of the DCA configuration the source's field, or a function of its configuration.
        constants (`dict`): fields of the DCA configuration that are the same for all models of the family.
        weights (`dict`): for a module or parameter of the source, `*` being the number of a layer, its name in the DCA
            model or a [`Move`]. The first entry that fits a weight is taken. What goes to `.layer_scale` of a linear
            map is multiplied into it.
        obstacles (`Callable`): from the source's configuration to the reasons why this model cannot become DCA.
        bare_norms (`Callable`): whether the source's norms have no parameters; those of the DCA model are 1 and 0.
    """

    fields: dict[str, str | Callable[[PreTrainedConfig], Any]]
    weights: dict[str, str | Move]
    constants: dict[str, Any] = field(default_factory=dict)
    obstacles: Callable[[PreTrainedConfig], Iterable[str]] = lambda config: ()
    bare_norms: Callable[[PreTrainedConfig], bool] = lambda config: False

    def config_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The fields of the DCA configuration."""
        values = {
            name: getattr(config, source) if isinstance(source, str) else source(config)
            for name, source in self.fields.items()
        }
        return values | self.constants

    def find(self, name: str) -> Move | None:
        """How the source's weight `name` moves, with the names of the targets in full."""
        for pattern, move in self.weights.items():
            parts, own = pattern.split("."), name.split(".")
            if len(parts) <= len(own) and all(part in ("*", o) for part, o in zip(parts, own)):
                move = Move((move,)) if isinstance(move, str) else move
                layer = next((o for part, o in zip(parts, own) if part == "*"), "")
                rest = own[len(parts) :]
                targets = (".".join([target.replace("*", layer), *rest]) for target in move.targets)
                return replace(move, targets=tuple(targets))
        return None


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: PreTrainedConfig) -> dict:
    parameters = dict(config.rope_parameters)
    if parameters["rope_type"] == "default":
        # These families rotate the whole head by default, whatever is written here.
        parameters.pop("partial_rotary_factor", None)
    return parameters


def gpt2_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.add_cross_attention:
        yield "`add_cross_attention` is set, and a DCA block has no cross-attention"
    if config.scale_attn_by_inverse_layer_idx:
        yield "`scale_attn_by_inverse_layer_idx` is set, and DCA scales the attention of all layers alike"
    if config.reorder_and_upcast_attn:
        yield "`reorder_and_upcast_attn` is set, and DCA takes attention in the model's own precision"
    if not config.scale_attn_weights:
        yield "`scale_attn_weights` is not set, and DCA scales attention by the width of a head"


def opt_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if not config.do_layer_norm_before:
        yield "`do_layer_norm_before` is not set, and a DCA block has its norms before attention and feed-forward module"
    if config.word_embed_proj_dim != config.hidden_size:
        yield (
            f"`word_embed_proj_dim` ({config.word_embed_proj_dim}) is not `hidden_size` ({config.hidden_size}), and DCA "
            "does not project embeddings"
        )
    if config._remove_final_layer_norm:
        yield "`_remove_final_layer_norm` is set, and DCA has a norm before the output embedding"


def olmo_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.clip_qkv is not None:
        yield f"`clip_qkv` is {config.clip_qkv}, and DCA does not clip queries, keys and values"


def gemma_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.use_bidirectional_attention:
        yield "`use_bidirectional_attention` is set, and DCA's language models are causal"


def dca_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    if config.residual_scheme != "standard":
        yield "it is DCA already: load it with `from_pretrained`"


def dca_fields(config_class: type[DCABaseConfig]) -> dict[str, str]:
    chosen = {"residual_scheme", "last_k", "residual_config"}
    own = [
        each.name
        for each in fields(config_class)
        if each.name in config_class.__annotations__ | DCABaseConfig.__annotations__
    ]
    return same(*(name for name in own if name not in chosen), "id2label", "label2id", "problem_type")


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
)
LLAMA_LIKE = Family(
    fields=DECODER_FIELDS
    | same("intermediate_size", "num_key_value_heads", "hidden_act", "initializer_range", "attention_dropout")
    | {"norm_eps": "rms_norm_eps", "head_dim": head_dim, "rope_parameters": rope_parameters},
    constants={"gated_mlp": True},
    weights=same("model", "lm_head"),
)
SLIDING = same("sliding_window", "layer_types")

TEXT_FAMILIES: dict[str, Family] = {
    "llama": replace(LLAMA_LIKE, fields=LLAMA_LIKE.fields | same("attention_bias", "mlp_bias")),
    "mistral": replace(LLAMA_LIKE, fields=LLAMA_LIKE.fields | same("sliding_window")),
    "qwen2": replace(
        LLAMA_LIKE,
        fields=LLAMA_LIKE.fields | SLIDING,
        constants=LLAMA_LIKE.constants | {"attention_bias": True, "attention_output_bias": False},
    ),
    "qwen3": replace(
        LLAMA_LIKE,
        fields=LLAMA_LIKE.fields | SLIDING | same("attention_bias"),
        constants=LLAMA_LIKE.constants | {"qk_norm": True},
    ),
    "smollm3": replace(
        LLAMA_LIKE,
        fields=LLAMA_LIKE.fields
        | SLIDING
        | same("attention_bias", "mlp_bias")
        | {"no_rope_layers": lambda config: config.no_rope_layers[: config.num_hidden_layers]},
    ),
    "olmo": replace(
        LLAMA_LIKE,
        fields={name: source for name, source in LLAMA_LIKE.fields.items() if name != "norm_eps"}
        | same("attention_bias"),
        constants=LLAMA_LIKE.constants | {"norm_type": "layer_norm", "norm_eps": 1e-5},
        obstacles=olmo_obstacles,
        bare_norms=lambda config: True,
    ),
    "gemma": replace(
        LLAMA_LIKE,
        fields=LLAMA_LIKE.fields
        | same("attention_bias")
        | {"embedding_multiplier": lambda config: config.hidden_size**0.5},
        constants=LLAMA_LIKE.constants | {"norm_type": "zero_centered_rms_norm"},
        obstacles=gemma_obstacles,
    ),
    "gpt2": Family(
        fields=DECODER_FIELDS
        | same("initializer_range")
        | {
            "intermediate_size": lambda config: config.n_inner if config.n_inner is not None else 4 * config.n_embd,
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
            "attention_dropout": "attn_pdrop",
        },
        constants={
            "norm_type": "layer_norm",
            "position_embedding": "learned",
            "attention_bias": True,
            "mlp_bias": True,
        },
        weights={
            "transformer.wte": "model.embed_tokens",
            "transformer.wpe": "model.embed_positions",
            "transformer.h.*.ln_1": "model.layers.*.input_layernorm",
            "transformer.h.*.attn.c_attn": transposed(
                "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"
            ),
            "transformer.h.*.attn.c_proj": transposed("model.layers.*.self_attn.o_proj"),
            "transformer.h.*.ln_2": "model.layers.*.post_attention_layernorm",
            "transformer.h.*.mlp.c_fc": transposed("model.layers.*.mlp.up_proj"),
            "transformer.h.*.mlp.c_proj": transposed("model.layers.*.mlp.down_proj"),
            "transformer.ln_f": "model.norm",
            "lm_head": "lm_head",
        },
        obstacles=gpt2_obstacles,
    ),
    "opt": Family(
        fields=DECODER_FIELDS
        | same("attention_dropout")
        | {
            "intermediate_size": "ffn_dim",
            "hidden_act": "activation_function",
            "initializer_range": "init_std",
            "attention_bias": "enable_bias",
            "mlp_bias": "enable_bias",
        },
        constants={"norm_type": "layer_norm", "norm_eps": 1e-5, "position_embedding": "learned"},
        weights={
            # Positions start at 2: nothing but padding has those before.
            "model.decoder.embed_positions": Move(
                ("model.embed_positions",),
                lambda tensor: (tensor[2:].clone(),),
                lambda tensor: torch.cat((torch.zeros_like(tensor[:2]), tensor)),
            ),
            "model.decoder.layers.*.self_attn_layer_norm": "model.layers.*.input_layernorm",
            "model.decoder.layers.*.self_attn.out_proj": "model.layers.*.self_attn.o_proj",
            "model.decoder.layers.*.self_attn": "model.layers.*.self_attn",
            "model.decoder.layers.*.final_layer_norm": "model.layers.*.post_attention_layernorm",
            "model.decoder.layers.*.fc1": "model.layers.*.mlp.up_proj",
            "model.decoder.layers.*.fc2": "model.layers.*.mlp.down_proj",
            "model.decoder.final_layer_norm": "model.norm",
            "model.decoder.embed_tokens": "model.embed_tokens",
            "lm_head": "lm_head",
        },
        obstacles=opt_obstacles,
        bare_norms=lambda config: not config.layer_norm_elementwise_affine,
    ),
    # The standard scheme of this family.
    "dca": Family(fields=dca_fields(DCAConfig), weights=same("model", "lm_head"), obstacles=dca_obstacles),
}


def vision_weights(prefix: str) -> dict[str, str | Move]:
    return {
        f"{prefix}.embeddings": "model.embeddings",
        f"{prefix}.layers.*.layernorm_before": "model.layers.*.input_layernorm",
        f"{prefix}.layers.*.attention": "model.layers.*.self_attn",
        f"{prefix}.layers.*.layernorm_after": "model.layers.*.post_attention_layernorm",
        f"{prefix}.layers.*.mlp.fc1": "model.layers.*.mlp.up_proj",
        f"{prefix}.layers.*.mlp.fc2": "model.layers.*.mlp.down_proj",
        f"{prefix}.layernorm": "model.norm",
        "classifier": "classifier",
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
        "id2label",
        "label2id",
        "problem_type",
    )
    | {
        "head_dim": head_dim,
        "norm_eps": "layer_norm_eps",
        "attention_bias": "qkv_bias",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    constants={"attention_output_bias": True, "position_embedding": "learned", "pooling": "cls"},
    weights=vision_weights("vit"),
)


def dinov2_intermediate_size(config: PreTrainedConfig) -> int:
    width = int(config.hidden_size * config.mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width


VISION_FAMILIES: dict[str, Family] = {
    "vit": VIT,
    "deit": replace(
        VIT,
        constants=VIT.constants | {"num_register_tokens": 1},
        weights={"deit.embeddings.distillation_token": "model.embeddings.register_tokens"} | vision_weights("deit"),
    ),
    "dinov2": replace(
        VIT,
        fields=VIT.fields
        | {
            "intermediate_size": dinov2_intermediate_size,
            "gated_mlp": "use_swiglu_ffn",
            "hidden_act": lambda config: "silu" if config.use_swiglu_ffn else config.hidden_act,
        },
        constants=VIT.constants | {"pooling": "cls_mean"},
        weights={
            # Only pre-training masks patches.
            "dinov2.embeddings.mask_token": Move(()),
            "dinov2.embeddings": "model.embeddings",
            "dinov2.encoder.layer.*.norm1": "model.layers.*.input_layernorm",
            # (The names within attention and gated module before transformers 5.23.)
            "dinov2.encoder.layer.*.attention.attention.query": "model.layers.*.self_attn.q_proj",
            "dinov2.encoder.layer.*.attention.attention.key": "model.layers.*.self_attn.k_proj",
            "dinov2.encoder.layer.*.attention.attention.value": "model.layers.*.self_attn.v_proj",
            "dinov2.encoder.layer.*.attention.output.dense": "model.layers.*.self_attn.o_proj",
            "dinov2.encoder.layer.*.mlp.weights_in": fused(
                "model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"
            ),
            "dinov2.encoder.layer.*.mlp.weights_out": "model.layers.*.mlp.down_proj",
            "dinov2.encoder.layer.*.attention": "model.layers.*.self_attn",
            "dinov2.encoder.layer.*.layer_scale1.lambda1": "model.layers.*.self_attn.o_proj.layer_scale",
            "dinov2.encoder.layer.*.norm2": "model.layers.*.post_attention_layernorm",
            "dinov2.encoder.layer.*.mlp.fc1": "model.layers.*.mlp.up_proj",
            "dinov2.encoder.layer.*.mlp.fc2": "model.layers.*.mlp.down_proj",
            "dinov2.encoder.layer.*.mlp": "model.layers.*.mlp",
            "dinov2.encoder.layer.*.layer_scale2.lambda1": "model.layers.*.mlp.down_proj.layer_scale",
            "dinov2.layernorm": "model.norm",
            "classifier": "classifier",
        },
    ),
    "dca_vision": Family(
        fields=dca_fields(DCAVisionConfig), weights=same("model", "classifier"), obstacles=dca_obstacles
    ),
}

FAMILIES = {"AutoModelForCausalLM": TEXT_FAMILIES, "AutoModelForImageClassification": VISION_FAMILIES}

#: Why other well-known types cannot become DCA.
REFUSED = {
    "its norms stand after attention and feed-forward module, where a DCA block has them before": (
        *("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "openai-gpt"),
        *("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4", "swinv2"),
    ),
    "it runs attention and feed-forward module in parallel, where a DCA block runs one after the other": (
        *("gpt_neox", "gptj", "codegen", "phi", "falcon", "cohere", "cohere2"),
    ),
    "its feed-forward module is a mixture of experts, which a DCA block does not have": (
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "dbrx"),
        *("granitemoe", "glm4_moe", "llama4", "llama4_text", "jamba", "minimax"),
    ),
    "it multiplies attention, residuals or logits by numbers of its own, which a DCA block does not": ("granite",),
    "its attention has biases by distance (ALiBi), which DCA does not": ("bloom", "mpt"),
    "its blocks are no transformer blocks": ("mamba", "mamba2", "falcon_mamba", "rwkv", "convnext", "convnextv2"),
    "it is a hierarchy of stages, where DCA has blocks of one size": ("swin", "pvt", "mobilevit", "segformer"),
    "its attention has relative positions, which DCA does not": ("beit", "data2vec-vision"),
}


def refusals(config: PreTrainedConfig, family: Family | None) -> Iterator[str]:
    """The reasons, if any, why a model cannot become DCA."""
    for reason, model_types in REFUSED.items():
        if config.model_type in model_types:
            yield reason
    if config.is_encoder_decoder:
        yield "it is an encoder and a decoder with cross-attention, which a DCA block does not have"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        yield "its feed-forward module is a mixture of experts, which a DCA block does not have"
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantized; give a model in floating point"
    if family is not None:
        yield from family.obstacles(config)
        padding, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
        if padding is not None and vocabulary is not None and padding >= vocabulary:
            yield f"`pad_token_id` ({padding}) lies outside of its vocabulary (`vocab_size` {vocabulary})"


def find_family(config: PreTrainedConfig, auto_class: str) -> Family:
    """
    The family of a model, by its configuration.

    Raises:
        `ValueError`: the family is not known, or this model of it cannot become DCA.
    """
    family = FAMILIES[auto_class].get(config.model_type)
    for reason in refusals(config, family):
        raise ValueError(f"A {config.model_type!r} model cannot become DCA as it is: {reason}.")
    if family is None:
        for other, families in FAMILIES.items():
            if config.model_type in families:
                raise ValueError(
                    f"`source` is a {config.model_type!r} model: use `from_residual` of the DCA class for {other}."
                )
        raise ValueError(
            f"No conversion to DCA is known for {config.model_type!r} models; "
            + nearest_name(config.model_type, FAMILIES[auto_class])
        )
    return family


def model_class_of(config: PreTrainedConfig, auto_class: str) -> type[PreTrainedModel]:
    """The class of models with a configuration, and the head that an Auto class names."""
    model_class = getattr(transformers, auto_class)._model_mapping[type(config)]
    return model_class[0] if isinstance(model_class, tuple) else model_class


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def distinct_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All that a model saves, by name; tied weights under the first of their names."""
    weights: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in weights.values()}


def fill(model_class: type[Model], config: PreTrainedConfig, weights: dict, like: dict) -> Model:
    """A model that takes `weights` over, without copies; `like` tells device, type, and how it generates."""
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=like["dtype"])
    if like["generation_config"] is not None:
        model.generation_config = copy.deepcopy(like["generation_config"])
    return model.to(like["device"])


def properties(model: PreTrainedModel) -> dict[str, Any]:
    generation_config = model.generation_config if model.can_generate() else None
    return {"dtype": model.dtype, "device": model.device, "generation_config": generation_config}


def convert_weights(
    family: Family, bare_norms: bool, weights: dict[str, torch.Tensor], target: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """
    The weights of the DCA model `target` from those of the source. `weights` is emptied on the way, so that of what
    changes no more than a tensor is there twice.

    Raises:
        `ValueError`: a weight of the source goes nowhere, or one of the DCA model comes from nowhere.
    """
    wanted, converted, unused = distinct_weights(target), {}, []
    for name in list(weights):
        move, tensor = family.find(name), weights.pop(name)
        if tensor.ndim == 1:
            # A norm or a bias would keep all of the file mapped that it is from.
            tensor = tensor.clone()
        if move is None or tensor.is_meta:
            unused.append(name)
        else:
            converted |= zip(move.targets, move.convert(tensor))
    for name in [name for name in converted if name.endswith(".layer_scale")]:
        scale, module = converted.pop(name), name.removesuffix(".layer_scale")
        converted[f"{module}.weight"] = converted[f"{module}.weight"] * scale[:, None]
        converted[f"{module}.bias"] = converted[f"{module}.bias"] * scale

    for name, parameter in wanted.items():
        *_, module, kind = name.split(".")
        if module in ("key_layernorm", "value_layernorm"):
            source = name.replace(module, "input_layernorm")
            if source in converted:
                converted[name] = converted[source].clone()
        if name not in converted:
            if kind in ("delta", "gate"):
                converted[name] = torch.zeros(parameter.shape)
            elif bare_norms and module.endswith("norm"):
                converted[name] = torch.full(parameter.shape, float(kind == "weight"))

    unused += converted.keys() - wanted.keys()
    missing = wanted.keys() - converted.keys()
    misshapen = [name for name in wanted.keys() & converted.keys() if wanted[name].shape != converted[name].shape]
    for names, fault in (
        (unused, "has weights that have no place in DCA, or hold no data"),
        (missing, "lacks weights that DCA needs"),
        (misshapen, "has weights that do not have the shapes that its configuration tells"),
    ):
        if names:
            raise ValueError(f"`source` {fault}: {', '.join(sorted(names))}.")
    return converted


def load_source(
    source: str | os.PathLike | PreTrainedModel, auto_class: str, loading: dict[str, Any]
) -> tuple[Family, PreTrainedModel]:
    """The source's family and the source, from a path or the Hub in the type in which it was saved."""
    if isinstance(source, (str, os.PathLike)):
        hub = {name: value for name, value in loading.items() if name not in ("dtype", "variant")}
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
        family = find_family(config, auto_class)
        loading = {"dtype": "auto"} | loading
        model_class = model_class_of(config, auto_class)
        model, report = model_class.from_pretrained(source, config=config, output_loading_info=True, **loading)
        for kind, fault in (("missing_keys", "it lacks"), ("unexpected_keys", "it also has")):
            if report[kind]:
                raise ValueError(
                    f"The checkpoint {str(source)!r} is not a {model_class.__name__} of its configuration; {fault} "
                    f"{', '.join(sorted(report[kind]))}."
                )
        return family, model
    if loading:
        raise ValueError(f"`source` is loaded already: leave out {', '.join(f'`{name}`' for name in loading)}.")
    if getattr(source, "config", None) is None:
        raise ValueError(f"`source` is a {type(source).__name__}; give a transformers model, a path or a Hub id.")
    family = find_family(source.config, auto_class)
    model_class = model_class_of(source.config, auto_class)
    if not isinstance(source, model_class):
        raise ValueError(f"`source` is a {type(source).__name__}; give a {model_class.__name__}.")
    return family, source


def check_overrides(model_class: type[PreTrainedModel], overrides: dict[str, Any]) -> None:
    # (Only text models have a cache.)
    choices = [name for name in OVERRIDES if name != "use_cache" or hasattr(model_class.config_class, name)]
    for name in overrides:
        if name in choices:
            continue
        if hasattr(model_class.config_class, name):
            raise ValueError(f"`{name}` follows from the source; what can be chosen is {', '.join(choices)}.")
        raise ValueError(f"`{name}` is no field; {nearest_name(name, [*choices, *LOADING_ARGUMENTS])}")


def convert_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, overrides: dict[str, Any]
) -> DCABaseConfig:
    """
    The configuration of the DCA model that a model with `config` becomes.

    Raises:
        `ValueError`: it cannot become DCA, or an override is not one.
    """
    check_overrides(model_class, overrides)
    family = find_family(config, model_class._auto_class)
    return model_class.config_class(
        **family.config_fields(config) | {"residual_config": config.to_diff_dict()} | overrides
    )


def from_residual(
    model_class: type[Model], source: str | os.PathLike | PreTrainedModel, **config_overrides: Any
) -> Model:
    """[`~modeling_dca.modeling_dca.ResidualConversionMixin.from_residual`] of `model_class`."""
    loading = {name: config_overrides.pop(name) for name in LOADING_ARGUMENTS if name in config_overrides}
    check_overrides(model_class, config_overrides)
    family, model = load_source(source, model_class._auto_class, loading)
    config = convert_config(model_class, model.config, config_overrides)
    target = build_on_meta(model_class, config)
    like, bare_norms, weights = properties(model), family.bare_norms(model.config), distinct_weights(model)
    if model is source:
        weights = {name: weight if weight.is_meta else weight.to("cpu", copy=True) for name, weight in weights.items()}
    del model
    gc.collect()  # Modules refer to each other in circles, which would hold what is popped from `weights`.
    return fill(model_class, config, convert_weights(family, bare_norms, weights, target), like)


def check_identity(model: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: a generalized residual is not the residual sum, or a block's queries, keys and values have
            different norms.
    """
    for i, layer in enumerate([*model.model.layers, None]):
        residual, place = (model.model.residual, "output") if layer is None else (layer.residual, f"block {i}")
        for name, parameter in residual.named_parameters():
            if parameter.any():
                raise ValueError(
                    f"The model cannot go back: `{name}` of {place} is not zero, so that its input is no residual sum."
                )
        for norm in (getattr(layer, "key_layernorm", None), getattr(layer, "value_layernorm", None)):
            if norm is not None and any(
                not torch.equal(weight, layer.input_layernorm.get_parameter(name))
                for name, weight in norm.named_parameters()
            ):
                raise ValueError(
                    f"The model cannot go back: the norms of queries, keys and values of {place} are not the same."
                )


def to_residual(model: PreTrainedModel) -> PreTrainedModel:
    """[`~modeling_dca.modeling_dca.ResidualConversionMixin.to_residual`] of `model`."""
    if model.config.residual_config is None:
        raise ValueError("The model cannot go back: it was not made by `from_residual`.")
    check_identity(model)
    config = CONFIG_MAPPING[model.config.residual_config["model_type"]].from_dict(model.config.residual_config)
    # What may have changed since: `resize_token_embeddings`, other labels.
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type")
    family = find_family(config, model._auto_class)
    for name in names:
        if name in family.fields:
            setattr(config, name, getattr(model.config, name))
    residual_class = model_class_of(config, model._auto_class)
    weights = {name: weight.to("cpu", copy=True) for name, weight in distinct_weights(model).items()}
    reverted, used = {}, set()
    for name, parameter in distinct_weights(build_on_meta(residual_class, config)).items():
        move = family.find(name)
        if not move.targets:
            reverted[name] = torch.zeros(parameter.shape)
        elif move.targets[0].endswith(".layer_scale"):
            reverted[name] = torch.ones(parameter.shape)
        else:
            reverted[name] = move.revert(*(weights[target] for target in move.targets))
            used.update(move.targets)
    for name in weights.keys() - used:
        *_, module, kind = name.split(".")
        neutral = kind in ("delta", "gate") or module in ("key_layernorm", "value_layernorm")
        if not neutral and not (weights[name] == float(kind == "weight")).all():
            raise ValueError(
                f"The model cannot go back: `{name}` was trained, but a {config.model_type!r} model has no such weight."
            )
    return fill(residual_class, config, reverted, properties(model))
