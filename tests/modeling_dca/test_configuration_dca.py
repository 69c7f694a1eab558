"""Configurations: defaults, what is refused and with which words, and what survives being saved."""

import itertools
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_dca import DCAConfig, DCAForCausalLM, DCAVisionConfig


def test_defaults_are_the_language_model_of_the_paper():
    config = DCAConfig()
    assert (config.residual_scheme, config.last_k, config.grn_implementation) == ("dca", None, "auto")
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (512, 2048, 12)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 8, 64)
    assert (config.gated_mlp, config.hidden_act, config.tie_word_embeddings) == (False, "gelu", False)
    assert (config.norm_type, config.norm_eps, config.qk_norm) == ("rms_norm", 1e-6, False)
    assert (config.position_embedding, config.sliding_window) == ("rope", None)
    assert config.layer_types == ["full_attention"] * 12


def test_vision_defaults_are_the_vit_of_the_paper():
    config = DCAVisionConfig()
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (384, 1536, 12)
    assert (config.num_attention_heads, config.head_dim) == (6, 64)
    assert (config.image_height_width, config.patch_height_width, config.num_channels) == ((224, 224), (16, 16), 3)
    assert (config.pooling, config.position_embedding, config.norm_type) == ("mean", "sincos", "layer_norm")
    assert (config.residual_scheme, config.last_k) == ("dca", None)


def test_sizes_that_are_not_given_follow_from_others():
    config = DCAConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=3, sliding_window=8)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (384, 4, 24)
    assert config.layer_types == ["sliding_attention"] * 3


@pytest.mark.parametrize(
    "fields, entries",
    [
        ({"residual_scheme": "standard"}, 1),
        ({"residual_scheme": "dca"}, None),
        ({"residual_scheme": "dca", "last_k": 1}, 3),
        ({"residual_scheme": "grn_v1", "last_k": 2}, 4),
    ],
)
def test_max_stack_entries(fields, entries):
    assert DCAConfig(**fields).max_stack_entries == entries


REFUSED = [
    # Names: the message tells the nearest one, and all.
    ({"residual_scheme": "grn_3"}, ["`residual_scheme`", "'grn_3'", "did you mean 'grn_v3'?", "standard", "dca"]),
    ({"residual_scheme": "other"}, ["`residual_scheme`", "'other'", "standard, grn_v1, grn_v2, grn_v3, dca"]),
    ({"norm_type": "rmsnorm"}, ["`norm_type`", "'rmsnorm'", "did you mean 'rms_norm'?", "rms_norm, layer_norm"]),
    ({"norm_type": "zero_centred_rms_norm"}, ["`norm_type`", "did you mean 'zero_centered_rms_norm'?"]),
    ({"norm_eps": -1}, ["`norm_eps` is -1", "at least 0"]),
    ({"embedding_multiplier": 0}, ["`embedding_multiplier` is 0", "more than 0"]),
    ({"attention_scaling": 0.0}, ["`attention_scaling` is 0.0", "more than 0"]),
    ({"attention_softcap": -1.0}, ["`attention_softcap` is -1.0", "more than 0"]),
    ({"logit_softcap": 0}, ["`logit_softcap` is 0", "more than 0"]),
    ({"logit_multiplier": 0}, ["`logit_multiplier` is 0", "more than 0"]),
    ({"norm_placement": "post"}, ["`norm_placement`", "'post'", "pre, sandwich, post_module"]),
    ({"qk_norm": "all_head"}, ["`qk_norm`", "'all_head'", "did you mean 'all_heads'?"]),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "yarnn", "rope_theta": 9.0}}},
        ["`rope_type`", "'yarnn'", "did you mean 'yarn'?"],
    ),
    ({"rope_parameters": {"rope_type": "yarnn"}}, ["`rope_type`", "'yarnn'", "did you mean 'yarn'?"]),
    ({"norm_type": "layernorm"}, ["`norm_type`", "'layernorm'", "did you mean 'layer_norm'?"]),
    (
        {"position_embedding": "sin_cos"},
        ["`position_embedding`", "'sin_cos'", "did you mean 'sincos'?", "rope, learned, sincos, none"],
    ),
    # Sizes of at least one.
    ({"last_k": 0}, ["`last_k`", "0", "at least 1"]),
    ({"last_k": -2}, ["`last_k`", "-2", "at least 1"]),
    ({"vocab_size": 0}, ["`vocab_size`", "0", "at least 1"]),
    ({"hidden_size": 0}, ["`hidden_size`", "0", "at least 1"]),
    ({"hidden_size": -8}, ["`hidden_size`", "-8", "at least 1"]),
    ({"intermediate_size": 0}, ["`intermediate_size`", "0", "at least 1"]),
    ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "0", "at least 1"]),
    ({"num_attention_heads": 0}, ["`num_attention_heads`", "0"]),
    ({"num_attention_heads": 0, "head_dim": 64}, ["`num_attention_heads`", "0", "at least 1"]),
    ({"num_key_value_heads": 0}, ["`num_key_value_heads`", "0", "at least 1"]),
    ({"head_dim": 0}, ["`head_dim`", "0", "at least 1"]),
    ({"max_position_embeddings": 0}, ["`max_position_embeddings`", "0", "at least 1"]),
    ({"sliding_window": 0}, ["`sliding_window`", "0", "at least 1"]),
    # Values that do not fit others.
    ({"residual_scheme": "standard", "last_k": 2}, ["`last_k`", "2", "'standard'", "leave `last_k` out"]),
    (
        {"hidden_size": 512, "num_attention_heads": 7},
        ["`hidden_size`", "512", "multiple", "`num_attention_heads`", "7"],
    ),
    ({"num_key_value_heads": 3}, ["`num_attention_heads`", "8", "multiple", "`num_key_value_heads`", "3"]),
    ({"head_dim": 7}, ["`head_dim`", "7", "multiple of 2"]),
    ({"hidden_size": 24}, ["`head_dim`", "3", "multiple of 2"]),
    (
        {"position_embedding": "sincos", "hidden_size": 15, "num_attention_heads": 5},
        ["`hidden_size`", "15", "multiple of 2"],
    ),
    ({"layer_types": ["full_attention"]}, ["`layer_types`", "1", "`num_hidden_layers`", "12", "one for each layer"]),
    (
        {"layer_types": ["full_atention"], "num_hidden_layers": 1},
        ["`layer_types`", "'full_atention'", "did you mean 'full_attention'?", "sliding_attention"],
    ),
    (
        {"layer_types": ["sliding_attention"], "num_hidden_layers": 1},
        ["`layer_types`", "'sliding_attention'", "`sliding_window`"],
    ),
    ({"no_rope_layers": [1, 0]}, ["`no_rope_layers`", "[1, 0]", "a 0 or 1 for each of the 12 layers"]),
    ({"no_rope_layers": [2], "num_hidden_layers": 1}, ["`no_rope_layers`", "[2]", "a 0 or 1"]),
    (
        {"no_rope_layers": [1] * 12, "position_embedding": "learned"},
        ["`no_rope_layers`", "`position_embedding`", "'learned'", "leave it out"],
    ),
    # Types.
    ({"residual_scheme": 3}, ["residual_scheme", "3", "str"]),
    ({"last_k": 2.5}, ["last_k", "2.5", "int"]),
    ({"last_k": "two"}, ["last_k", "two", "int"]),
    ({"vocab_size": "many"}, ["vocab_size", "many", "int"]),
    ({"gated_mlp": "no"}, ["gated_mlp", "no", "bool"]),
]

VISION_REFUSED = [
    ({"pooling": "means"}, ["`pooling`", "'means'", "did you mean 'mean'?", "mean, cls, cls_mean"]),
    ({"num_register_tokens": -1}, ["`num_register_tokens`", "-1", "at least 0"]),
    ({"position_embedding": "rope"}, ["`position_embedding`", "'rope'", "learned, sincos, none"]),
    ({"num_channels": 0}, ["`num_channels`", "0", "at least 1"]),
    ({"image_size": 0}, ["`image_size`", "0", "positive", "height and width"]),
    ({"image_size": []}, ["`image_size`", "[]", "height and width"]),
    ({"image_size": [224]}, ["`image_size`", "[224]", "height and width"]),
    ({"image_size": (32, 32, 32)}, ["image_size", "(32, 32, 32)"]),
    ({"patch_size": 0}, ["`patch_size`", "0", "positive", "height and width"]),
    ({"patch_size": (16, -16)}, ["`patch_size`", "(16, -16)", "positive"]),
    ({"image_size": 30}, ["`image_size`", "30", "multiple", "`patch_size`", "16"]),
    ({"image_size": [32, 30]}, ["`image_size`", "[32, 30]", "multiple", "`patch_size`", "16"]),
    ({"patch_size": [16, 15]}, ["`image_size`", "224", "multiple", "`patch_size`", "[16, 15]"]),
    ({"hidden_size": 30, "num_attention_heads": 5}, ["`hidden_size`", "30", "multiple of 4"]),
    ({"sliding_window": 3}, ["`sliding_window`", "3", "leave it out"]),
    ({"no_rope_layers": [1] * 12}, ["`no_rope_layers`", "[1, 1, ", "leave it out"]),
    ({"rope_parameters": {"rope_theta": 5.0}}, ["`rope_parameters`", "5.0", "leave it out"]),
    ({"residual_scheme": "standard", "last_k": 1}, ["`last_k`", "1", "leave `last_k` out"]),
    ({"residual_scheme": "dcc"}, ["`residual_scheme`", "'dcc'", "did you mean 'dca'?"]),
]


@pytest.mark.parametrize(
    "config_class, fields, words",
    [(DCAConfig, *case) for case in REFUSED] + [(DCAVisionConfig, *case) for case in VISION_REFUSED],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused_values_are_named_with_what_is_right(config_class, fields, words):
    with pytest.raises(StrictDataclassError) as error:
        config_class(**fields)
    message = str(error.value)
    assert [word for word in words if word not in message] == []


def test_name_of_the_source_in_earlier_releases():
    config = DCAConfig.from_dict(
        DCAConfig().to_dict() | {"residual_config": {"model_type": "llama"}, "source_config": None}
    )
    assert config.source_config == {"model_type": "llama"} and "residual_config" not in config.to_dict()


@pytest.mark.parametrize("position_embedding", ["learned", "sincos", "none"])
def test_odd_head_dim_is_fine_without_rotary_positions(position_embedding):
    config = DCAConfig(position_embedding=position_embedding, hidden_size=20, num_attention_heads=4)
    assert config.head_dim == 5


def test_odd_head_dim_is_fine_for_vision():
    assert DCAVisionConfig(hidden_size=20, num_attention_heads=4).head_dim == 5


def test_hidden_size_need_not_be_a_multiple_of_the_heads_if_head_dim_is_given():
    assert DCAConfig(hidden_size=30, num_attention_heads=4, head_dim=8).head_dim == 8


def test_unknown_grn_implementation_is_refused_by_the_model():
    # Which implementations there are is only known where the model is: others may be registered.
    config = DCAConfig(
        vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, grn_implementation="eagr"
    )
    with pytest.raises(ValueError, match="`grn_implementation` is 'eagr'; did you mean 'eager'\\? Known: auto, eager"):
        DCAForCausalLM(config)


TEXT_FIELDS = {
    "vocab_size": 77,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 99,
    "residual_scheme": "grn_v3",
    "last_k": 2,
    "norm_type": "layer_norm",
    "norm_eps": 1e-5,
    "gated_mlp": True,
    "qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0, 1],
    "attention_bias": True,
    "attention_output_bias": False,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "eos_token_id": [1, 2],
    "tie_word_embeddings": True,
    "embedding_multiplier": 4.5,
    "source_config": {"model_type": "llama", "hidden_size": 24, "rope_parameters": {"rope_theta": 500.0}},
}
VISION_FIELDS = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "residual_scheme": "dca",
    "last_k": 1,
    "image_size": (16, 32),
    "patch_size": [4, 8],
    "num_channels": 1,
    "pooling": "cls_mean",
    "num_register_tokens": 2,
    "position_embedding": "learned",
    "num_labels": 5,
}


def through_json(value):
    # JSON has no tuples.
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("config_class, fields", [(DCAConfig, TEXT_FIELDS), (DCAVisionConfig, VISION_FIELDS)])
def test_saved_configuration_is_loaded_as_it_was(tmp_path, config_class, fields):
    config = config_class(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert through_json(loaded.to_dict() | {"_name_or_path": ""}) == through_json(config.to_dict())
        for name, value in through_json(fields).items():
            assert through_json(getattr(loaded, name)) == value, name


#: What release 0.2 saved with a vision model besides the fields of today: those of text models, as they were by default.
TEXT_FIELDS_OF_OLD_VISION_CONFIGURATIONS = {
    "bos_token_id": None,
    "embedding_multiplier": 1.0,
    "eos_token_id": None,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 2048,
    "no_rope_layers": None,
    "pad_token_id": None,
    "rope_parameters": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": False,  # the Trainer sets it
    "vocab_size": 32000,
}


def test_vision_configuration_has_no_fields_of_text(tmp_path):
    config = DCAVisionConfig(**VISION_FIELDS)
    config.use_cache = False  # as the Trainer does
    text = TEXT_FIELDS_OF_OLD_VISION_CONFIGURATIONS.keys()
    assert text <= DCAConfig.own_fields() - DCAVisionConfig.own_fields()
    assert text & {field for field in dir(config) if not field.startswith("_")} == {"use_cache"}
    config.save_pretrained(tmp_path)
    assert text & json.loads((tmp_path / "config.json").read_text()).keys() == set()


def test_vision_configuration_of_an_earlier_release_is_loaded_as_it_was(tmp_path, recwarn, caplog):
    config = DCAVisionConfig(**VISION_FIELDS)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert not saved.keys() & TEXT_FIELDS_OF_OLD_VISION_CONFIGURATIONS.keys()
    path.write_text(json.dumps(saved | TEXT_FIELDS_OF_OLD_VISION_CONFIGURATIONS))
    for config_class, fields in itertools.product((DCAVisionConfig, AutoConfig), ({}, {"last_k": 2})):
        loaded = config_class.from_pretrained(tmp_path, **fields)
        expected = config.to_dict() | {"_name_or_path": str(tmp_path), **fields}
        assert through_json(loaded.to_dict() | {"_name_or_path": str(tmp_path)}) == through_json(expected)
        assert not hasattr(loaded, "vocab_size") and not hasattr(loaded, "layer_types")
    assert [*recwarn] == [] and caplog.records == []


def test_layer_types_that_follow_are_not_saved(tmp_path):
    mixed = ["full_attention", "sliding_attention"]
    for window, given, saved in [
        (None, None, None),
        (3, None, None),
        (3, ["sliding_attention"] * 2, None),
        (3, mixed, mixed),
    ]:
        config = DCAConfig(num_hidden_layers=2, sliding_window=window, layer_types=given)
        config.save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        assert fields.get("layer_types") == saved
        for loaded in (DCAConfig.from_pretrained(tmp_path), DCAConfig(**fields | {"layer_types": config.layer_types})):
            assert loaded.layer_types == config.layer_types
        assert config.layer_types == (given or ["full_attention" if window is None else "sliding_attention"] * 2)
    # They follow where the window is set, too.
    config = DCAConfig(num_hidden_layers=2)
    config.sliding_window = 4
    assert config.layer_types == ["sliding_attention"] * 2 and "layer_types" not in config.to_dict()


def test_grn_implementation_is_not_saved(tmp_path):
    config = DCAConfig(grn_implementation="eager")
    assert "grn_implementation" not in config.to_dict() and "grn_implementation" not in config.to_diff_dict()
    config.save_pretrained(tmp_path)
    assert "grn_implementation" not in json.loads((tmp_path / "config.json").read_text())
    assert DCAConfig.from_pretrained(tmp_path).grn_implementation == "auto"
    assert DCAConfig.from_pretrained(tmp_path, grn_implementation="eager").grn_implementation == "eager"


@pytest.mark.parametrize("pooling, prefix, width", [("mean", 2, 384), ("cls", 3, 384), ("cls_mean", 3, 768)])
def test_tokens_before_the_patches_and_width_of_what_is_pooled(pooling, prefix, width):
    config = DCAVisionConfig(pooling=pooling, num_register_tokens=2)
    assert (config.num_prefix_tokens, config.pooled_size) == (prefix, width)


def test_invalid_saved_value_is_refused_on_loading(tmp_path):
    DCAConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"residual_scheme": "grn-v2"}))
    with pytest.raises(StrictDataclassError, match="did you mean 'grn_v2'"):
        DCAConfig.from_pretrained(tmp_path)


def test_auto_config_knows_both_model_types():
    assert type(AutoConfig.for_model("dca", last_k=3)) is DCAConfig
    assert type(AutoConfig.for_model("dca_vision", last_k=3)) is DCAVisionConfig
