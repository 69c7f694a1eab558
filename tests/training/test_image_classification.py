"""Image classifiers: a run from images to a folder that classifies them."""

import json

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_dca import DCAForImageClassification
from tests.training.tiny import IMAGE_RUN, assert_same_weights, call, image, write_images, write_room
from training import image_classification
from training.images import ImageDataArguments, load_images


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
    _, held_out, _ = load_images(ImageDataArguments(dataset="images"), 1, seed=1)
    model = DCAForImageClassification.from_pretrained(finished / "run").eval()
    # The processor scales 0 to 255 into -1 to 1.
    pixels = torch.stack([torch.tensor(each["image"].getdata()).reshape(1, 8, 8) / 127.5 - 1 for each in held_out])
    logits, labels = model(pixels).logits, torch.tensor(held_out["label"])
    figures = results(finished / "run")
    assert figures["eval_accuracy"] == (logits.argmax(-1) == labels).float().mean().item()
    assert figures["eval_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert figures["eval_accuracy"] == 1.0  # the classes are easily told apart


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
