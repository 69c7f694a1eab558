"""Tiny runs: data, configurations, and ways to run the training commands within the test's own process."""

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from training.run.trainer import RunTrainer


def need_image_processors() -> None:
    """Skips where the installed transformers has `AutoImageProcessor` with torchvision alone, as 5.17 has it."""
    try:
        AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("AutoImageProcessor of this transformers needs torchvision")


TEXT_RUN, IMAGE_RUN = "text.yaml", "image.yaml"

# Six steps, with a checkpoint after the second and the fourth.
TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
    "seed": 1,
}
TEXT = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
    "data": {"dataset": "text.jsonl", "eval_dataset": "held_out.jsonl", "block_size": 16},
    "training": TRAINING,
}
IMAGES = {
    "model": {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "data": {"dataset": "images"},
    "training": TRAINING,
}


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of many lengths, in which there is something to learn, not all of it ASCII."""
    draw = random.Random(seed)
    words = ["deep", "cross", "attention", "größe", "naïve", "日本", "🙂", "layer", "sum\n"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(count)]


def write_jsonl(file: Path, values: list, column: str = "text") -> None:
    file.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")


def write_room(folder: Path) -> None:
    write_jsonl(folder / "text.jsonl", documents(60))
    write_jsonl(folder / "held_out.jsonl", documents(7, seed=1))
    (folder / TEXT_RUN).write_text(yaml.safe_dump(TEXT), encoding="utf-8")
    (folder / IMAGE_RUN).write_text(yaml.safe_dump(IMAGES), encoding="utf-8")


def image(value: int, channels: int = 1) -> Image.Image:
    """8 x 8 pixels; the class of an odd `value` is brighter than that of an even one."""
    pixels = np.full((8, 8, channels), value % 50 + 150 * (value % 2), np.uint8)
    return Image.fromarray(pixels.squeeze())


def write_images(folder: Path, count: int = 20, classes: tuple[str, ...] = ("even", "odd"), channels: int = 1) -> None:
    """A folder of images for each class."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    for value in range(count):
        image(value, channels).save(folder / classes[value % len(classes)] / f"{value}.png")


def call(main, *arguments) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()


def refusal(capsys, main, *arguments) -> str:
    """The one line with which a command refuses to start; whatever was there before, still is, and nothing else."""

    def no_training(*args, **kwargs):
        pytest.fail("The training was started.")

    before = snapshot(Path.cwd())
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "train", no_training)
        line = failure(capsys, main, *arguments)
    assert snapshot(Path.cwd()) == before
    return line


def failure(capsys, main, *arguments) -> str:
    """The one line with which a command ends that cannot go on."""
    with pytest.raises(SystemExit) as exit:
        call(main, *arguments)
    printed = capsys.readouterr().err
    assert exit.value.code == 2, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, to the byte."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    """Equal to the last bit."""
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class Step(NamedTuple):
    """A batch that a model was trained on."""

    scheme: str
    number: int
    input_ids: list
    loss: float


def record_training(patch: pytest.MonkeyPatch, interrupt: tuple[str, int] | None = None) -> list[Step]:
    """Record all steps from now on, and break off as Ctrl-C does in the step of the scheme that `interrupt` names."""
    steps = []
    training_step = RunTrainer.training_step

    def recorded(self, model, inputs, *args, **kwargs):
        position = (model.config.residual_scheme, self.state.global_step + 1)
        if position == interrupt:
            raise KeyboardInterrupt
        loss = training_step(self, model, inputs, *args, **kwargs)
        steps.append(Step(*position, inputs["input_ids"].tolist(), loss.item()))
        return loss

    patch.setattr(RunTrainer, "training_step", recorded)
    return steps
