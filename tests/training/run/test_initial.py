"""Runs that start from a checkpoint: of a model that becomes DCA, and of a DCA model that goes on as it is."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_dca import DCAConfig, DCAForCausalLM, DCAVisionModel
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, refusal, weights, write_images
from training import causal_lm, image_classification
from training.run.initial import initial_config, initial_model
from training.run.trainer import RunTrainer
from training.text.tokenizer import train_tokenizer


SIZES = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def only(room, *removed, run=TEXT_RUN):
    """The run without some of its model's fields: those are the checkpoint's."""
    lines = (room / run).read_text().splitlines(keepends=True)
    (room / run).write_text("".join(line for line in lines if not line.strip().startswith(removed)))


@pytest.fixture
def llama(room):
    """A Llama with a tokenizer in `llama`, and a run that names no field of the model."""
    only(room, *MODEL_FIELDS)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=1, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(room / "llama")
    texts = (json.loads(line)["text"] for line in (room / "text.jsonl").read_text().splitlines())
    train_tokenizer(texts, 290, 64).save_pretrained(room / "llama")
    return room


@pytest.fixture
def first_weights(monkeypatch):
    """The weights with which each model starts that is trained from now on, by its scheme."""
    first, original = {}, RunTrainer.train

    def train(self, *args, **kwargs):
        first[self.model.config.residual_scheme] = {
            name: weight.clone() for name, weight in self.model.state_dict().items()
        }
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "train", train)
    return first


def test_residual_checkpoint_goes_on_as_dca_and_as_it_is(llama, first_weights):
    arguments = ("--initial_checkpoint=llama", "--output_dir=run", "--baseline=standard", "--last_k=1")
    call(causal_lm.main, TEXT_RUN, *arguments)
    for folder, scheme, last_k in (("run", "dca", 1), ("run/standard", "standard", None)):
        expected = DCAForCausalLM.from_residual("llama", residual_scheme=scheme, last_k=last_k)
        assert first_weights[scheme].keys() == expected.state_dict().keys()
        assert all(torch.equal(first_weights[scheme][name], weight) for name, weight in expected.state_dict().items())
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.config.residual_scheme, model.config.last_k) == (scheme, last_k)
        assert model.config.source_config["model_type"] == "llama" and model.config.gated_mlp
        assert not torch.equal(model.lm_head.weight, expected.lm_head.weight)
    # The tokenizer is the checkpoint's.
    assert (llama / "run" / "tokenizer.json").read_text() == (llama / "llama" / "tokenizer.json").read_text()
    assert "llama" in (llama / "run" / "README.md").read_text()


def test_standard_run_goes_on_as_dca(room, first_weights):
    call(causal_lm.main, TEXT_RUN, "--output_dir=standard", "--residual_scheme=standard")
    only(room, *MODEL_FIELDS)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--initial_checkpoint=standard")
    trained = AutoModelForCausalLM.from_pretrained("standard").state_dict()
    assert all(torch.equal(first_weights["dca"][name], weight) for name, weight in trained.items())
    assert not any(weight.any() for name, weight in first_weights["dca"].items() if name.endswith(("delta", "gate")))


def test_dca_checkpoint_goes_on_as_it_is(room, first_weights):
    call(causal_lm.main, TEXT_RUN, "--output_dir=first", "--last_k=1")
    only(room, *MODEL_FIELDS)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--initial_checkpoint=first")
    trained = AutoModelForCausalLM.from_pretrained("first")
    assert trained.model.layers[1].residual.delta.any()
    assert all(torch.equal(first_weights["dca"][name], weight) for name, weight in trained.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained("run").config.last_k == 1


def test_half_precision_is_trained_in_float32(llama, first_weights):
    LlamaForCausalLM.from_pretrained("llama", dtype=torch.bfloat16).save_pretrained("llama")
    call(causal_lm.main, TEXT_RUN, "--initial_checkpoint=llama", "--output_dir=run", "--max_steps=1")
    assert {weight.dtype for weight in first_weights["dca"].values()} == {torch.float32}


def test_interrupted_run_is_resumed_to_the_same_weights(llama):
    arguments = (TEXT_RUN, "--initial_checkpoint=llama")
    call(causal_lm.main, *arguments, "--output_dir=run")
    whole = weights(llama / "run")
    call(causal_lm.main, *arguments, "--output_dir=run", "--resume_from_checkpoint=run/checkpoint-2")
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(llama / "run").items())


def test_image_classifier_goes_on_as_dca(room, first_weights):
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=standard", "--residual_scheme=standard")
    only(room, "image_size", "patch_size", "num_channels", *MODEL_FIELDS, run=IMAGE_RUN)
    call(image_classification.main, IMAGE_RUN, "--output_dir=run", "--initial_checkpoint=standard")
    trained = AutoModelForImageClassification.from_pretrained("standard").state_dict()
    assert all(torch.equal(first_weights["dca"][name], weight) for name, weight in trained.items())


@pytest.mark.parametrize("scheme", ["standard", "dca"])
def test_classifier_of_other_classes_has_a_new_head(room, first_weights, scheme):
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=first", f"--residual_scheme={scheme}")
    only(room, "image_size", "patch_size", "num_channels", *MODEL_FIELDS, run=IMAGE_RUN)
    write_images(room / "others", count=30, classes=("zero", "one", "two"))
    call(image_classification.main, IMAGE_RUN, "--dataset=others", "--output_dir=run", "--initial_checkpoint=first")
    trained = AutoModelForImageClassification.from_pretrained("first").state_dict()
    for name, weight in first_weights["dca"].items():
        if name.startswith("classifier"):
            assert weight.shape[0] == 3
        elif name in trained:
            assert torch.equal(weight, trained[name]), name
    assert AutoModelForImageClassification.from_pretrained("run").config.id2label == {0: "one", 1: "two", 2: "zero"}


@pytest.mark.parametrize("scheme", ["standard", "dca"])
def test_vision_model_without_a_head_gets_one(room, first_weights, scheme):
    write_images(room / "images")
    only(room, "image_size", "patch_size", "num_channels", *MODEL_FIELDS, run=IMAGE_RUN)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, num_attention_heads=2)).save_pretrained("base")
    arguments = (IMAGE_RUN, "--initial_checkpoint=base", f"--residual_scheme={scheme}", "--output_dir=run")
    call(image_classification.main, *arguments)
    trained = DCAVisionModel.from_residual("base", residual_scheme=scheme).state_dict()
    assert all(torch.equal(first_weights[scheme][f"model.{name}"], weight) for name, weight in trained.items())
    assert first_weights[scheme]["classifier.weight"].shape == (2, 32)
    assert AutoModelForImageClassification.from_pretrained("run").config.id2label == {0: "even", 1: "odd"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--initial_checkpoint=nowhere"], ["'nowhere'"]),
        (["--initial_checkpoint=text.jsonl"], ["'text.jsonl'"]),
        (["--initial_checkpoint=llama", "--hidden_size=16"], ["`hidden_size` follows from the source"]),
        (["--initial_checkpoint=bert"], ["'bert'", "its norms are after"]),
        (["--initial_checkpoint=dca", "--hidden_size=32"], ["`hidden_size` is 32", "'dca'", "has 16", "leave"]),
        (["--initial_checkpoint=dca", "--last_k=2"], ["`last_k` is 2", "'dca'", "has None", "leave"]),
        (["--initial_checkpoint=dca", "--baseline=standard"], ["'dca'", "'standard' cannot start from it"]),
        (["--initial_checkpoint=vision"], ["'dca_vision'", "AutoModelForImageClassification"]),
        (["--initial_checkpoint=trained_vision"], ["'dca_vision'", "'dca'"]),
        (["--initial_checkpoint=dca"], ["`tokenizer`", "'dca'"]),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(llama, capsys, arguments, words):
    AutoConfig.for_model("bert").save_pretrained("bert")
    DCAForCausalLM(DCAConfig(**SIZES)).save_pretrained("dca")
    AutoConfig.for_model("dca_vision", residual_scheme="standard").save_pretrained("vision")
    AutoConfig.for_model("dca_vision").save_pretrained("trained_vision")
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)
    assert not [word for word in words if word not in line], line


def test_fields_that_do_not_change_the_model_can_be_named(llama):
    DCAForCausalLM(DCAConfig(**SIZES)).save_pretrained("dca")
    fields = {"attention_dropout": 0.25, "residual_scheme": "dca"}
    config = initial_config(DCAForCausalLM, "dca", fields)
    assert config.attention_dropout == 0.25
    assert initial_model(DCAForCausalLM, config, "dca").config.attention_dropout == 0.25
    assert initial_config(DCAForCausalLM, "llama", fields).attention_dropout == 0.25
