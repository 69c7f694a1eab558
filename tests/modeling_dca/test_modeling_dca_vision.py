"""Vision models: the maths of the whole model, positions, sizes and shapes, and the Auto classes."""

import json

import numpy as np
import pytest
import torch
from reference_dca import image_logits, posemb_sincos_2d, to_array
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from modeling_dca import DCAForImageClassification, DCAVisionBackbone, DCAVisionConfig, DCAVisionModel


SCHEMES = [
    {"residual_scheme": "standard"},
    {"residual_scheme": "grn_v1"},
    {"residual_scheme": "grn_v3", "last_k": 1},
    {"residual_scheme": "dca"},
    {"residual_scheme": "dca", "last_k": 2},
]
EMBEDDINGS = [
    {"pooling": pooling, "position_embedding": position_embedding}
    for pooling in ("mean", "cls")
    for position_embedding in ("learned", "sincos", "none")
]


def name_of(value):
    return "-".join(str(part) for part in value.values())


def tiny_config(**fields):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    # Neither the images nor the patches are squares: rows and columns cannot be mixed up.
    images = {"image_size": (8, 18), "patch_size": (4, 6), "num_channels": 2, "num_labels": 3}
    return DCAVisionConfig(**(sizes | images | fields))


@torch.no_grad()
def tiny_model(model_class=DCAForImageClassification, dtype=torch.float32, seed=0, **fields):
    """Random weights, away from where they start: linear maps keep the scale, norms are near one."""
    model = model_class(tiny_config(**fields)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(dtype)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith(("cls_token", "position_embeddings")):
            parameter.copy_(noise)
        elif parameter.ndim >= 2 and not name.endswith(("delta", "gate")):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)
    return model.eval()


def random_images(number=2, channels=2, height=8, width=18, dtype=torch.float32):
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_close(result, expected, tolerance):
    """Within `tolerance` of the largest expected value: what a sum of many terms can be held to."""
    result, expected = torch.as_tensor(result).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_logits_equal_the_slow_rendering(scheme):
    # In this architecture nothing is computed in less than float64.
    model = tiny_model(dtype=torch.float64, pooling="cls", position_embedding="learned", **scheme)
    images = random_images(dtype=torch.float64)
    assert_close(model(images).logits, image_logits(model, images), 1e-12)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=name_of)
def test_logits_equal_the_slow_rendering_with_every_embedding(embedding, attn_implementation):
    model = tiny_model(last_k=1, attn_implementation=attn_implementation, **embedding)
    assert_close(model(random_images()).logits, image_logits(model, random_images()), 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 8, "patch_size": 4},
        {"image_size": [4, 18], "patch_size": [4, 6]},
        {"image_size": (8, 18), "patch_size": 2},
        {"norm_type": "rms_norm", "qk_norm": True, "gated_mlp": True, "hidden_act": "silu", "num_key_value_heads": 2},
        {"attention_bias": False, "mlp_bias": False},
    ],
    ids=name_of,
)
def test_logits_equal_the_slow_rendering_in_other_shapes(fields):
    model = tiny_model(**fields)
    height, width = model.config.image_height_width
    images = random_images(height=height, width=width)
    assert_close(model(images).logits, image_logits(model, images), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=name_of)
def test_fresh_model_equals_the_standard_one(scheme, dtype, tolerance):
    standard = tiny_model(dtype=dtype, residual_scheme="standard")
    weights = dict(standard.state_dict())
    for name in list(weights):
        if ".input_layernorm." in name:
            weights[name.replace("input_layernorm", "key_layernorm")] = weights[name]
            weights[name.replace("input_layernorm", "value_layernorm")] = weights[name]
    model = DCAForImageClassification(tiny_config(**scheme)).to(dtype).eval()
    loading = model.load_state_dict(weights, strict=False)
    assert all(name.endswith((".delta", ".gate")) for name in loading.missing_keys)
    images = random_images(dtype=dtype)
    expected, result = standard(images, output_hidden_states=True), model(images, output_hidden_states=True)
    assert_close(result.logits, expected.logits, tolerance)
    for hidden_states, expected_hidden_states in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert_close(hidden_states, expected_hidden_states, tolerance)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling(pooling):
    model = tiny_model(DCAVisionModel, pooling=pooling)
    outputs = model(random_images())
    hidden_states = outputs.last_hidden_state
    assert hidden_states.shape == (2, 6 + (pooling == "cls"), 16)
    expected = hidden_states[:, 0] if pooling == "cls" else hidden_states.sum(1) / 6
    assert_close(outputs.pooler_output, expected, 1e-6)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sincos_positions_are_those_of_the_plain_recipe(pooling, size):
    model = DCAVisionModel(tiny_config(hidden_size=size, image_size=(20, 18), pooling=pooling))
    images = random_images(1, height=20)
    with torch.no_grad():
        embeddings = model.embeddings(images)
        patches = model.embeddings.patch_embeddings(images)
    positions = to_array(embeddings[0, int(pooling == "cls") :] - patches[0])
    np.testing.assert_allclose(positions, posemb_sincos_2d(5, 3, size), rtol=0, atol=2e-6)
    if pooling == "cls":
        torch.testing.assert_close(embeddings[0, 0], model.embeddings.cls_token[0, 0].detach())


def test_positions_matter():
    # The same patches in another order: only without positions is the average over them the same.
    images = random_images(1)
    swapped = torch.cat((images[..., 6:], images[..., :6]), -1)
    for position_embedding in ("learned", "sincos", "none"):
        model = tiny_model(position_embedding=position_embedding)
        difference = (model(images).logits - model(swapped).logits).abs().max()
        assert difference < 1e-5 if position_embedding == "none" else difference > 1e-3


@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=name_of)
def test_other_image_sizes_need_to_be_asked_for(embedding):
    model = tiny_model(**embedding)
    images = random_images(height=12, width=30)
    with pytest.raises(ValueError, match=r"12 x 30 pixels.*`image_size` is .*8, 18.*`interpolate_pos_encoding=True`"):
        model(images)
    tokens = 15 + (embedding["pooling"] == "cls")
    hidden_states = model.model(images, interpolate_pos_encoding=True).last_hidden_state
    assert hidden_states.shape == (2, tokens, 16)
    assert model(images, interpolate_pos_encoding=True).logits.shape == (2, 3)
    if embedding["position_embedding"] != "learned":
        # These positions are computed for any size.
        assert_close(model(images, interpolate_pos_encoding=True).logits, image_logits(model, images), 1e-5)
    # Images of the size that was trained on are unaffected.
    expected = model(random_images()).logits
    assert torch.equal(model(random_images(), interpolate_pos_encoding=True).logits, expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_learned_positions_are_interpolated_over_rows_and_columns(pooling):
    model = tiny_model(DCAVisionModel, position_embedding="learned", pooling=pooling, image_size=(8, 18))
    images = random_images(1, height=24, width=54)
    with torch.no_grad():
        embeddings = model.embeddings(images, interpolate_pos_encoding=True)[0]
        patches = model.embeddings.patch_embeddings(images)[0]
    learned = model.embeddings.position_embeddings[0].detach()
    class_tokens = int(pooling == "cls")
    if class_tokens:
        torch.testing.assert_close(embeddings[0], model.embeddings.cls_token[0, 0].detach() + learned[0])
    positions = (embeddings[class_tokens:] - patches).view(6, 9, 16)
    # On a grid that is three times as fine, every third point is one of the old ones.
    torch.testing.assert_close(positions[1::3, 1::3], learned[class_tokens:].view(2, 3, 16), rtol=0, atol=1e-5)
    # Those between lie nearer to the old point that they are nearer to.
    near, far = (positions[2, 1] - positions[row, 1] for row in (1, 4))
    assert near.norm() < far.norm()


def test_wrong_number_of_channels_and_missing_images():
    model = tiny_model()
    with pytest.raises(ValueError, match="`pixel_values` has 3 channels.*`num_channels` is 2"):
        model(random_images(channels=3))
    with pytest.raises(ValueError, match="pixel_values"):
        model()


def test_attention_is_bidirectional():
    # What is changed is the last patch: with a causal mask nothing before it would notice.
    for attn_implementation in ("eager", "sdpa"):
        model = tiny_model(DCAVisionModel, num_hidden_layers=1, attn_implementation=attn_implementation)
        images = random_images(1)
        changed = images.clone()
        changed[..., 4:, 12:] += 1
        difference = model(images).last_hidden_state - model(changed).last_hidden_state
        assert (difference.abs().amax(-1) > 1e-4).all()


def test_labels_give_a_loss():
    labels = torch.tensor([2, 0])
    outputs = tiny_model()(random_images(), labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))
    values = torch.tensor([0.3, -1.0])
    outputs = tiny_model(num_labels=1)(random_images(), labels=values)
    torch.testing.assert_close(outputs.loss, ((outputs.logits[:, 0] - values) ** 2).mean())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("model_class", [DCAVisionModel, DCAForImageClassification])
def test_hidden_states_and_attentions(model_class, scheme):
    model = tiny_model(model_class, attn_implementation="eager", **scheme)
    outputs = model(random_images(), output_hidden_states=True, output_attentions=True)
    assert [hidden_states.shape for hidden_states in outputs.hidden_states] == [(2, 6, 16)] * 5
    assert [attentions.shape for attentions in outputs.attentions] == [(2, 4, 6, 6)] * 4
    # Here, other than in language models, the last hidden state is the one before the final norm.
    base = model if model_class is DCAVisionModel else model.model
    expected = base(random_images()).last_hidden_state
    assert_close(base.norm(outputs.hidden_states[-1]), expected, 1e-6)


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=name_of)
def test_one_step_moves_every_new_parameter(scheme):
    torch.manual_seed(0)
    model = DCAForImageClassification(tiny_config(pooling="cls", position_embedding="learned", **scheme))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(random_images(8), labels=torch.arange(8) % 3).loss.backward()
    optimizer.step()
    new = {name for name in before if ".residual." in name or "cls_token" in name or "position_embeddings" in name}
    assert len(new) == 5 * (1 if scheme["residual_scheme"] == "grn_v1" else 2) + 2
    moved = {name for name, parameter in model.named_parameters() if (parameter != before[name]).all()}
    assert new - moved == set()


def test_initial_weights():
    torch.manual_seed(0)
    model = DCAForImageClassification(tiny_config(hidden_size=64, pooling="cls", position_embedding="learned"))
    for name, parameter in model.named_parameters():
        if name.endswith(("delta", "gate", "bias")):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            # A standard deviation over n numbers is known to about 1 / sqrt(2 n); this is four times that.
            assert abs(parameter.std() / 0.02 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = tiny_model(dtype=torch.float64, last_k=1).train()

    def gradients():
        model.zero_grad()
        model(random_images(dtype=torch.float64), labels=torch.tensor([0, 1])).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(random_images()).logits, model(random_images()).logits, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = tiny_model(dtype=dtype, last_k=1)
    # Images come in float32 from any processor.
    logits = model(random_images()).logits
    assert logits.dtype == dtype
    exact = tiny_model(dtype=torch.float64, last_k=1)
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    # Each of four blocks, embedding and output rounds a dozen times by at most half an epsilon, in all directions.
    assert_close(logits, exact(random_images()).logits, 6 * 12**0.5 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=name_of)
def test_runs_on_the_meta_device(embedding):
    with torch.device("meta"):
        model = DCAForImageClassification(tiny_model(DCAForImageClassification, **embedding).config)
        size = (2, model.config.num_channels, *model.config.image_height_width)
        outputs = model(torch.zeros(size), labels=torch.zeros(2, dtype=torch.long))
        outputs.loss.backward()
    assert outputs.logits.is_meta and outputs.logits.shape == (2, model.config.num_labels)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize(
    "model_class, auto_class",
    [(DCAVisionModel, AutoModel), (DCAForImageClassification, AutoModelForImageClassification)],
)
@pytest.mark.parametrize("embedding", [EMBEDDINGS[0], EMBEDDINGS[-1]], ids=name_of)
def test_saved_model_is_loaded_by_the_auto_class(tmp_path, model_class, auto_class, embedding):
    model = tiny_model(model_class, last_k=2, **embedding)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path).eval()
    assert type(loaded) is model_class
    assert_close(loaded(random_images())[0], model(random_images())[0], 1e-6)
    assert type(auto_class.from_config(model.config)) is model_class


def test_checkpoint_of_an_earlier_release_computes_what_it_did(tmp_path, recwarn, caplog):
    model = tiny_model(residual_scheme="standard")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    # Release 0.2 saved the fields of text models, too.
    text = {"vocab_size": 32000, "use_cache": True, "layer_types": ["full_attention"] * 4, "sliding_window": None}
    text |= {"rope_parameters": None, "no_rope_layers": None, "tie_word_embeddings": False, "pad_token_id": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | text))
    recwarn.clear()
    caplog.clear()
    for load in (DCAForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        assert torch.equal(load(tmp_path)(random_images()).logits, model(random_images()).logits)
    assert [str(warning.message) for warning in recwarn] == [] and caplog.records == []
    load(tmp_path).save_pretrained(tmp_path)
    assert not json.loads(file.read_text()).keys() & text.keys()


# Backbones, of which detectors and the like are made


@pytest.mark.parametrize("embedding", [EMBEDDINGS[0], EMBEDDINGS[-1]], ids=name_of)
@torch.no_grad()
def test_backbone_returns_the_depths_that_are_asked_for(tmp_path, embedding):
    model = tiny_model(num_register_tokens=2, **embedding)
    model.save_pretrained(tmp_path)
    prefix = model.config.num_prefix_tokens
    images = random_images()
    states = model(images, output_hidden_states=True).hidden_states
    # Patches are numbered row by row: 2 rows of 3.
    expected = [model.model.norm(each)[:, prefix:].transpose(1, 2).reshape(2, 16, 2, 3) for each in states]
    for asked in ({"out_indices": [0, 2, 4]}, {"out_features": ["stem", "stage2", "stage4"]}):
        # (`AutoBackbone.from_pretrained` knows no folders, whatever model is in them.)
        assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path, **asked))) is DCAVisionBackbone
        backbone = DCAVisionBackbone.from_pretrained(tmp_path, **asked).eval()
        assert backbone.channels == [16, 16, 16]
        found = backbone(images)
        assert found.hidden_states is None and len(found.feature_maps) == 3
        for each, index in zip(found.feature_maps, (0, 2, 4)):
            assert_close(each, expected[index], 1e-6)
    backbone.save_pretrained(tmp_path / "again")
    assert DCAVisionBackbone.from_pretrained(tmp_path / "again").out_features == ["stem", "stage2", "stage4"]
    # The last where nobody has asked, of which nothing is saved, and of a part of the blocks the last of these.
    (last,) = DCAVisionBackbone.from_pretrained(tmp_path).eval()(images).feature_maps
    assert_close(last, expected[4], 1e-6)
    assert not json.loads((tmp_path / "config.json").read_text()).keys() & {
        "out_features",
        "out_indices",
        "stage_names",
    }
    shorter = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2))
    assert shorter.out_features == ["stage2"]


def test_backbone_refuses_a_depth_that_there_is_not():
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        AutoBackbone.from_config(tiny_config(out_features=["stage9"]))
