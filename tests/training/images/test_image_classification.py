"""Image classifiers: a run from images to a folder that classifies them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from modeling_dca import DCAForImageClassification
from modeling_dca.image_processing_dca import DCAImageProcessor
from tests.training.tiny import (
    IMAGE_RUN,
    assert_same_weights,
    call,
    image,
    need_image_processors,
    write_images,
    write_room,
)
from training import image_classification
from training.images import task
from training.images.fields import ImageDataArguments
from training.images.reading import ImageExamples, ImageFiles, load_images
from training.images.task import image_processor
from training.run.trainer import RunTrainer


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The room of a finished run in `run`, on two classes that differ in brightness."""
    room = tmp_path_factory.mktemp("images")
    write_room(room)
    write_images(room / "images", count=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        arguments = ("--max_steps=40", "--save_steps=20", "--baseline=standard", "--report_to=tensorboard")
        call(image_classification.main, IMAGE_RUN, "--output_dir=run", *arguments)
    return room


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_files_of_a_finished_run(finished):
    run = finished / "run"
    for file in (
        *("model.safetensors", "config.json", "modeling_dca.py", "modeling_dca_vision.py", "configuration_dca.py"),
        *("preprocessor_config.json", "all_results.json", "README.md", "loss_curve.png", "depth_weights.png"),
        *("run.yaml", "trainer_state.json", "standard/model.safetensors", "standard/all_results.json"),
    ):
        assert (run / file).stat().st_size > 0, file
    assert list(run.glob("runs/*/events.out.tfevents.*")), "no TensorBoard events"
    assert {"eval_accuracy", "eval_loss", "train_loss"} <= results(run).keys()


@torch.no_grad()
def test_figures_follow_from_the_model_and_the_images(finished, monkeypatch):
    monkeypatch.chdir(finished)
    _, held_out, _ = load_images(ImageDataArguments(dataset="images"), 1)
    model = DCAForImageClassification.from_pretrained(finished / "run").eval()
    # The processor scales 0 to 255 into -1 to 1.
    pixels = torch.stack([torch.tensor(each["image"].getdata()).reshape(1, 8, 8) / 127.5 - 1 for each in held_out])
    logits, labels = model(pixels).logits, torch.tensor(held_out["label"])
    figures = results(finished / "run")
    assert figures["eval_accuracy"] == (logits.argmax(-1) == labels).float().mean().item()
    assert figures["eval_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert figures["eval_accuracy"] == 1.0  # the classes are easily told apart


WITHOUT_THE_PACKAGE = """
import sys
from transformers import pipeline

sys.modules["modeling_dca"] = None
classify = pipeline("image-classification", sys.argv[1], trust_remote_code=True)
print("RESULT", [each["score"] for each in sorted(classify(sys.argv[2]), key=lambda each: each["label"])])
"""


def test_pipeline_of_grey_images(finished, tmp_path):
    """A pipeline makes every image RGB; so are most photographs."""
    need_image_processors()
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    picture.save(tmp_path / "picture.png")
    pixels = torch.tensor(np.asarray(picture.convert("L")) / 127.5 - 1, dtype=torch.float32)
    model = DCAForImageClassification.from_pretrained(finished / "run").eval()
    with torch.no_grad():
        expected = model(pixels[None, None]).logits.softmax(-1)[0]
    arguments = (str(finished / "run"), str(tmp_path / "picture.png"))
    classified = pipeline("image-classification", arguments[0])(arguments[1])
    found = [each["score"] for each in sorted(classified, key=lambda each: each["label"])]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    completed = subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    found = json.loads(completed.stdout.partition("RESULT")[2])
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_processor_of_grey_images_takes_what_others_take():
    processor = DCAImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.5])
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L")) / 127.5 - 1
    forms = {
        "picture": Image.fromarray(colours),
        "with an alpha channel": Image.fromarray(colours).convert("RGBA"),
        "grey": Image.fromarray(colours).convert("L"),
        "array": colours,
        "channels first": colours.transpose(2, 0, 1),
        "tensor": torch.from_numpy(colours).permute(2, 0, 1),
    }
    for name, form in forms.items():
        found = processor(form, return_tensors="np")["pixel_values"]
        assert found.shape == (1, 1, 8, 8), name
        assert np.abs(found[0, 0] - expected).max() <= 1.01 / 127.5, name  # Pillow rounds to whole greys
    colourful = DCAImageProcessor(do_resize=False)(Image.fromarray(colours), return_tensors="np")["pixel_values"]
    assert colourful.shape == (1, 3, 8, 8)


def test_run_classifies_where_it_is_loaded(finished):
    model = AutoModelForImageClassification.from_pretrained(finished / "run", trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(finished / "run")
    assert model.config.id2label == {0: "even", 1: "odd"} and model.config.label2id == {"even": 0, "odd": 1}
    for value in (2, 3):
        inputs = processor(image(value).resize((40, 30)), return_tensors="pt")  # of another size, too
        assert inputs["pixel_values"].shape == (1, 1, 8, 8)
        assert model.config.id2label[model(**inputs).logits.argmax(-1).item()] == ("even", "odd")[value % 2]


def test_record_runs_again_to_the_same_weights(finished, monkeypatch):
    monkeypatch.chdir(finished)
    call(image_classification.main, "run/run.yaml", "--output_dir=again")
    assert_same_weights(finished / "run", finished / "again")


@pytest.mark.parametrize(("channels", "size"), [(3, [8, 8]), (4, [8, 16])])
def test_images_of_other_shapes(room, channels, size):
    write_images(room / "images", channels=channels)
    shape = (f"--num_channels={channels}", f"--image_size={size}")
    call(image_classification.main, IMAGE_RUN, "--output_dir=run", "--max_steps=1", *shape)
    processor = AutoImageProcessor.from_pretrained(room / "run")
    mode = {3: "RGB", 4: "RGBA"}[channels]
    pixels = processor(Image.new(mode, (9, 9)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, channels, *size)


def test_digits(room):
    call(image_classification.main, IMAGE_RUN, "--dataset=digits", "--output_dir=run", "--max_steps=1")
    config = json.loads((room / "run" / "config.json").read_text())
    assert list(config["label2id"]) == [str(digit) for digit in range(10)]
    assert not {"vocab_size", "use_cache", "no_rope_layers"} & config.keys()
    assert (
        "1,437 images of 10 classes. Evaluated on 360 images that were held out"
        in (room / "run" / "README.md").read_text()
    )


def test_run_of_epochs_that_is_finished_is_resumed_to_the_same_weights(room):
    write_images(room / "images")
    arguments = (IMAGE_RUN, "--max_steps=-1", "--num_train_epochs=2", "--save_strategy=epoch")
    call(image_classification.main, *arguments, "--output_dir=run")
    before = (room / "run" / "model.safetensors").read_bytes(), results(room / "run")
    call(image_classification.main, *arguments, "--output_dir=run", "--resume_from_checkpoint")
    assert (room / "run" / "model.safetensors").read_bytes() == before[0]
    assert results(room / "run")["train_loss"] == before[1]["train_loss"]


# The recipe for ImageNet

RECIPE = (
    *("--random_crop", "--horizontal_flip", "--rand_augment_operations=2", "--mixup_alpha=0.2", "--num_channels=3"),
    *("--eval_resize=10", "--max_steps=10", "--gradient_accumulation_steps=2", "--per_device_train_batch_size=2"),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The room of a run with the recipe for ImageNet, on images of several sizes and kinds, one of them broken."""
    room = tmp_path_factory.mktemp("recipe")
    write_room(room)
    for part, count in (("images", 16), ("held_out", 12)):
        for number in range(count):
            folder = room / part / ("even", "odd")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).integers(256, size=(9 + number, 20, 3), dtype=np.uint8)
            picture = Image.fromarray(values).convert(("RGB", "RGB", "L", "RGBA")[number % 4])
            picture.save(folder / f"{number:02}.{'jpg' if number % 4 == 1 else 'png'}")
    (room / "images" / "odd" / "07.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        call(image_classification.main, IMAGE_RUN, "--eval_dataset=held_out", "--output_dir=run", *RECIPE)
    return room


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_run_that_was_interrupted_ends_alike(recipe, monkeypatch, workers):
    """In the middle of the second epoch of four steps, whatever the number of worker processes."""
    monkeypatch.chdir(recipe)
    folder = f"resumed-{workers}"
    arguments = (IMAGE_RUN, "--eval_dataset=held_out", f"--output_dir={folder}", *RECIPE)
    training_step = RunTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunTrainer, "training_step", interrupted)
        call(image_classification.main, *arguments)
    assert (recipe / folder / "checkpoint-6").exists() and not (recipe / folder / "model.safetensors").exists()
    call(image_classification.main, *arguments, "--resume_from_checkpoint", f"--dataloader_num_workers={workers}")
    assert_same_weights(recipe / "run", recipe / folder)
    assert results(recipe / "run")["eval_loss"] == results(recipe / folder)["eval_loss"]


def test_images_that_cannot_be_read_are_counted_in_the_results(recipe):
    assert results(recipe / "run")["train_unreadable_images"] == 1
    assert results(recipe / "run")["eval_unreadable_images"] == 0
    history = json.loads((recipe / "run" / "trainer_state.json").read_text())["log_history"]
    # All of them are met in the first epoch, of four steps.
    assert [entry["unreadable_images"] for entry in history if entry["step"] >= 4 and "loss" in entry] == [1] * 7


@torch.no_grad()
def test_evaluation_is_not_augmented_and_loaded_processor_gives_its_pixels(recipe, monkeypatch):
    monkeypatch.chdir(recipe)
    model = AutoModelForImageClassification.from_pretrained("run", trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained("run")
    _, held_out, names = load_images(ImageDataArguments(dataset="images", eval_dataset="held_out"), 3)
    pixels = torch.cat(
        [processor(Image.open(file), return_tensors="pt")["pixel_values"] for file in files_of(held_out)]
    )
    logits, labels = model(pixels).logits, torch.tensor(held_out["label"][:])
    figures = results(recipe / "run")
    assert figures["eval_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert figures["eval_accuracy"] == (logits.argmax(-1) == labels).float().mean().item()
    examples = ImageExamples(ImageFiles(held_out, 3, "held_out"), image_processor(model.config, 10), (8, 8))
    assert torch.equal(torch.stack([example["pixel_values"] for example in examples]), pixels)


def files_of(data):
    return [row["path"] for row in data.cast_column("image", ImageFeature(decode=False))["image"][:]]


def test_loss_of_a_mixed_step_is_that_of_its_images(recipe, monkeypatch):
    """The first step of the run: two batches of two images, weighed alike."""
    monkeypatch.chdir(recipe)
    seen = []
    training_step = RunTrainer.training_step

    def recorded(self, model, inputs, *args, **kwargs):
        inputs = {name: values.clone() for name, values in inputs.items()}
        with torch.no_grad():
            log_probabilities = model(inputs["pixel_values"]).logits.log_softmax(dim=-1)
        seen.append((inputs["labels"], -(inputs["labels"] * log_probabilities).sum(dim=-1)))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", recorded)
    arguments = ("--max_steps=1", "--warmup_steps=0", "--output_dir=one")
    call(image_classification.main, IMAGE_RUN, "--eval_dataset=held_out", *RECIPE, *arguments)
    labels, losses = (torch.cat(each) for each in zip(*seen))
    assert labels.shape == (4, 2) and torch.allclose(labels.sum(dim=-1), torch.ones(4))
    assert ((labels > 0) & (labels < 1)).any()
    assert results(recipe / "one")["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_augmentation_takes_the_seed_of_the_run_and_is_for_training_alone(recipe, monkeypatch):
    monkeypatch.chdir(recipe)
    options = {}
    monkeypatch.setattr(task, "run_models", lambda *args, **trainer: options.update(trainer))
    call(image_classification.main, IMAGE_RUN, "--eval_dataset=held_out", *RECIPE, "--seed=5", "--output_dir=seed")
    assert options["train_dataset"].seed == 5 and options["train_dataset"].is_random
    assert not options["eval_dataset"].is_random
