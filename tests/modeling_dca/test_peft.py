"""PEFT: LoRA on the projections while the generalized residuals are trained in full."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_dca import DCAForCausalLM


peft = pytest.importorskip("peft")

IDS = torch.arange(2 * 9).reshape(2, 9) % 50
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# PEFT trains a copy of each module that `modules_to_save` names: those of the blocks, and the one before the last norm.
# (`target_parameters` would learn low-rank changes of `delta` and `gate`, which are no larger than such a change.)
LORA = {"r": 2, "target_modules": PROJECTIONS, "modules_to_save": ["residual"], "task_type": "CAUSAL_LM"}


@pytest.fixture(params=[{"last_k": 2}, {"residual_scheme": "grn_v1"}], ids=["2-dca", "grn_v1"])
def checkpoint(request, tmp_path):
    """A retrofit of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    DCAForCausalLM.from_residual(LlamaForCausalLM(config), **request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def trained(checkpoint):
    """A model with its adapter, and its state before the training."""
    torch.manual_seed(0)
    model = peft.get_peft_model(DCAForCausalLM.from_pretrained(checkpoint), peft.LoraConfig(**LORA))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model)
    assert losses == sorted(losses, reverse=True)
    return model, before


def test_adapter_starts_as_the_model(checkpoint):
    model = DCAForCausalLM.from_pretrained(checkpoint)
    expected = logits(model)
    assert torch.equal(logits(peft.get_peft_model(model, peft.LoraConfig(**LORA))), expected)


def test_only_adapter_and_residuals_are_trained(trained):
    model, before = trained
    for name, parameter in model.named_parameters():
        ours = ".lora_" in name or ".residual.modules_to_save." in name
        assert parameter.requires_grad == ours
        assert torch.equal(parameter, before[name]) != ours, name
    moved = {name.split(".residual.")[0] for name in before if ".residual.modules_to_save." in name}
    assert len(moved) == model.config.num_hidden_layers + 1


def test_adapter_is_saved_and_loaded(trained, checkpoint, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path / "adapter")
    base = logits(DCAForCausalLM.from_pretrained(checkpoint))
    loaded = peft.PeftModel.from_pretrained(DCAForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), base)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)
    # With both from the folder of the adapter, as `AutoPeftModel` knows the checkpoint that it was trained on.
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    train(loaded)
    assert not torch.equal(logits(loaded), logits(model))


def test_adapter_is_merged_into_a_plain_model(trained, checkpoint, tmp_path):
    model, _ = trained
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is DCAForCausalLM
    torch.testing.assert_close(logits(merged), expected)
    assert all(layer.residual.delta.any() for layer in merged.model.layers)
    merged.save_pretrained(tmp_path / "merged")
    loaded = DCAForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    shapes = {name: weight.shape for name, weight in DCAForCausalLM.from_pretrained(checkpoint).state_dict().items()}
    assert {name: weight.shape for name, weight in loaded.state_dict().items()} == shapes


def test_target_parameters_reach_the_residuals(checkpoint, tmp_path):
    """The other way that PEFT has for bare parameters works, too."""
    model = DCAForCausalLM.from_pretrained(checkpoint)
    names = sorted({".".join(name.split(".")[-2:]) for name, _ in model.named_parameters() if ".residual." in name})
    options = {"r": 2, "target_modules": PROJECTIONS, "target_parameters": names, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = peft.PeftModel.from_pretrained(DCAForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert all(p.any() for layer in merged.model.layers for p in layer.residual.parameters())
