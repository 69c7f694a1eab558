"""
Conversion of trained residual models to DCA, and back. The supported families are in `families_dca`.

A generalized residual whose `delta` and `gate` are zero is the residual sum, so that a DCA model with the weights of a
pre-norm transformer computes the same (paper, section 3.1 and table 4).
"""

import copy
import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_dca import DCABaseConfig, nearest_name
from .families_dca import FAMILIES, REFUSED, Family, Move, find_move


logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)

#: Fields of the configuration that do not change what a converted model computes, and can be chosen.
OVERRIDES = (
    "residual_scheme",
    "last_k",
    "grn_implementation",
    "attn_implementation",
    "attention_dropout",
    "initializer_range",
    "use_cache",
)
#: Fields that can be chosen for a classifier, as in `from_pretrained`.
LABELS = ("num_labels", "id2label", "label2id", "problem_type")
#: Arguments of `from_pretrained` for a source that is not loaded yet.
LOADING_ARGUMENTS = (
    "cache_dir",
    "dtype",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "variant",
)
#: The name of the head of a DCA model, by Auto class.
HEADS = {
    "AutoModel": None,
    "AutoModelForCausalLM": "lm_head",
    "AutoModelForSequenceClassification": "score",
    "AutoModelForTokenClassification": "score",
    "AutoModelForQuestionAnswering": "qa_outputs",
    "AutoModelForImageClassification": "classifier",
}
#: The names of the heads of sources.
SOURCE_HEADS = (
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "qa_outputs",
    "cls_classifier",
    "distillation_classifier",
    "output_projection",
)
#: Heads whose outputs are labels. For fine-tuning, their number can be given, and a head that does not fit is replaced.
LABEL_HEADS = [name for name in HEADS if name not in ("AutoModel", "AutoModelForCausalLM")]


def kind_of(model_class: type[PreTrainedModel]) -> str:
    """The name in `FAMILIES` of the families that a DCA class is for."""
    vision = model_class.config_class.model_type == "dca_vision"
    return "AutoModelForImageClassification" if vision else "AutoModelForCausalLM"


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    quantization = getattr(config, "quantization_config", None) or {}
    return quantization if isinstance(quantization, dict) else vars(quantization)


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights of a model stay quantized when it is loaded."""
    quantization = quantization_of(config)
    return bool(quantization) and not quantization.get("dequantize", False)


def config_of(source: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of a loaded model. That of a GGUF file may say that weights are quantized which are not any more."""
    packed = quantization_of(source.config).get("quant_method") == "gguf"
    if not packed or not all(weight.is_floating_point() for weight in source.state_dict().values()):
        return source.config
    config = copy.deepcopy(source.config)
    del config.quantization_config
    return config


def refusals(config: PreTrainedConfig, family: Family | None) -> Iterator[str]:
    """The reasons, if any, why a model cannot become DCA."""
    for reason, model_types in REFUSED.items():
        if config.model_type in model_types:
            yield reason
    if config.is_encoder_decoder:
        yield "it has an encoder and a decoder with cross-attention, which a DCA block does not have"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        yield "its feed-forward module is a mixture of experts, which a DCA block does not have"
    if is_quantized(config):
        yield "its weights are quantized; give a model in floating point"
    if family is not None:
        yield from family.obstacles(config)


def find_family(config: PreTrainedConfig, kind: str) -> Family:
    """
    The family of a model, by its configuration, among those of a kind (see `FAMILIES`).

    Raises:
        `ValueError`: the family is not known, or this model of it cannot become DCA.
    """
    family = FAMILIES[kind].get(config.model_type)
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
            + nearest_name(config.model_type, FAMILIES[kind])
        )
    return family


def classes_of(config: PreTrainedConfig, auto_class: str) -> tuple[type[PreTrainedModel], ...]:
    """The classes, if any, of models with a configuration, and the head that an Auto class names."""
    classes = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    return classes if isinstance(classes, tuple) else (classes,)


def model_class_of(config: PreTrainedConfig, auto_class: str) -> type[PreTrainedModel]:
    """
    The class of models with a configuration, and the head that an Auto class names; the one that the configuration names if
    there are several, and that without a head if there is none.
    """
    classes = classes_of(config, auto_class) or classes_of(config, "AutoModel")
    named = [each for each in classes if each.__name__ in (config.architectures or ())]
    return [*named, *classes][0]


def checkpoint_class_of(config: PreTrainedConfig, auto_class: str) -> type[PreTrainedModel]:
    """The class that loads a checkpoint: its own, so that no head is added, or that of `auto_class` if it is not known."""
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [each for each in named if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    if auto_class == "AutoModelForCausalLM" or not known or not isinstance(config, known[0].config_class):
        return model_class_of(config, auto_class)
    return known[0]


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def distinct_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights that a model saves, by name; tied weights under the first of their names."""
    weights: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        weights.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in weights.values()}


def fill(model_class: type[Model], config: PreTrainedConfig, weights: dict, like: dict) -> Model:
    """
    A model with `weights`, without copies. Missing weights are initialized, and named in the log. `like` has the device, the
    type and the generation configuration.
    """
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=like["dtype"])
    if like["generation_config"] is not None and model.can_generate():
        model.generation_config = copy.deepcopy(like["generation_config"])
    return model.to(like["device"])


def properties(model: PreTrainedModel) -> dict[str, Any]:
    generation_config = model.generation_config if model.can_generate() else None
    return {"dtype": model.dtype, "device": model.device, "generation_config": generation_config}


def backbone_prefix(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The prefix of the backbone's weights in a model; empty if it has no head."""
    return "" if model_class in classes_of(config, "AutoModel") else f"{model_class.base_model_prefix}."


class Names:
    """How the names of a source's weights become those of a DCA model's: the backbone's, by the tables, and the head's."""

    def __init__(self, family: Family, prefix: str, head: str | None):
        self.family, self.prefix, self.head = family, prefix, head

    def find(self, name: str) -> Move | None:
        """How the source's weight `name` moves; `None` if the tables do not know it."""
        target_prefix = "" if self.head is None else "model."
        if name.startswith(self.prefix):
            found = find_move(self.family.weights, name.removeprefix(self.prefix))
            return found and prefixed(found[1], target_prefix)
        if (found := find_move(self.family.heads, name)) is not None:
            return found[1]
        module, _, kind = name.rpartition(".")
        return Move((f"{self.head}.{kind}",)) if self.head is not None and module in SOURCE_HEADS else None


def prefixed(move: Move, prefix: str) -> Move:
    return replace(move, targets=tuple(prefix + target for target in move.targets))


def release(tensor: torch.Tensor) -> None:
    """
    Releases the memory of a weight that is not read again. Otherwise it would count until the last weight of its file, which
    stays mapped, is gone.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    # Only whole pages, as its first and last page may hold other data.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def convert_weights(
    names: Names,
    source_config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    target: PreTrainedModel,
    fresh: bool,
) -> dict[str, torch.Tensor]:
    """
    The weights of the DCA model `target` from those of the source, without those of its head if that is `fresh`. `weights`
    is emptied on the way, so that at most one changed tensor is in memory twice.

    Raises:
        `ValueError`: a weight of the source has no place in DCA, or a weight of the DCA model is missing in the source.
    """
    wanted, converted, unused = distinct_weights(target), {}, []
    for name in list(weights):
        move, tensor = names.find(name), weights.pop(name)
        if tensor.ndim == 1:
            # A norm or a bias would keep its whole file mapped.
            tensor = tensor.clone()
        if move is None or tensor.is_meta:
            unused.append(name)
            continue
        values = move.convert(source_config, tensor)
        # (A move may have targets that only its reverse reads.)
        for place, value in zip(move.targets, values):
            converted[place] = move.join(converted[place], value) if move.join and place in converted else value
        if all(value.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for value in values):
            release(tensor)
    for name in [name for name in converted if name.endswith(".layer_scale")]:
        scale, module = converted.pop(name), name.removesuffix(".layer_scale")
        converted[f"{module}.weight"] = converted[f"{module}.weight"] * scale[:, None]
        converted[f"{module}.bias"] = converted[f"{module}.bias"] * scale

    bare_norms = names.family.bare_norms(source_config)
    for name, parameter in wanted.items():
        *_, module, kind = name.split(".")
        if module in ("key_layernorm", "value_layernorm"):
            twin = name.replace(module, "input_layernorm")
            if twin in converted:
                converted[name] = converted[twin].clone()
        if name not in converted:
            if kind in ("delta", "gate"):
                converted[name] = torch.zeros(parameter.shape)
            elif bare_norms and module.endswith("norm"):
                converted[name] = torch.full(parameter.shape, float(kind == "weight"))

    unused += converted.keys() - wanted.keys()
    missing = {name for name in wanted.keys() - converted.keys() if not fresh or name.split(".")[0] != names.head}
    misshapen = [name for name in wanted.keys() & converted.keys() if wanted[name].shape != converted[name].shape]
    for faulty, fault in (
        (unused, "has weights that have no place in DCA, or hold no data"),
        (missing, "lacks weights that DCA needs"),
        (misshapen, "has weights whose shapes do not match its configuration"),
    ):
        if faulty:
            raise ValueError(f"`source` {fault}: {', '.join(sorted(faulty))}.")
    return converted


def is_of_another_head(name: str) -> bool:
    """Whether a checkpoint's weight that a class does not know belongs to another head."""
    return name.split(".")[0] in (*SOURCE_HEADS, "pooler") or ".pooler." in name


def find_gguf_file(source: str | os.PathLike, loading: dict[str, Any]) -> tuple[str | os.PathLike, dict[str, Any]]:
    """The source and its loading arguments, with a GGUF file, given by its path or name in a repository, as `gguf_file`."""
    name = os.fspath(source)
    if not name.endswith(".gguf") or os.path.isdir(name):
        return source, loading
    if "gguf_file" in loading:
        raise ValueError(f"`source` is the file {name!r}: leave out `gguf_file`.")
    folder, file = os.path.split(name)
    if not os.path.exists(name) and len(parts := name.split("/")) > 2:
        folder, file = "/".join(parts[:2]), "/".join(parts[2:])
    return folder or ".", loading | {"gguf_file": file}


def load_source(
    source: str | os.PathLike | PreTrainedModel, model_class: type[PreTrainedModel], loading: dict[str, Any]
) -> tuple[PreTrainedModel, bool]:
    """The source, from a path or the Hub in the type in which it was saved; and whether it has the head of `model_class`."""
    auto_class, kind = model_class._auto_class, kind_of(model_class)
    if isinstance(source, (str, os.PathLike)):
        source, loading = find_gguf_file(source, loading)
        hub = {name: value for name, value in loading.items() if name not in ("dtype", "variant")}
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
        find_family(config, kind)
        loading = {"dtype": "auto"} | loading
        if "gguf_file" in loading and hasattr(transformers, "GgufConfig"):
            # (Releases of transformers without it make the weights dense in any case.)
            loading["quantization_config"] = transformers.GgufConfig(dequantize=True)
        source_class = checkpoint_class_of(config, auto_class)
        model, report = source_class.from_pretrained(source, config=config, output_loading_info=True, **loading)
        missing, unexpected = report["missing_keys"], report["unexpected_keys"]
        has_head = source_class in classes_of(config, auto_class)
        has_head = has_head and not any(name.split(".")[0] in SOURCE_HEADS for name in missing)
        if auto_class in LABEL_HEADS:
            missing = [name for name in missing if name.split(".")[0] not in SOURCE_HEADS]
        if auto_class != "AutoModelForCausalLM":
            unexpected = [name for name in unexpected if not is_of_another_head(name)]
        missing = [name for name in missing if not name.startswith("pooler.")]  # (No DCA model has one.)
        for names, fault in ((missing, "it lacks"), (unexpected, "it also has")):
            if names:
                raise ValueError(
                    f"The checkpoint {str(source)!r} is not a {source_class.__name__} of its configuration; {fault} "
                    f"{', '.join(sorted(names))}."
                )
        return model, has_head
    if loading:
        raise ValueError(f"`source` is already loaded: leave out {', '.join(f'`{name}`' for name in loading)}.")
    if getattr(source, "config", None) is None:
        raise ValueError(f"`source` is a {type(source).__name__}; give a transformers model, a path or a Hub id.")
    find_family(config_of(source), kind)
    has_head = isinstance(source, classes_of(source.config, auto_class))
    backbone = isinstance(getattr(source, "base_model", None), classes_of(source.config, "AutoModel"))
    if not has_head and not backbone or auto_class == "AutoModelForCausalLM" and not has_head:
        raise ValueError(
            f"`source` is a {type(source).__name__}; give a {model_class_of(source.config, auto_class).__name__}."
        )
    return source, has_head


def check_overrides(model_class: type[PreTrainedModel], overrides: dict[str, Any]) -> None:
    # (Only text models have a cache.)
    choices = [name for name in OVERRIDES if name != "use_cache" or hasattr(model_class.config_class, name)]
    choices += LABELS if model_class._auto_class in LABEL_HEADS else ()
    for name in overrides:
        if name in choices:
            continue
        if hasattr(model_class.config_class, name):
            raise ValueError(f"`{name}` follows from the source; only these can be chosen: {', '.join(choices)}.")
        raise ValueError(f"`{name}` is not a field; {nearest_name(name, [*choices, *LOADING_ARGUMENTS])}")


def as_source_config(config: PreTrainedConfig, auto_class: str) -> PreTrainedConfig:
    """A copy of a source's configuration that names the class with the head of the DCA model."""
    result = copy.deepcopy(config)
    result.architectures = [model_class_of(config, auto_class).__name__]
    if hasattr(result, "quantization_config"):
        del result.quantization_config  # (the weights are not quantized any more)
    return result


def asked_labels(overrides: dict[str, Any]) -> int:
    """The number of labels that the user requests; 0 for that of the source."""
    return overrides.get("num_labels") or len(overrides.get("id2label") or ())


def convert_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, overrides: dict[str, Any]
) -> DCABaseConfig:
    """
    The configuration of the DCA model that a model with `config` becomes.

    Raises:
        `ValueError`: it cannot become DCA, or an override is invalid.
    """
    check_overrides(model_class, overrides)
    family = find_family(config, kind_of(model_class))
    config = as_source_config(config, model_class._auto_class)
    fields = family.config_fields(config)
    if asked_labels(overrides) not in (0, config.num_labels):
        fields = {name: value for name, value in fields.items() if name not in LABELS}
    if (id2label := overrides.get("id2label")) is not None:
        fields["label2id"] = {label: index for index, label in id2label.items()}
    implementation = config._attn_implementation
    # (Older releases of transformers compute Gemma 2 with an attention that leaves the cap out.)
    if implementation is not None and not (implementation == "sdpa" and fields.get("attention_softcap")):
        fields["attn_implementation"] = implementation
    return model_class.config_class(**fields | {"source_config": config.to_diff_dict()} | overrides)


def check_head(model_class: type[Model], model: PreTrainedModel, has_head: bool, overrides: dict[str, Any]) -> bool:
    """
    Whether the DCA model needs a new head: `model` has none, or one with another number of labels than requested.

    Raises:
        `ValueError`: it does, but the number of labels is not given.
    """
    auto_class = model_class._auto_class
    if auto_class not in LABEL_HEADS:
        return False
    asked = asked_labels(overrides)
    if auto_class == "AutoModelForQuestionAnswering" and asked not in (0, 2):
        raise ValueError(f"`num_labels` is {asked}, but an answer has a start and an end: give 2.")
    if not has_head and not asked:
        raise ValueError(
            f"`source` has no head for {model_class.__name__}: pass `num_labels` (an integer) for a new head, which has to be "
            "trained."
        )
    return not has_head or bool(asked) and asked != model.config.num_labels


def from_residual(
    model_class: type[Model], source: str | os.PathLike | PreTrainedModel, **config_overrides: Any
) -> Model:
    """[`~modeling_dca.modeling_dca.ResidualConversionMixin.from_residual`] of `model_class`."""
    model, _ = convert(model_class, source, **config_overrides)
    return model


def convert(
    model_class: type[Model], source: str | os.PathLike | PreTrainedModel, **config_overrides: Any
) -> tuple[Model, bool]:
    """As [`from_residual`], and also returns whether the model's head is new."""
    loading = {name: config_overrides.pop(name) for name in LOADING_ARGUMENTS if name in config_overrides}
    check_overrides(model_class, config_overrides)
    model, has_head = load_source(source, model_class, loading)
    fresh = check_head(model_class, model, has_head, config_overrides)
    source_config = config_of(model)
    config = convert_config(model_class, source_config, config_overrides)
    target = build_on_meta(model_class, config)
    head = HEADS[model_class._auto_class]
    names = Names(find_family(source_config, kind_of(model_class)), backbone_prefix(type(model), source_config), head)
    like, weights = properties(model), distinct_weights(model)
    dropped = [
        name for name in weights if not name.startswith(names.prefix) and (fresh or not has_head or head is None)
    ]
    dropped += [name for name in weights if (move := names.find(name)) is not None and not move.targets]
    for name in dropped:
        del weights[name]
    if unread := [name for name in dropped if "mask_token" not in name]:
        logger.warning(f"{model_class.__name__} has no place for these weights of the source: {', '.join(unread)}.")
    if model is source:
        weights = {name: weight if weight.is_meta else weight.to("cpu", copy=True) for name, weight in weights.items()}
    del model
    gc.collect()  # Modules refer to each other in cycles, which would keep the weights in memory.
    return fill(model_class, config, convert_weights(names, source_config, weights, target, fresh), like), fresh


def check_identity(model: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: a generalized residual is not the residual sum, or a block's queries, keys and values have
            different norms.
    """
    backbone = model.base_model
    for i, layer in enumerate([*backbone.layers, None]):
        residual, place = (backbone.residual, "output") if layer is None else (layer.residual, f"block {i}")
        for name, parameter in residual.named_parameters():
            if parameter.any():
                raise ValueError(
                    f"The model cannot be converted back: `{name}` of {place} is not zero, so its input is not the residual sum."
                )
        for norm in (getattr(layer, "key_layernorm", None), getattr(layer, "value_layernorm", None)):
            if norm is not None and any(
                not torch.equal(weight, layer.input_layernorm.get_parameter(name))
                for name, weight in norm.named_parameters()
            ):
                raise ValueError(
                    f"The model cannot be converted back: the norms of queries, keys and values of {place} are not the same."
                )


def to_residual(model: PreTrainedModel) -> PreTrainedModel:
    """[`~modeling_dca.modeling_dca.ResidualConversionMixin.to_residual`] of `model`."""
    if model.config.source_config is None:
        raise ValueError("The model cannot be converted back: it was not made by `from_residual`.")
    check_identity(model)
    auto_class = model._auto_class
    config = CONFIG_MAPPING[model.config.source_config["model_type"]].from_dict(model.config.source_config)
    if not classes_of(config, auto_class):
        raise ValueError(
            f"The model cannot be converted back: transformers has no {config.model_type!r} model with its head."
        )
    family = find_family(config, kind_of(type(model)))
    # These may have changed since, by `resize_token_embeddings` or other labels.
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type")
    for name in names:
        if name in family.fields:
            setattr(config, name, getattr(model.config, name))
    residual_class = model_class_of(config, auto_class)
    names = Names(family, backbone_prefix(residual_class, config), HEADS[auto_class])
    weights = {name: weight.to("cpu", copy=True) for name, weight in distinct_weights(model).items()}
    reverted, used = {}, set()
    for name, parameter in distinct_weights(build_on_meta(residual_class, config)).items():
        move = names.find(name)
        if not move.targets:
            reverted[name] = torch.zeros(parameter.shape)
            if "mask_token" not in name:
                logger.warning(f"`{name}` is zero, as DCA has no place for it.")
        elif move.targets[0].endswith(".layer_scale"):
            reverted[name] = torch.ones(parameter.shape)
        else:
            reverted[name] = move.revert(config, *(weights[target] for target in move.targets if target in weights))
            used.update(move.targets)
    for name in weights.keys() - used:
        *_, module, kind = name.split(".")
        neutral = kind in ("delta", "gate") or module in ("key_layernorm", "value_layernorm")
        if not neutral and not (weights[name] == float(kind == "weight")).all():
            raise ValueError(
                f"The model cannot be converted back: `{name}` was trained, but a {config.model_type!r} model has no such weight."
            )
    return fill(residual_class, config, reverted, properties(model))


__all__ = ["FAMILIES", "find_family", "from_residual", "model_class_of", "to_residual"]
