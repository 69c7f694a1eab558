"""torchao and quanto: quantized weights compute nearly the same, and are saved and loaded to the bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM


quantization = pytest.importorskip("torchao.quantization")
transformers_config = pytest.importorskip("transformers").TorchAoConfig
IDS = torch.arange(2, 20).reshape(2, 9)
KINDS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model_computes_nearly_the_same(checkpoint, kind):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = logits(model)
    quantization.quantize_(model, getattr(quantization, kind)())
    error = (logits(model) - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_model_is_saved_and_loaded(checkpoint, kind, tmp_path):
    config = transformers_config(getattr(quantization, kind)())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))


def test_quanto(checkpoint, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = logits(model)
    quantized = quanto.QuantizedModelForCausalLM.quantize(model, weights=quanto.qint8, exclude="lm_head")
    error = (logits(quantized) - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.05
    quantized.save_pretrained(tmp_path)
    loaded = quanto.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(quantized))
    for name in set(quanto.quantization_map(model)):
        assert isinstance(loaded.get_submodule(name), quanto.QModuleMixin)
