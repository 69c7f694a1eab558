"""What the recipes of the paper say of optimizer and schedule, where a run says nothing (method.md, section 7)."""

import math

import pytest
import torch
from transformers import Trainer

from modeling_dca import DCAForCausalLM, DCAForImageClassification
from training.images.fields import ImageClassificationArguments, ImageDataArguments
from training.run.parsing import parse_run
from training.run.trainer import RunTrainer
from training.text.fields import CausalLMArguments, TextDataArguments


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def trainer_of(room, recipe, model_class, data_class, training_class, steps, **sizes):
    """The trainer of a run that names no more than its steps, with its optimizer and schedule."""
    (room / "recipe.yaml").write_text(f"training: {{max_steps: {steps}, report_to: none}}\n")
    run = parse_run(["recipe.yaml"], "command", "A test.", model_class, data_class, training_class)
    trainer = RunTrainer(model=model_class(model_class.config_class(**SIZES, **sizes)), args=run.training)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    return trainer


@pytest.fixture
def text(room):
    classes = (DCAForCausalLM, TextDataArguments, CausalLMArguments)
    return trainer_of(room, "text", *classes, steps=500_000, vocab_size=20)


@pytest.fixture
def image(room):
    classes = (DCAForImageClassification, ImageDataArguments, ImageClassificationArguments)
    return trainer_of(room, "image", *classes, steps=100_000, image_size=8, patch_size=4)


def learning_rate(trainer: Trainer, step: int) -> float:
    """The rate that the trainer's schedule gives after `step` steps."""
    (rate,) = {
        base * factor(step) for base, factor in zip(trainer.lr_scheduler.base_lrs, trainer.lr_scheduler.lr_lambdas)
    }
    return rate


@pytest.mark.parametrize("step", [1, 500, 1000, 4000, 100_000])
def test_learning_rate_of_the_text_recipe(text, step):
    expected = 0.0016 * min(step / 1000, math.sqrt(1000 / step))
    assert learning_rate(text, step) == pytest.approx(expected, rel=1e-6)


def test_schedule_is_what_the_optimizer_steps_with(text):
    rates = []
    for _ in range(4):
        rates.append(text.optimizer.param_groups[0]["lr"])
        text.optimizer.step()
        text.lr_scheduler.step()
    assert rates == pytest.approx([learning_rate(text, step) for step in range(4)])


def test_optimizer_of_the_text_recipe(text):
    assert isinstance(text.optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in text.optimizer.param_groups} == {(0.9, 0.98)}
    assert {group["weight_decay"] for group in text.optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize("part", ["text", "image"])
def test_what_weight_decay_pulls_towards_zero(part, request):
    trainer = request.getfixturevalue(part)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decayed, other = (
        {
            names[parameter]
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
            if decays(group)
        }
        for decays in (lambda group: group["weight_decay"] > 0, lambda group: group["weight_decay"] == 0)
    )
    assert not decayed & other and decayed | other == set(names.values())
    # Decay of delta, the deviation from the plain residual sum, pulls towards that sum.
    assert {name for name in names.values() if name.endswith((".delta", ".gate"))} <= decayed
    assert {name for name in names.values() if "norm" in name or name.endswith("bias")} == other
    assert {name for name in names.values() if name.endswith("proj.weight")} < decayed


def test_weight_decay_pulls_delta_towards_zero(text):
    delta = text.model.model.layers[1].residual.delta
    with torch.no_grad():
        delta.fill_(0.5)
    for parameter in text.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        text.optimizer.step()
        text.lr_scheduler.step()
    rates = [learning_rate(text, step) for step in range(3)]
    torch.testing.assert_close(delta, torch.full_like(delta, 0.5 * math.prod(1 - 0.1 * rate for rate in rates)))
    assert (delta < 0.5).all()


@pytest.mark.parametrize("step", [1, 5000, 10_000, 55_000, 100_000])
def test_learning_rate_of_the_image_recipe(image, step):
    progress = max(0, (step - 10_000) / 90_000)
    expected = 0.001 * min(step / 10_000, (1 + math.cos(math.pi * progress)) / 2)
    assert learning_rate(image, step) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_optimizer_of_the_image_recipe(image):
    assert isinstance(image.optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in image.optimizer.param_groups} == {0.0001, 0.0}
    assert {group["betas"] for group in image.optimizer.param_groups} == {(0.9, 0.999)}
    assert image.args.max_grad_norm == 1.0
    assert image.args.lr_scheduler_type == "cosine" and image.args.warmup_steps == 10_000
