"""TRL: the loss that it trains on is the model's own, it trains with its defaults, and adapters come back."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.clients.tools import WITHOUT_PACKAGE, python


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
TEXTS = ["def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor)", "return weight * hidden_states"] * 2
PREFERENCES = {"prompt": ["def rms"] * 4, "chosen": ["_norm(hidden_states"] * 4, "rejected": ["zzz zzz"] * 4}


def options(config, folder, **more):
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    return config(
        str(folder), **common, report_to="none", use_cpu=True, bf16=False, save_strategy="no", seed=0, **more
    )


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def finish(trainer):
    """Trains, and returns the losses; some weights have changed."""
    before = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    trainer.train()
    changed = [
        name
        for name, weight in trainer.model.named_parameters()
        if name in before and not torch.equal(weight, before[name])
    ]
    assert changed
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.tensor(losses).isfinite().all()
    return losses


def test_supervised_fine_tuning(checkpoint, tmp_path):
    data = Dataset.from_dict({"text": [TEXTS[0]] * 4})
    # (The tokenizer's end of text is appended.)
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(TEXTS[0])["input_ids"] + [0]])
    expected = load(checkpoint)(ids, labels=ids).loss.item()
    trainer = trl.SFTTrainer(load(checkpoint), options(trl.SFTConfig, tmp_path), train_dataset=data)
    assert finish(trainer)[0] == pytest.approx(expected, rel=2e-3)


def test_supervised_fine_tuning_with_an_adapter_that_names_nothing(checkpoint, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        load(checkpoint), options(trl.SFTConfig, tmp_path), train_dataset=data, peft_config=peft.LoraConfig()
    )
    finish(trainer)
    assert {name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "q_proj",
        "v_proj",
    }
    trainer.save_model(tmp_path / "adapter")
    ids = torch.arange(2, 20).reshape(2, 9)
    # (A configuration that names no task names the model's class, which PEFT imports of its own friends alone.)
    allowed = {"import_allowlist": ["transformers", "modeling_dca"]}
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **allowed).eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_direct_preferences(checkpoint, tmp_path):
    # On a model object, without a tokenizer: both are loaded by the model's name.
    trainer = trl.DPOTrainer(
        load(checkpoint), args=options(trl.DPOConfig, tmp_path), train_dataset=Dataset.from_dict(PREFERENCES)
    )
    losses = finish(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: model and reference are the same
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rewards_of_generations(checkpoint, tmp_path, kind):
    def reward(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    trainer = getattr(trl, f"{kind}Trainer")(
        load(checkpoint),
        reward_funcs=reward,
        args=options(getattr(trl, f"{kind}Config"), tmp_path, max_completion_length=8, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["def rms", "return wei"] * 2}),
    )
    finish(trainer)


def test_reward_model(checkpoint, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    data = Dataset.from_dict(PREFERENCES)
    losses = finish(trl.RewardTrainer(model, options(trl.RewardConfig, tmp_path), train_dataset=data))
    assert losses[1] < losses[0]


def test_without_the_package(checkpoints, tmp_path):
    """The checkpoint's own code is enough, where TRL is told to trust it: also for the adapter that names nothing."""
    program = (
        WITHOUT_PACKAGE
        + """
import peft, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
checkpoint = sys.argv[1]
common = dict(max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
data = Dataset.from_dict({"text": ["def a(x): return x"] * 8})
trl.SFTTrainer(model, trl.SFTConfig("sft", **common), train_dataset=data, peft_config=peft.LoraConfig()).train()
data = Dataset.from_dict({"prompt": ["a"] * 8, "chosen": ["b"] * 8, "rejected": ["c"] * 8})
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
trl.DPOTrainer(model, args=trl.DPOConfig("dpo", **common), train_dataset=data).train()
print("trained", type(model).__module__)
"""
    )
    assert "trained transformers_modules." in python("-c", program, checkpoints["dca"], folder=tmp_path)
