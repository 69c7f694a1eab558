"""The images of a run: read from every kind of source, split, and refused where they do not fit."""

import math

import pytest
import torch
from datasets import Dataset

from tests.training.tiny import IMAGE_RUN, image, refusal, write_images
from training import image_classification
from training.images import ImageDataArguments, load_images


pytestmark = pytest.mark.usefixtures("offline")


def images(dataset, num_channels=1, seed=0, **options):
    return load_images(ImageDataArguments(dataset=str(dataset), **options), num_channels, seed)


def write_parquet(file, labels, pictures=None):
    pictures = pictures or [image(number) for number in range(len(labels))]
    Dataset.from_dict({"picture": pictures, "class": labels}).to_parquet(file)


COLUMNS = {"image_column": "picture", "label_column": "class"}


def test_digits():
    train, held_out, names = images("digits")
    assert len(train) + len(held_out) == 1797 and len(held_out) == math.ceil(0.2 * 1797)
    assert names == [str(digit) for digit in range(10)]
    counts = torch.bincount(torch.tensor(train["label"])), torch.bincount(torch.tensor(held_out["label"]))
    # The same share of each class, but for the one image that cannot be cut.
    assert ((counts[1] - 0.2 * (counts[0] + counts[1])).abs() <= 1).all()
    assert images("digits", seed=1)[1]["label"][:] == held_out["label"][:]
    pixels = [{each["image"].tobytes() for each in part} for part in (train, held_out)]
    assert len(pixels[0] | pixels[1]) == 1797 and not pixels[0] & pixels[1]
    example = train[0]["image"]
    assert example.size == (8, 8) and example.mode == "L" and example.getextrema() == (0, 255)


def test_image_folder(tmp_path):
    write_images(tmp_path / "images", count=40, classes=("cat", "dog", "owl", "rat"))
    train, held_out, names = images(tmp_path / "images", eval_fraction=0.2)
    assert names == ["cat", "dog", "owl", "rat"] and len(train) == 32
    assert sorted(held_out["label"]) == [0, 0, 1, 1, 2, 2, 3, 3]  # of each class alike
    assert train.column_names == ["image", "label"]
    pixels = [{each["image"].tobytes() for each in part} for part in (train, held_out)]
    assert len(pixels[0] | pixels[1]) == 40


def test_image_folder_with_folders_for_the_splits(tmp_path):
    write_images(tmp_path / "images" / "train", count=10)
    write_images(tmp_path / "images" / "test", count=4)
    train, held_out, names = images(tmp_path / "images", eval_split="test")
    assert (len(train), len(held_out), names) == (10, 4, ["even", "odd"])


@pytest.mark.parametrize("num_labels", [None, 5])
def test_images_in_parquet(tmp_path, num_labels):
    write_parquet(tmp_path / "images.parquet", [0, 2, 1, 2] * 5)
    train, held_out, names = images(tmp_path / "images.parquet", num_labels=num_labels, **COLUMNS)
    assert names == [str(number) for number in range(num_labels or 3)]
    assert train.column_names == ["image", "label"] and len(train) == 16 and len(held_out) == 4
    assert train[0]["image"].size == (8, 8)


# Refusals


def bytes_of(file, content):
    file.write_bytes(content)


def write_broken(folder):
    write_images(folder)
    (folder / "odd" / "3.png").write_bytes(b"no image")


def write_cut(folder):
    write_images(folder)
    noise = torch.randint(256, (64, 64), generator=torch.manual_seed(0), dtype=torch.uint8)
    file = folder / "odd" / "3.bmp"
    noisy = image(3).resize((64, 64))
    noisy.putdata(noise.flatten().tolist())
    noisy.save(file)
    file.write_bytes(file.read_bytes()[:2000])


def write_other_classes(folder):
    write_images(folder)
    write_images(folder.parent / "other", classes=("odd", "zero"))


WRONG_IMAGES = [
    (lambda path: None, "nowhere", [], ["'nowhere'", "Hub"]),
    (lambda path: path.mkdir(), "images", [], ["'images'"]),
    (lambda path: write_images(path, channels=3), "images", [], ["Image 0", "'images'", "3 channels", "`num_channels` is 1"]),
    (lambda path: write_images(path), "images", ["--num_channels=3"], ["Image 0", "1 channels", "`num_channels` is 3"]),
    (write_broken, "images", [], ["odd/3.png", "cannot be read"]),
    (write_cut, "images", [], ["odd/3.bmp", "cannot be read"]),
    (lambda path: write_images(path, classes=("all",)), "images", [], ["'images'", "no column 'label'"]),
    (lambda path: write_images(path), "images", ["--eval_fraction=0.01"], ["20 examples of 'images'", "0.01"]),
    (write_other_classes, "images", ["--eval_dataset=other"], ["classes odd, zero", "even, odd", "the same"]),
    (lambda path: bytes_of(path, b"this is no parquet"), "a.parquet", [], ["'a.parquet'", "Parquet"]),
    (lambda path: bytes_of(path, b"0,1"), "a.csv", [], ["'a.csv'", ".parquet"]),
    (lambda path: write_parquet(path, [0, 1] * 9), "a.parquet", ["--image_column=image"], ["'a.parquet'", "'image'", "picture, class"]),
    (lambda path: write_parquet(path, [0, 1] * 9), "a.parquet", ["--label_column=label"], ["'a.parquet'", "'label'", "picture, class"]),
    (lambda path: write_parquet(path, [0, 1, 2] * 9), "a.parquet", ["--num_labels=2"], ["The label", "'a.parquet' is 2", "0 to 1"]),
    (lambda path: write_parquet(path, [0, 1, -1] * 9), "a.parquet", [], ["The label", "'a.parquet' is -1", "0 to 1"]),
    (lambda path: write_parquet(path, [0, 1, None] * 9), "a.parquet", [], ["The label", "'a.parquet' is None", "0 to 1"]),
    (lambda path: write_parquet(path, [0.5, 1.0] * 9), "a.parquet", [], ["'class' of 'a.parquet'", "integers from 0"]),
    (lambda path: write_parquet(path, ["a", "b"] * 9), "a.parquet", [], ["'class' of 'a.parquet'", "integers from 0"]),
    (lambda path: write_parquet(path, [0, 1] * 9), "a.parquet", ["--num_labels=0"], ["`num_labels` is 0", "at least 1"]),
    (lambda path: write_parquet(path, [0, 1] * 9, [1] * 18), "a.parquet", [], ["'picture' of 'a.parquet'", "no images"]),
    (lambda path: write_parquet(path, [0, 1] * 9, ["x.png"] * 18), "a.parquet", [], ["Image 0", "x.png"]),
    (lambda path: write_parquet(path, [0, 1] * 9, [image(1), None] * 9), "a.parquet", [], ["Image", "'a.parquet'", "cannot be read"]),
    (lambda path: None, "digits", ["--num_channels=3"], ["Image 0 of 'digits'", "1 channels"]),
    (lambda path: None, "digits", ["--eval_fraction=0.001"], ["1797 examples of 'digits'", "0.001", "10"]),
    (lambda path: None, "digits", ["--eval_dataset=x"], ["`eval_dataset` is 'x'", "'digits'", "leave it out"]),
]  # fmt: skip


@pytest.mark.parametrize(("write", "name", "options", "words"), WRONG_IMAGES)
def test_images_that_cannot_be_used_are_refused(room, capsys, write, name, options, words):
    write(room / name)
    if name.endswith(".parquet"):
        columns = {**COLUMNS, **dict(option[2:].split("=") for option in options if "_column" in option)}
        options = [*(f"--{column}={value}" for column, value in columns.items()), *options]
    line = refusal(capsys, image_classification.main, IMAGE_RUN, f"--dataset={name}", *options)
    assert not [word for word in words if word not in line], line
