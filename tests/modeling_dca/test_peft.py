"""PEFT: LoRA on the projections while the generalized residuals are trained in full."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_dca import DCAConfig, DCAForCausalLM
from modeling_dca.peft_dca import query_states


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


# Defaults: what PEFT trains where nobody says which modules

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
#: Methods that have a table of modules by the model's type, and what they need besides.
NAMELESS = {
    "AdaLora": {"total_step": 10},
    "AdaptionPrompt": {"adapter_len": 3, "adapter_layers": 2},
    "FourierFT": {"n_frequency": 10},
    "HRA": {},
    "IA3": {},
    "LNTuning": {},
    "LoHa": {},
    "LoKr": {},
    "Lora": {},
    "OFT": {"oft_block_size": 4},
    "RandLora": {"r": 2},
    "VBLoRA": {"num_vectors": 4, "vector_length": 4, "topk": 2},
    "Vera": {"r": 2},
}


def like_llama(scheme):
    torch.manual_seed(0)
    if scheme == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    return DCAForCausalLM(DCAConfig(**SIZES, gated_mlp=True, hidden_act="silu", residual_scheme=scheme))


@pytest.mark.parametrize("scheme", ["standard", "dca"])
@pytest.mark.parametrize("method", NAMELESS)
def test_defaults_are_those_of_llama(method, scheme, tmp_path):
    trained = {}
    for name in ("llama", scheme):
        config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **NAMELESS[method])
        model = peft.get_peft_model(like_llama(name), config)
        trained[name] = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    if method == "LNTuning":
        more = [n for n in trained[scheme] if n not in trained["llama"]]
        assert {n.split(".")[-4] for n in more} == ({"key_layernorm", "value_layernorm"} if scheme == "dca" else set())
        trained[scheme] = {n: shape for n, shape in trained[scheme].items() if n not in more}
    assert trained[scheme] == trained["llama"] and trained["llama"]
    before = logits(model)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(like_llama(scheme), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("qk_norm", [False, True, "all_heads"])
def test_adaption_prompts_are_answered_by_the_queries(qk_norm):
    """With the gate of the prompts open, what they add is the attention of the queries to them."""
    torch.manual_seed(0)
    config = DCAConfig(**SIZES, qk_norm=qk_norm)
    model = peft.get_peft_model(
        DCAForCausalLM(config),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
    ).eval()
    adapted = model.base_model.model.model.layers[-1].self_attn
    seen = {}

    def attend(module, query, key, value, mask, **kwargs):
        seen["query"] = query
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("seen", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("seen", lambda *args, **kwargs: None)
    try:
        model.config._attn_implementation = "seen"
        inputs = {}
        adapted.register_forward_pre_hook(lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True)
        logits(model)
        found = query_states(adapted.model, **inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["seen"], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["seen"]
    torch.testing.assert_close(found, seen["query"])


def test_nobody_waits_for_peft_who_has_not_asked_for_it():
    program = (
        "import sys\n"
        "from modeling_dca import DCAConfig, DCAForCausalLM\n"
        "model = DCAForCausalLM(DCAConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))\n"
        "print('peft' in sys.modules)\n"
        "import peft\n"
        "peft.get_peft_model(model, peft.LoraConfig(task_type='CAUSAL_LM')).print_trainable_parameters()\n"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert completed.stdout.startswith("False\ntrainable params: 256 ")
