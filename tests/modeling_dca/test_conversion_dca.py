"""Conversion of residual checkpoints: what they compute, what is refused and with which words, memory, the way back."""

import contextlib
import copy
import json
import subprocess
import sys
import typing

import pytest
import torch
import transformers
from PIL import Image
from test_modeling_dca import ALL_SCHEMES, SOME_SCHEMES, assert_close, name_of, put_into_hub_cache, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BitImageProcessor,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

import modeling_dca.conversion_dca as conversion
from modeling_dca import (
    DCAForCausalLM,
    DCAForImageClassification,
    DCAForQuestionAnswering,
    DCAForSequenceClassification,
    DCAForTokenClassification,
    DCAModel,
    DCAVisionModel,
)
from modeling_dca.modeling_dca import CACHE_NAME


VOCABULARY = 60
#: The tolerance of all comparisons: differences by the order of sums in float32, as part of the largest logit.
TOLERANCE = 2e-5

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE |= {"original_max_position_embeddings": 8, "rope_theta": 500.0, "factor": 8.0}
LAYER_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

GEMMA2 = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20}
GEMMA2 |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.3}
MULTIPLIERS |= {"attention_multiplier": 0.4, "attention_bias": True}

TEXT = {
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama-head_dim": ("llama", GROUPED | {"head_dim": 6, "hidden_act": "gelu"}),
    "llama-linear": ("llama", GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 99.0}}),
    "llama-dynamic": (
        "llama",
        GROUPED
        | {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 99.0},
        },
    ),
    "llama-yarn": ("llama", GROUPED | {"rope_parameters": YARN}),
    "llama-llama3": ("llama", GROUPED | {"rope_parameters": LLAMA3}),
    "llama-longrope": ("llama", GROUPED | {"rope_parameters": LONGROPE}),
    "llama-partial": (
        "llama",
        GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5}},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "mistral-full": ("mistral", GROUPED | {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-sliding": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "qwen3-sliding": (
        "qwen3",
        GROUPED
        | {"head_dim": 12, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4}
        | {"layer_types": LAYER_TYPES},
    ),
    "smollm3": ("smollm3", GROUPED | {"no_rope_layer_interval": 2}),
    "smollm3-sliding": (
        "smollm3",
        GROUPED
        | {"no_rope_layers": [1, 0, 0, 1, 1], "use_sliding_window": True, "sliding_window": 4}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "olmo": ("olmo", GROUPED | {"attention_bias": True}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma-untied": ("gemma", GROUPED | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", SIZES),
    "gpt2-n_inner": (
        "gpt2",
        SIZES | {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
    ),
    "opt": ("opt", SIZES | {"ffn_dim": 48}),
    "opt-bare": (
        "opt",
        SIZES
        | {"ffn_dim": 48, "enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
    ),
    "dca": (
        "dca",
        GROUPED
        | {"residual_scheme": "standard", "rope_parameters": YARN, "gated_mlp": True, "qk_norm": True, "mlp_bias": True}
        | {"head_dim": 12, "hidden_act": "silu", "norm_type": "layer_norm", "norm_eps": 1e-2, "embedding_multiplier": 3},
    ),
    "dca-learned": (
        "dca",
        SIZES
        | {"residual_scheme": "standard", "position_embedding": "learned", "tie_word_embeddings": True}
        | {"sliding_window": 4, "layer_types": LAYER_TYPES, "attention_bias": True, "attention_output_bias": False},
    ),
    "exaone": ("exaone", GROUPED),
    "internlm3": ("internlm3", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", GROUPED),
    "ministral": ("ministral", GROUPED | {"sliding_window": 4, "layer_types": LAYER_TYPES, "head_dim": 12}),
    "cwm": ("cwm", GROUPED | {"head_dim": 8, "sliding_window": 4, "rope_parameters": LLAMA3}),
    "seed_oss": ("seed_oss", GROUPED | {"head_dim": 12}),
    "arcee": ("arcee", GROUPED | {"mlp_bias": True}),
    "jais2": ("jais2", GROUPED),
    "olmo2": ("olmo2", GROUPED | {"attention_bias": True}),
    "olmo3": ("olmo3", GROUPED | {"sliding_window": 4, "rope_parameters": {"full_attention": YARN}}),
    "exaone4": ("exaone4", GROUPED | {"sliding_window": 4}),
    "exaone4-full": ("exaone4", GROUPED | {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "gemma2": ("gemma2", GROUPED | GEMMA2),
    "gemma2-uncapped": (
        "gemma2",
        GROUPED | GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "vaultgemma": ("vaultgemma", GROUPED | GEMMA2),
    "gemma3": ("gemma3_text", GROUPED | GEMMA2 | {"layer_types": LAYER_TYPES}),
    "gemma3-scaled": (
        "gemma3_text",
        GROUPED
        | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 20, "tie_word_embeddings": False}
        | {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 99.0},
        }},
    ),
    "glm": ("glm", GROUPED | {"head_dim": 8}),
    "glm4": ("glm4", GROUPED | {"head_dim": 12, "attention_bias": False}),
    "ernie4_5": ("ernie4_5", GROUPED | {"head_dim": 8, "use_bias": True}),
    "helium": ("helium", GROUPED | {"head_dim": 8, "attention_bias": True}),
    "granite": ("granite", GROUPED | MULTIPLIERS),
    "hyperclovax": ("hyperclovax", GROUPED | MULTIPLIERS),
    "hyperclovax-pre": ("hyperclovax", GROUPED | MULTIPLIERS | {"use_post_norm": False}),
    "phi3": ("phi3", GROUPED | {"sliding_window": 4}),
    "phi3-partial": ("phi3", GROUPED | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", GROUPED | {"original_max_position_embeddings": 8, "rope_parameters": LONGROPE}),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 4}),
    "starcoder2-no_bias": ("starcoder2", GROUPED | {"use_bias": False, "norm_epsilon": 1e-2}),
    "stablelm": ("stablelm", GROUPED | {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", GROUPED | {"use_parallel_residual": True}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.3, "attention_bias": True}),
    "cohere2": ("cohere2", GROUPED | {"logit_scale": 0.3, "sliding_window": 4}),
    "phi": ("phi", GROUPED),
    "phi-qk_norm": ("phi", GROUPED | {"qk_layernorm": True, "partial_rotary_factor": 1.0}),
    "gpt_neox": ("gpt_neox", SIZES | {"intermediate_size": 48}),
    "gpt_neox-serial": (
        "gpt_neox",
        SIZES | {"intermediate_size": 48, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5},
    ),
    "persimmon": ("persimmon", SIZES | {"intermediate_size": 48}),
    "falcon": ("falcon", SIZES),
    "falcon-two_norms": ("falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-one_norm": (
        "falcon",
        SIZES
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 40},
    ),
    "falcon-serial": ("falcon", SIZES | {"parallel_attn": False, "multi_query": False}),
    "gpt_bigcode": ("gpt_bigcode", SIZES),
    "gpt_bigcode-heads": ("gpt_bigcode", SIZES | {"multi_query": False, "scale_attn_weights": False}),
    "gptj": ("gptj", SIZES | {"rotary_dim": 4}),
    "gptj-n_inner": ("gptj", SIZES | {"rotary_dim": 8, "n_inner": 40, "activation_function": "relu"}),
    "codegen": ("codegen", SIZES | {"rotary_dim": 6, "num_attention_heads": 4}),
    "nemotron": ("nemotron", GROUPED | {"head_dim": 8}),
    "nemotron-biases": (
        "nemotron",
        GROUPED | {"partial_rotary_factor": 1.0, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-2},
    ),
    "biogpt": ("biogpt", SIZES | {"intermediate_size": 48}),
    "biogpt-unscaled": ("biogpt", SIZES | {"intermediate_size": 48, "scale_embedding": False, "tie_word_embeddings": False}),
    "gpt_neo": ("gpt_neo", SIZES | {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4}),
}  # fmt: skip

# Older releases of transformers do not know all of them, and their Phi-3 forgets the prompt where it starts its cache anew.
TEXT = {name: case for name, case in TEXT.items() if case[0] in CONFIG_MAPPING}
if CACHE_NAME == "past_key_values":
    del TEXT["phi3-longrope"]
#: One model of each family.
TEXT_TYPES = list({model_type: name for name, (model_type, _) in reversed(TEXT.items())}.values())[::-1]

IMAGES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGES |= {"image_size": 12, "patch_size": 4, "id2label": {0: "cat", 1: "dog", 2: "owl"}}
VISION = {
    "vit": ("vit", IMAGES),
    "vit-no_bias": (
        "vit",
        IMAGES | {"qkv_bias": False, "image_size": [8, 12], "num_channels": 1, "layer_norm_eps": 1e-2, "hidden_act": "relu"},
    ),
    "deit": ("deit", IMAGES),
    "dinov2": ("dinov2", IMAGES | {"mlp_ratio": 2}),
    "dca_vision": (
        "dca_vision",
        IMAGES | {"residual_scheme": "standard", "pooling": "cls_mean", "num_register_tokens": 2, "num_channels": 1},
    ),
    "vit_msn": ("vit_msn", IMAGES),
    "ijepa": ("ijepa", IMAGES),
    "vit-ragged": ("vit", IMAGES | {"image_size": 14}),
    "dinov2_with_registers": ("dinov2_with_registers", IMAGES | {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov2-swiglu": ("dinov2", IMAGES | {"use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False}),
}  # fmt: skip


@torch.no_grad()
def randomize(model, seed=0):
    """Weights of a size that makes every part matter: none of them, norms and scales included, is as it starts."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim == 1:
            start = float(parameter.mean().round())
            parameter.copy_(start + 0.3 * noise)
        elif "embed" in name or name.split(".")[-2] in ("wte", "wpe"):
            parameter.copy_(noise / (1 if "layers" in name else 2))
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def with_its_attention(config):
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # others leave the cap out in older releases of transformers
    return config


def build(model_type, fields, dtype=torch.float32, seed=0):
    auto_class = "AutoModelForImageClassification" if "image_size" in fields else "AutoModelForCausalLM"
    config = with_its_attention(AutoConfig.for_model(model_type, **fields))
    return randomize(conversion.model_class_of(config, auto_class)(config).to(dtype), seed)


def text_model(name, **kwargs):
    return build(*TEXT[name], **kwargs)


def image_model(name, **kwargs):
    return build(*VISION[name], **kwargs)


def convert(source, **overrides):
    model_class = DCAForImageClassification if hasattr(source.config, "image_size") else DCAForCausalLM
    return model_class.from_residual(source, **overrides)


def ids(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pixels(model, number=2):
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, model.config.num_channels, height, width, generator=generator)


@torch.no_grad()
def logits(model, **inputs):
    if not inputs:
        inputs = {"pixel_values": pixels(model)} if hasattr(model.config, "image_size") else {"input_ids": ids(2, 13)}
    return model(**inputs).logits


def greedy(model, **kwargs):
    return model.generate(ids(2, 5), max_new_tokens=10, do_sample=False, **kwargs).tolist()


# What is computed


@pytest.mark.parametrize("name", TEXT)
def test_language_model_computes_the_same(name):
    source = text_model(name)
    model = convert(source, last_k=2)
    assert type(model) is DCAForCausalLM and not model.training
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == source.config.tie_word_embeddings
    assert_close(logits(model), logits(source), TOLERANCE)
    assert greedy(model) == greedy(source)
    assert greedy(model, use_cache=False) == greedy(source, use_cache=False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("delta", "gate")):
            assert (parameter == 0).all()
        if "key_layernorm" in parameter_name:
            for other in ("input_layernorm", "value_layernorm"):
                twin = model.get_parameter(parameter_name.replace("key_layernorm", other))
                assert torch.equal(parameter, twin) and parameter.data_ptr() != twin.data_ptr()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-sliding", "smollm3", "gemma", "gpt2", "opt"])
def test_padded_batch_computes_the_same(name, side):
    source = text_model(name)
    model = convert(source)
    input_ids, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    padding = slice(None, 4) if side == "left" else slice(5, None)
    input_ids[0, padding] = mask[0, padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    real = mask == 1
    assert_close(logits(model, **inputs)[real], logits(source, **inputs)[real], TOLERANCE)
    if side == "left":
        expected = source.generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("name", VISION)
def test_image_classifier_computes_the_same(name):
    source = image_model(name)
    model = convert(source, last_k=1)
    assert type(model) is DCAForImageClassification and not model.training
    assert_close(logits(model), logits(source), TOLERANCE)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and model.config.num_labels == 3


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_with_registers"])
def test_images_of_another_size_compute_the_same(name):
    source = image_model(name)
    model = convert(source)
    for size in ((20, 16), (8, 8), (13, 21)):
        # DINOv2 interpolates its positions unasked.
        inputs = {"pixel_values": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))}
        inputs |= {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
        assert_close(logits(model, **inputs), logits(source, **inputs), TOLERANCE)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_every_scheme_computes_the_same(scheme):
    for source in (text_model("gemma2"), text_model("olmo2"), text_model("phi"), image_model("dinov2")):
        model = convert(source, **scheme)
        assert (model.config.residual_scheme, model.config.last_k) == (
            scheme["residual_scheme"],
            scheme.get("last_k"),
        )
        assert_close(logits(model), logits(source), TOLERANCE)


# (A cap makes the largest logit small, and with it the difference that is allowed.)
UNCAPPED = [name for name in TEXT_TYPES if "final_logit_softcapping" not in TEXT[name][1]]


@pytest.mark.parametrize(
    "name",
    [*UNCAPPED, "gemma2-uncapped", "gemma3-scaled", "opt-bare", "vit", "deit", "dinov2", "dinov2_with_registers"],
)
def test_type_is_kept(name):
    source = (text_model if name in TEXT else image_model)(name, dtype=torch.bfloat16)
    model = convert(source)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # A few roundings of bfloat16 in each of the blocks, in another order.
    assert_close(logits(model), logits(source), 0.05)


def test_gemma_in_half_precision_keeps_the_offset_of_its_norms():
    # 1 + weight would lose most of what the weight holds.
    source = text_model("gemma", dtype=torch.bfloat16)
    model = convert(source)
    assert torch.equal(model.model.norm.weight, source.model.norm.weight)
    assert torch.equal(model.model.embed_tokens(ids(1, 5)), source.model.embed_tokens(ids(1, 5)))


def test_generation_configuration_comes_along():
    source = text_model("llama")
    source.generation_config.repetition_penalty = 1.7
    source.generation_config.max_new_tokens = 9
    model = convert(source)
    assert model.generation_config is not source.generation_config
    assert model.generate(ids(2, 5)).tolist() == source.generate(ids(2, 5)).tolist()


def test_loaded_source_is_copied():
    for source in (text_model("llama-tied"), text_model("gpt2")):
        before, expected = copy.deepcopy(source.state_dict()), logits(source)
        model = convert(source)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())
        assert torch.equal(logits(source), expected)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_converted_model_trains(name):
    source = (text_model if name in TEXT else image_model)(name)
    model = convert(source).train()
    labels = {"labels": ids(2, 13)} if name in TEXT else {"labels": torch.tensor([0, 2])}
    inputs = {"input_ids": ids(2, 13)} if name in TEXT else {"pixel_values": pixels(model)}
    model(**inputs, **labels).loss.backward()
    assert all(parameter.grad is not None and parameter.is_contiguous() for parameter in model.parameters())


# Heads

HEADS = {
    "AutoModel": (DCAModel, ("last_hidden_state",)),
    "AutoModelForSequenceClassification": (DCAForSequenceClassification, ("logits",)),
    "AutoModelForTokenClassification": (DCAForTokenClassification, ("logits",)),
    "AutoModelForQuestionAnswering": (DCAForQuestionAnswering, ("start_logits", "end_logits")),
}


def model_with_head(name, auto_class, number=0, **fields):
    """A model of a family with a head, or `None` where transformers has none."""
    model_type, own = (TEXT if name in TEXT else VISION)[name]
    config = with_its_attention(AutoConfig.for_model(model_type, **own | fields))
    classes = conversion.classes_of(config, auto_class)
    return randomize(classes[number](config)) if classes else None


@torch.no_grad()
def outputs(model, names, **inputs):
    result = model(**inputs)
    return torch.cat([result[name].flatten() for name in names])


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_every_head_computes_the_same(name):
    for auto_class, (model_class, names) in HEADS.items():
        labels = {"num_labels": 3} if "ForQuestion" not in auto_class else {}
        source = model_with_head(name, auto_class, **labels)
        if source is None:
            continue
        model = model_class.from_residual(source, last_k=1)
        assert type(model) is model_class and not model.training
        inputs = {"input_ids": ids(2, 9)}
        assert_close(outputs(model, names, **inputs), outputs(source, names, **inputs), TOLERANCE)
        back = model.to_residual()
        back.set_attn_implementation(source.config._attn_implementation)
        assert type(back) is type(source) and back.config.num_labels == source.config.num_labels
        assert_close(outputs(back, names, **inputs), outputs(source, names, **inputs), TOLERANCE)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_with_registers"])
def test_vision_model_without_a_head_computes_the_same(tmp_path, name):
    source = model_with_head(name, "AutoModel")
    source.save_pretrained(tmp_path)
    inputs = {"pixel_values": pixels(source)}
    # (The pooled output of ViT and DeiT goes through a layer more.)
    names = ("last_hidden_state", "pooler_output") if "dino" in name else ("last_hidden_state",)
    for given in (source, tmp_path, image_model(name)):
        expected = outputs(source if given == tmp_path else getattr(given, "base_model", given), names, **inputs)
        model = DCAVisionModel.from_residual(given)
        assert_close(outputs(model, names, **inputs), expected, TOLERANCE)


def test_model_without_a_head_takes_one_of_any_head(tmp_path):
    source = text_model("gpt2")
    source.save_pretrained(tmp_path)
    expected = outputs(source.transformer, ("last_hidden_state",), input_ids=ids(2, 9))
    for given in (source, source.transformer, tmp_path):
        model = DCAModel.from_residual(given)
        assert_close(outputs(model, ("last_hidden_state",), input_ids=ids(2, 9)), expected, TOLERANCE)


FRESH = {
    "score": (DCAForSequenceClassification, 3),
    "score-of-tokens": (DCAForTokenClassification, 3),
    "qa_outputs": (DCAForQuestionAnswering, 2),
}


@pytest.mark.parametrize("place", ["loaded", "path"])
@pytest.mark.parametrize("name", FRESH)
def test_fresh_head_where_it_is_asked_for(tmp_path, caplog, name, place):
    (model_class, number), source = FRESH[name], text_model("llama")
    source.save_pretrained(tmp_path)
    given = source if place == "loaded" else tmp_path
    with pytest.raises(ValueError, match=f"no head for {model_class.__name__}: pass `num_labels`"):
        model_class.from_residual(given)
    caplog.clear()
    with caplog.at_level("WARNING"), log_is_seen():
        model = model_class.from_residual(given, num_labels=number)
    head = getattr(model, name.partition("-")[0])
    assert head.weight.shape == (number, 32) and 0 < head.weight.std() < 0.1
    assert f"{name.partition('-')[0]}.weight" in caplog.text and "MISSING" in caplog.text
    expected = outputs(source.model, ("last_hidden_state",), input_ids=ids(2, 9))
    assert_close(outputs(model.model, ("last_hidden_state",), input_ids=ids(2, 9)), expected, TOLERANCE)
    assert model.config.num_labels == number
    model.save_pretrained(tmp_path / "dca")
    again = model_class.from_pretrained(tmp_path / "dca")
    assert torch.equal(again(ids(2, 9))[0], model(ids(2, 9))[0])


@contextlib.contextmanager
def log_is_seen():
    """pytest sees what goes up to the root of the loggers."""
    transformers.utils.logging.enable_propagation()
    try:
        yield
    finally:
        transformers.utils.logging.disable_propagation()


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_fresh_image_classifier(tmp_path, name):
    base, labeled = model_with_head(name, "AutoModel"), image_model(name)
    base.save_pretrained(tmp_path / "base")
    labeled.save_pretrained(tmp_path / "labeled")
    for source in (base, labeled, tmp_path / "base", tmp_path / "labeled"):
        model = DCAForImageClassification.from_residual(source, num_labels=7)
        width = 64 if name == "dinov2" else 32
        assert model.classifier.weight.shape == (7, width) and model.config.id2label[6] == "LABEL_6"
        model(pixels(model), labels=torch.tensor([0, 6])).loss.backward()
        trained = labeled if source in (labeled, tmp_path / "labeled") else base
        expected = outputs(trained.base_model, ("last_hidden_state",), pixel_values=pixels(model))
        assert_close(outputs(model.model, ("last_hidden_state",), pixel_values=pixels(model)), expected, TOLERANCE)
    with pytest.raises(ValueError, match="pass `num_labels`"):
        DCAForImageClassification.from_residual(base)


def test_head_of_as_many_labels_is_kept_under_other_names():
    source = image_model("vit")
    model = DCAForImageClassification.from_residual(source, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.id2label[1] == "b" and model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert_close(logits(model), logits(source), TOLERANCE)


def test_answers_have_two_ends():
    with pytest.raises(ValueError, match="`num_labels` is 3, but an answer has a start and an end: give 2."):
        DCAForQuestionAnswering.from_residual(text_model("llama"), num_labels=3)


def test_fresh_head_goes_back_to_the_class_with_this_head():
    model = DCAForSequenceClassification.from_residual(text_model("llama"), num_labels=3)
    back = model.to_residual()
    assert type(back).__name__ == "LlamaForSequenceClassification" and back.num_labels == 3
    assert_close(logits(back, input_ids=ids(2, 9)), logits(model, input_ids=ids(2, 9)), TOLERANCE)
    model = DCAForTokenClassification.from_residual(text_model("opt"), num_labels=3)
    with pytest.raises(ValueError, match="transformers has no 'opt' model with its head"):
        model.to_residual()


def test_distilled_classifier_is_one_linear_map_over_both_tokens(tmp_path):
    source = model_with_head("deit", "AutoModelForImageClassification", number=1)
    assert type(source).__name__ == "DeiTForImageClassificationWithTeacher"
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        model = DCAForImageClassification.from_residual(given)
        assert_close(logits(model), logits(source), TOLERANCE)
        back = model.to_residual()
        assert type(back) is type(source)
        assert_close(logits(back), logits(source), TOLERANCE)
    model = DCAForImageClassification.from_residual(source, num_labels=5)
    assert model.classifier.weight.shape == (5, 64)


# The call that each source is made for


def word_tokenizer(side):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side=side)


@pytest.mark.parametrize("name", TEXT_TYPES)
def test_default_call_of_language_models(name):
    source = text_model(name)
    model = convert(source)
    for side in ("right", "left"):
        batch = word_tokenizer(side)(["w5 w9 w20 w7 w11 w4 w50", "w8 w30 w31"], padding=True, return_tensors="pt")
        real = batch["attention_mask"] == 1
        assert not real.all()
        assert_close(logits(model, **batch)[real], logits(source, **batch)[real], TOLERANCE)
    results = [each.generate(**batch, max_new_tokens=8, do_sample=False) for each in (model, source)]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", VISION)
def test_default_call_of_image_classifiers(name):
    model_type, fields = VISION[name]
    if fields.get("num_channels", 3) == 1:
        pytest.skip("image processors make three channels")
    if model_type.startswith("dinov2"):
        # Public configurations say 518, and their processors crop to 224.
        fields = fields | {"image_size": 28}
        processor = BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 12, "width": 12})
    else:
        size = fields["image_size"]
        processor = ViTImageProcessor(size={"height": size, "width": size})
    source = build(model_type, fields)
    image = Image.fromarray(torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).numpy())
    inputs = processor(image, return_tensors="pt")
    assert_close(logits(convert(source), **inputs), logits(source, **inputs), TOLERANCE)


def test_padding_id_outside_the_vocabulary():
    source = build("gpt2", SIZES | {"pad_token_id": VOCABULARY + 1})
    model = convert(source)
    assert model.config.pad_token_id == VOCABULARY + 1
    assert_close(logits(model), logits(source), TOLERANCE)
    assert greedy(model) == greedy(source)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_batch_that_is_longer_than_the_positions_only_by_its_padding(name):
    source = build(*(TEXT[name][0], TEXT[name][1] | {"max_position_embeddings": 16}))
    model = convert(source)
    input_ids, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    input_ids[:, :10] = mask[:, :10] = 0
    results = [
        each.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for each in (model, source)
    ]
    assert torch.equal(*results)
    with pytest.raises(
        ValueError, match="17 tokens, but the model has only `max_position_embeddings` = 16 learned positions"
    ):
        model.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)


def test_attention_function_is_that_of_the_source(tmp_path):
    source = text_model("llama")
    source.set_attn_implementation("eager")
    assert convert(source).config._attn_implementation == "eager"
    assert convert(source, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    source.save_pretrained(tmp_path)
    assert DCAForCausalLM.from_residual(tmp_path).config._attn_implementation == "sdpa"
    assert DCAForCausalLM.from_residual(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
    assert convert(text_model("gemma2")).config._attn_implementation == "eager"


# Checkpoints


def save_and_reload(model, folder):
    model.save_pretrained(folder)
    auto_class = AutoModelForImageClassification if hasattr(model.config, "image_size") else AutoModelForCausalLM
    return auto_class.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3-scaled", "phi", "gpt2", "deit", "dinov2_with_registers"])
def test_converted_model_is_saved_and_reloaded(tmp_path, name):
    source = (text_model if name in TEXT else image_model)(name)
    model = convert(source, last_k=2)
    loaded = save_and_reload(model, tmp_path)
    assert type(loaded) is type(model) and loaded.config.last_k == 2
    assert {key: weight.shape for key, weight in loaded.state_dict().items()} == {
        key: weight.shape for key, weight in model.state_dict().items()
    }
    assert_close(logits(loaded), logits(source), TOLERANCE)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "opt", "gemma", "vit", "deit", "dinov2", "dinov2-swiglu"])
def test_sharded_checkpoint_on_disk(tmp_path, name):
    source = (text_model if name in TEXT else image_model)(name, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model_class = DCAForCausalLM if name in TEXT else DCAForImageClassification
    for path in (tmp_path, str(tmp_path)):
        model = model_class.from_residual(path, residual_scheme="grn_v2")
        assert model.dtype == torch.bfloat16
        assert torch.equal(logits(model), logits(convert(source, residual_scheme="grn_v2")))
    assert model_class.from_residual(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_checkpoint_is_not_copied(tmp_path, monkeypatch):
    text_model("llama").save_pretrained(tmp_path)
    loaded = []
    load_source = conversion.load_source

    def record(*args):
        loaded.append(load_source(*args))
        return loaded[0]

    monkeypatch.setattr(conversion, "load_source", record)
    model = DCAForCausalLM.from_residual(tmp_path)
    ((source, _),) = loaded
    for name, parameter in source.named_parameters():
        assert (model.get_parameter(name).data_ptr() == parameter.data_ptr()) == (parameter.ndim > 1)


MEMORY_SCRIPT = """
import os, sys

import torch

from modeling_dca import DCAConfig, DCAForCausalLM


def high_water_mark():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


torch.set_num_threads(1)  # threads do not live on in a fork
tiny = DCAForCausalLM(DCAConfig(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
tiny(torch.zeros(1, 2, dtype=torch.long))
for source in sys.argv[1:]:
    if (process := os.fork()) == 0:
        before = high_water_mark()
        model = DCAForCausalLM.from_residual(source)
        assert torch.stack([parameter.sum() for parameter in model.parameters()]).isfinite().all()
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print(source, (high_water_mark() - before) / size, flush=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_checkpoint(tmp_path):
    # All linear maps of GPT-2 are transposed, those of Llama stay where they are.
    sizes = {"vocab_size": 2000, "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12}
    for model_type in ("llama", "gpt2"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
        model.to_empty(device="cpu").tie_weights()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        for shards in ("20MB", "1GB"):
            model.save_pretrained(tmp_path / f"{model_type}-{shards}", max_shard_size=shards)
        del model
    sources = sorted(map(str, tmp_path.iterdir()))
    process = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, *sources], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    shares = dict(line.rsplit(maxsplit=1) for line in process.stdout.splitlines())
    assert sorted(shares) == sources
    # (Every page of the file counts that was looked at.)
    assert all(float(share) < 1.2 for share in shares.values()), shares


def test_source_on_the_hub(tmp_path, monkeypatch):
    # The cache is as huggingface_hub leaves it after a download.
    source = text_model("gpt2")
    source.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    put_into_hub_cache(tmp_path / "checkpoint", "someone/gpt2", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ("main", "0" * 40):
        model = DCAForCausalLM.from_residual(
            "someone/gpt2", revision=revision, cache_dir=tmp_path / "hub", local_files_only=True, last_k=1
        )
        assert_close(logits(model), logits(source), TOLERANCE)
    with pytest.raises(OSError, match="cached files"):
        DCAForCausalLM.from_residual("someone/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_quantized_file_whose_weights_are_made_dense():
    source = text_model("llama")
    expected = logits(source)
    source.config.quantization_config = {"quant_method": "gguf", "dequantize": True}
    model = convert(source)
    assert_close(logits(model), expected, TOLERANCE)
    assert "quantization_config" not in model.config.source_config


def test_gguf_model_that_was_loaded_dense_is_told_from_a_packed_one():
    # Loading makes the files of most families dense, and its configuration does not say so.
    source = text_model("llama")
    source.config.quantization_config = {"quant_method": "gguf", "dequantize": False}
    model = convert(source)
    assert_close(logits(model), logits(source), TOLERANCE)
    assert "quantization_config" not in model.config.source_config
    assert source.config.quantization_config["quant_method"] == "gguf"
    packed = nn.Parameter(torch.zeros(32, 17, dtype=torch.uint8), requires_grad=False)
    source.model.layers[1].self_attn.o_proj.weight = packed
    with pytest.raises(ValueError, match="its weights are quantized"):
        convert(source)


@pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="this transformers makes all GGUF files dense")
def test_gguf_file_is_made_dense(tmp_path, monkeypatch):
    text_model("llama").save_pretrained(tmp_path)
    given = {}
    loader = transformers.LlamaForCausalLM.from_pretrained.__func__

    def load(cls, source, *args, **kwargs):
        if (name := kwargs.pop("gguf_file", None)) is not None:
            given.update(gguf_file=name, quantization_config=kwargs.pop("quantization_config"))
        return loader(cls, source, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(load))
    monkeypatch.setattr(
        conversion.AutoConfig,
        "from_pretrained",
        lambda source, trust_remote_code, gguf_file: transformers.LlamaConfig.from_pretrained(source),
    )
    DCAForCausalLM.from_residual(tmp_path, gguf_file="model.gguf")
    assert given["gguf_file"] == "model.gguf" and given["quantization_config"].dequantize


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{}/deep/model.Q4_1.gguf", ("{}/deep", "model.Q4_1.gguf")),
        ("model.Q4_1.gguf", (".", "model.Q4_1.gguf")),
        ("someone/models/model.gguf", ("someone/models", "model.gguf")),
        ("someone/models/small/model.gguf", ("someone/models", "small/model.gguf")),
    ],
)
def test_gguf_file_is_named_by_its_path(tmp_path, source, expected):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.Q4_1.gguf").touch()
    place, loading = conversion.find_gguf_file(source.format(tmp_path), {"revision": "v1"})
    assert (place, loading.pop("gguf_file")) == (expected[0].format(tmp_path), expected[1])
    assert loading == {"revision": "v1"}


def test_folder_is_no_gguf_file_and_a_file_is_named_once(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    assert conversion.find_gguf_file(tmp_path / "folder.gguf", {}) == (tmp_path / "folder.gguf", {})
    with pytest.raises(ValueError, match="is the file 'a.gguf': leave out `gguf_file`."):
        conversion.find_gguf_file("a.gguf", {"gguf_file": "b.gguf"})


def test_arguments_about_the_source_reach_the_loading(tmp_path, monkeypatch):
    text_model("llama").save_pretrained(tmp_path / "inner")
    given = []
    for loader in (AutoConfig, PreTrainedModel):
        original = loader.from_pretrained.__func__

        def record(cls, source, *args, original=original, **kwargs):
            if source is not None:
                given.append({name: kwargs.get(name) for name in ("subfolder", "token", "revision")})
            return original(cls, source, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", classmethod(record))
    arguments = {"subfolder": "inner", "token": "hf_no", "revision": "v1"}
    DCAForCausalLM.from_residual(tmp_path, **arguments)
    assert given[0] == given[1] == arguments


# Refusals

REFUSED = {
    "bert": ("bert", {}, "A 'bert' model cannot become DCA as it is: its norms are after the sum"),
    "mixtral": ("mixtral", {}, "A 'mixtral' model .* mixture of experts"),
    "qwen3_moe": ("qwen3_moe", {}, "A 'qwen3_moe' model .* mixture of experts"),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4}, "'ernie4_5_moe'"),
    "t5": ("t5", {}, "A 't5' model .* cross-attention"),
    "bart": ("bart", {}, "A 'bart' model .* cross-attention"),
    "bloom": ("bloom", {}, "A 'bloom' model .*ALiBi"),
    "unknown": (
        "ctrl",
        {},
        "No conversion to DCA is known for 'ctrl' models; .*Known: llama, .*, gpt2, .*, dca",
    ),
    "near": ("olmo_hybrid", {}, "'olmo_hybrid'"),
    "gpt2-inverse": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "A 'gpt2' model .*: `scale_attn_by_inverse_layer_idx` is set",
    ),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True}, "`reorder_and_upcast_attn` is set"),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}, "`scale_attn_weights` is not set"),
    "gpt2-cross": ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` is set"),
    "cohere-qk_norm": ("cohere", {"use_qk_norm": True}, "A 'cohere' model .*: `use_qk_norm` is set"),
    "stablelm-qk_norm": ("stablelm", {"qk_layernorm": True}, "A 'stablelm' model .*: `qk_layernorm` is set"),
    "falcon-alibi": ("falcon", {"alibi": True}, "A 'falcon' model .*ALiBi"),
    "ministral3": ("ministral3", {}, "A 'ministral3' model .* scales queries by their position"),
    "hunyuan": ("hunyuan_v1_dense", {}, "A 'hunyuan_v1_dense' model .* after rotating them"),
    "granite_swa": ("granite_swa", {}, "A 'granite_swa' model .* sinks"),
    "gptj-no_head": ("gptj", {"rotary_dim": 0}, "A 'gptj' model .*: `rotary_dim` is 0"),
    "xglm": ("xglm", {}, "A 'xglm' model .*: its fixed sine and cosine positions start at 2"),
    "opt-post": ("opt", {"do_layer_norm_before": False}, "A 'opt' model .*: `do_layer_norm_before` is not set"),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16}, "`word_embed_proj_dim` \\(16\\) is not `hidden_size` \\(32\\)"),
    "opt-no_norm": ("opt", {"_remove_final_layer_norm": True}, "`_remove_final_layer_norm` is set"),
    "olmo-clip": ("olmo", {"clip_qkv": 3.0}, "A 'olmo' model .*: `clip_qkv` is 3.0"),
    "gemma-bidirectional": ("gemma", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` is set"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantized"),
    "image": ("vit", {}, "'vit' model: use `from_residual` of the DCA class for AutoModelForImageClassification"),
    "dca": ("dca", {}, "it is DCA already: load it with `from_pretrained`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_loaded(tmp_path, name):
    model_type, fields, message = REFUSED[name]
    if model_type not in conversion.CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    sizes = SIZES if model_type in ("gpt2", "opt", "olmo", "gemma") else {}
    AutoConfig.for_model(model_type, **sizes | fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        DCAForCausalLM.from_residual(tmp_path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_refused_image_models(tmp_path):
    for model_type, message in (
        ("swin", "hierarchy"),
        ("beit", "relative positions"),
        ("llama", "for AutoModelForCausalLM"),
    ):
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            DCAForImageClassification.from_residual(tmp_path)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"hidden_size": 64},
            "`hidden_size` follows from the source; only these can be chosen: residual_scheme, last_k",
        ),
        ({"rope_parameters": None}, "`rope_parameters` follows from the source"),
        ({"source_config": None}, "`source_config` follows from the source"),
        ({"num_labels": 3}, "`num_labels` follows from the source"),
        ({"lastk": 2}, "`lastk` is not a field; did you mean 'last_k'\\?"),
        ({"revison": "main"}, "`revison` is not a field; did you mean 'revision'\\?"),
        ({"revision": "main", "token": "x"}, "`source` is already loaded: leave out `revision`, `token`"),
        ({"residual_scheme": "grn_2"}, "did you mean 'grn_v2'"),
        ({"residual_scheme": "standard", "last_k": 2}, "leave `last_k` out"),
    ],
    ids=str,
)
def test_refused_overrides(overrides, message):
    with pytest.raises(Exception, match=message):
        DCAForCausalLM.from_residual(text_model("llama"), **overrides)


def test_overrides_that_do_not_change_what_is_computed():
    source = text_model("llama")
    model = convert(source, attention_dropout=0.3, attn_implementation="eager", grn_implementation="eager")
    assert model.config._attn_implementation == "eager" and model.config.attention_dropout == 0.3
    assert_close(logits(model), logits(source), TOLERANCE)


def test_refused_classes():
    config = AutoConfig.for_model("llama", **GROUPED)
    with pytest.raises(ValueError, match="`source` is a LlamaModel; give a LlamaForCausalLM."):
        DCAForCausalLM.from_residual(LlamaModel(config))
    with pytest.raises(ValueError, match="`source` is a Linear; give a transformers model, a path or a Hub id"):
        DCAForCausalLM.from_residual(nn.Linear(2, 2))


def test_weights_without_a_place_are_refused():
    source = text_model("gpt2")
    source.transformer.h[1].adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has weights that have no place in DCA.*: transformer.h.1.adapter.bias, "):
        convert(source)
    source = text_model("llama")
    source.model.layers[2].self_attn.o_proj.bias = nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="no place in DCA.*: model.layers.2.self_attn.o_proj.bias\\."):
        convert(source)


def test_weights_beyond_the_configuration_are_refused(tmp_path):
    text_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    message = r"is not a LlamaForCausalLM of its configuration; it also has model.layers.1.input_layernorm.weight"
    with pytest.raises(ValueError, match=message):
        DCAForCausalLM.from_residual(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    source = text_model("llama")
    del source.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match="`source` lacks weights that DCA needs: model.layers.1.mlp.up_proj.weight."):
        convert(source)
    source = text_model("llama")
    source.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="shapes do not match.*: model.layers.1.mlp.up_proj.weight."):
        convert(source)
    # A model without its head, as a checkpoint.
    text_model("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a LlamaForCausalLM of its configuration; it lacks lm_head.weight."):
        DCAForCausalLM.from_residual(tmp_path)


def test_embeddings_that_should_be_tied_and_are_not_are_refused():
    source = text_model("llama-tied")
    source.lm_head.weight = nn.Parameter(source.lm_head.weight * 2)
    with pytest.raises(ValueError, match="no place in DCA.*: lm_head.weight."):
        convert(source)


def test_families_that_round():
    rounding = {name for families in conversion.FAMILIES.values() for name, each in families.items() if each.rounds}
    assert rounding == {"dinov2", "dinov2_with_registers", "granite", "hyperclovax", "nemotron"}


def test_every_entry_of_the_tables_is_used():
    used, entries = set(), []
    for auto_class, cases, make in (
        ("AutoModelForCausalLM", TEXT, text_model),
        ("AutoModelForImageClassification", VISION, image_model),
    ):
        families = conversion.FAMILIES[auto_class]
        for name, (model_type, _) in cases.items():
            model = make(name)
            prefix = f"{type(model).base_model_prefix}."
            for weight in model.state_dict():
                if weight.startswith(prefix):
                    pattern, _ = conversion.find_move(families[model_type].weights, weight.removeprefix(prefix))
                    used.add((pattern, families[model_type].weights[pattern]))
        entries += [
            (model_type, *entry) for model_type, family in families.items() for entry in family.weights.items()
        ]
    # (Families inherit from each other. One of them uses an entry.)
    unused = [(model_type, pattern) for model_type, pattern, move in entries if (pattern, move) not in used]
    # What no classifier has, and the names that DINOv2's parts have in other releases of transformers.
    others = (".attention", ".weights_", ".mlp")
    for model_type, pattern in unused:
        old = model_type.startswith("dinov2") and any(other in pattern for other in others)
        assert old or pattern in ("embeddings.mask_token", "pooler"), (model_type, pattern)


# The way back


ROUND_TRIPS = [(name, SOME_SCHEMES[-1]) for name in (*TEXT, *VISION)]
ROUND_TRIPS += [(name, scheme) for name in ("llama", "gpt2", "olmo2", "deit") for scheme in SOME_SCHEMES[:-1]]


@pytest.mark.parametrize(
    "name, scheme", ROUND_TRIPS, ids=lambda value: value if isinstance(value, str) else name_of(value)
)
def test_round_trip(tmp_path, name, scheme):
    source = (text_model if name in TEXT else image_model)(name)
    model = save_and_reload(convert(source, **scheme), tmp_path)
    back = model.to_residual()
    back.set_attn_implementation(source.config._attn_implementation)
    assert type(back) is type(source)
    assert_close(logits(back), logits(source), TOLERANCE)
    unlike = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    for field, value in source.config.to_dict().items():
        assert field in unlike or getattr(back.config, field) == getattr(source.config, field), (field, value)
    expected = dict(source.state_dict())
    if name.startswith(("granite", "hyperclovax", "nemotron")):
        # (A product that is divided again, or a sum that is subtracted from.)
        for key in expected:
            torch.testing.assert_close(back.state_dict()[key], expected[key], rtol=1e-6, atol=2e-7)
        return
    if name.startswith("dinov2"):
        # Layer scales stay multiplied into the projections.
        scaled = ("attention.o_proj", "output.dense", "fc2", "down_proj", "weights_out")
        changed = {f"{module}.{kind}" for module in scaled for kind in ("weight", "bias")} | {"lambda1", "mask_token"}
        expected = {key: weight for key, weight in expected.items() if not key.endswith(tuple(changed))}
    if name.startswith(("opt", "biogpt")):
        # No token has one of the first two positions.
        next(weight for key, weight in expected.items() if "embed_positions" in key)[:2] = 0
    weights = back.state_dict()
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())
    back.save_pretrained(tmp_path / "back")
    attention = source.config._attn_implementation
    again = type(source).from_pretrained(tmp_path / "back", attn_implementation=attention)
    assert_close(logits(again), logits(source), TOLERANCE)


def test_way_back_is_a_copy_with_what_changed():
    source = text_model("llama-tied")
    model = convert(source)
    model.resize_token_embeddings(VOCABULARY + 8)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    expected = logits(model)
    back = model.to_residual()
    assert back.config.vocab_size == VOCABULARY + 8
    assert_close(logits(back), expected, TOLERANCE)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "weight, message",
    [
        ("model.layers.1.residual.delta", "`delta` of block 1 is not zero"),
        ("model.layers.2.residual.gate", "`gate` of block 2 is not zero"),
        ("model.residual.delta", "`delta` of output is not zero"),
        ("model.layers.3.key_layernorm.weight", "norms of queries, keys and values of block 3 are not the same"),
        ("model.layers.0.input_layernorm.weight", "norms of queries, keys and values of block 0 are not the same"),
    ],
)
def test_trained_residuals_have_no_way_back(weight, message):
    model = convert(text_model("llama"))
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[-1].add_(0.01)
    with pytest.raises(ValueError, match=message):
        model.to_residual()
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[-1].sub_(0.01)
        if "norm" in weight:
            model.get_parameter(weight).copy_(
                model.get_parameter(weight.replace("key", "value").replace("input", "value"))
            )
    model.to_residual()


def test_norms_that_were_trained_have_no_way_back_to_a_family_without():
    model = convert(text_model("olmo"), residual_scheme="grn_v1")
    with torch.no_grad():
        model.model.norm.bias[3] = 0.1
    with pytest.raises(ValueError, match="`model.norm.bias` was trained, but a 'olmo' model has no such weight"):
        model.to_residual()


def test_model_that_was_always_dca_has_no_way_back():
    with pytest.raises(ValueError, match="it was not made by `from_residual`"):
        tiny_model().to_residual()


# Training what was added


@pytest.mark.parametrize("norms", [True, False])
def test_freeze_backbone(norms):
    for source in (text_model("qwen3"), text_model("gpt2"), text_model("gemma"), image_model("vit")):
        model = convert(source, last_k=1)
        model.freeze_backbone(norms=norms)
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.split(".")[-2]
            assert parameter.requires_grad == (name.endswith(("delta", "gate")) or (norms and is_norm)), name
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        inputs = {"input_ids": ids(2, 9), "labels": ids(2, 9)}
        if hasattr(model.config, "image_size"):
            inputs = {"pixel_values": pixels(model), "labels": torch.tensor([0, 2])}
        model.train()(**inputs).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freeze_backbone_of_other_heads_and_schemes():
    model = tiny_model(DCAForSequenceClassification, num_labels=2)
    model.freeze_backbone()
    assert not model.score.weight.requires_grad and model.model.residual.delta.requires_grad
    model = tiny_model(residual_scheme="standard")
    with pytest.raises(ValueError, match="'standard' scheme has no residual parameters"):
        model.freeze_backbone()
    model.freeze_backbone(norms=True)
    assert model.model.norm.weight.requires_grad and not model.lm_head.weight.requires_grad


# Where the package is not installed

REMOTE_SCRIPT = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dca":
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

inputs = torch.load("inputs.pt")
outputs = {}
for name, values in inputs.items():
    auto_class = AutoModelForImageClassification if values.is_floating_point() else AutoModelForCausalLM
    model = auto_class.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        outputs[name] = model(values).logits
        if not values.is_floating_point():
            assert "conversion_dca" not in " ".join(sys.modules), "loading needs no conversion"
            source = AutoModelForCausalLM.from_pretrained(f"{name}-source")
            outputs[name + "-converted"] = type(model).from_residual(source, last_k=1)(values).logits
            outputs[name + "-back"] = model.to_residual()(values).logits
    sys.modules = {key: value for key, value in sys.modules.items() if "conversion_dca" not in key}
torch.save(outputs, "outputs.pt")
"""


def test_converted_checkpoint_runs_where_the_package_is_not_installed(tmp_path):
    expected, inputs = {}, {}
    for name in ("gemma", "dinov2"):
        source = (text_model if name in TEXT else image_model)(name)
        source.save_pretrained(tmp_path / f"{name}-source")
        convert(source).save_pretrained(tmp_path / name)
        assert (tmp_path / name / "conversion_dca.py").exists()
        inputs[name] = ids(2, 9) if name in TEXT else pixels(source)
        expected[name] = source(inputs[name]).logits.detach()
    for suffix in ("converted", "back"):
        expected[f"gemma-{suffix}"] = expected["gemma"]
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    process = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "outputs.pt")
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert_close(result, expected[name], TOLERANCE)


def test_configuration_remembers_where_it_came_from(tmp_path):
    convert(text_model("gpt2")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["source_config"]["model_type"] == "gpt2" and saved["model_type"] == "dca"
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "DCAModel"


@pytest.mark.parametrize("model_class", [DCAForCausalLM, DCAForImageClassification])
def test_type_checkers_see_what_a_conversion_returns(model_class):
    assert typing.get_type_hints(model_class.from_residual)["return"] is typing.Self
    assert typing.get_type_hints(model_class.to_residual)["return"] is PreTrainedModel
    hints = typing.get_type_hints(conversion.from_residual)
    assert typing.get_args(hints["model_class"]) == (hints["return"],)
    assert typing.get_type_hints(model_class.from_pretrained)["return"] is typing.Self
