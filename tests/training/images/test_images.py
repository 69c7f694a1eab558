"""The images of a run: read from every kind of source, converted, augmented, and refused where they do not fit."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

import training.data.splits
from modeling_dca import DCAVisionConfig
from tests.training.tiny import IMAGE_RUN, call, image, refusal, write_images
from training import image_classification
from training.benchmarks import images as benchmark
from training.images import reading as images_module
from training.images.augmentation import random_crop_box
from training.images.fields import ImageDataArguments
from training.images.reading import (
    ImageExamples,
    ImageFiles,
    ImagesCallback,
    UnreadableImages,
    collate,
    load_images,
    read_image,
)
from training.images.task import image_processor
from training.support.errors import UserError


pytestmark = pytest.mark.usefixtures("offline")


def images(dataset, num_channels=1, **options):
    return load_images(ImageDataArguments(dataset=str(dataset), **options), num_channels)


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
    assert images("digits", split_seed=1)[1]["label"][:] == held_out["label"][:]
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


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "freight_train", "passenger_train"),
        ("eval", "test", "train", "val"),  # with images in them, these are classes, too
        ("0train", "dev-kit", "evaluation board", "test.a"),
        ("__a__", "c[1]", "d*", "x?y"),
    ],
)
def test_classes_are_folders_whatever_words_are_in_their_names(tmp_path, classes):
    root = tmp_path / "some_test [2]" / "train"
    write_images(root, count=48, classes=classes)
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        file.rename(file.with_stem(("train_{}", "test-{}", "val {}", "{}.dev", "[{}]")[number % 5].format(file.stem)))
    train, held_out, names = images(root, eval_fraction=0.25)
    assert names == sorted(classes)
    assert sorted(train["label"][:] + held_out["label"][:]) == sorted(list(range(4)) * 12)
    for part in (train, held_out):
        assert {Path(file["path"]).parent.name for file in files_of(part)} == set(classes)
        assert all(
            Path(file["path"]).parent.name == names[label] for file, label in zip(files_of(part), part["label"])
        )


def files_of(part):
    return part.cast_column("image", ImageFeature(decode=False))["image"]


def test_splits_are_all_folders_at_the_top_or_none(tmp_path):
    for split, count in (("Training", 10), ("dev", 6), ("test", 4)):
        write_images(tmp_path / "images" / split, count=count, classes=("test", "train"))
    for split, count in (("validation", 6), ("test", 4)):
        train, held_out, names = images(tmp_path / "images", eval_split=split)
        assert (len(train), len(held_out), names) == (10, count, ["test", "train"])
    with pytest.raises(UserError, match="has the splits .*: give the folder of one of them"):
        images(tmp_path / "images" / "test", eval_dataset=str(tmp_path / "images"))
    # With another folder next to them, there would be two folders of each class.
    write_images(tmp_path / "images" / "more", count=4, classes=("test", "train"))
    with pytest.raises(
        UserError, match="Training/test' and .*/dev/test' of .* cannot be told apart as classes: .*train, "
    ):
        images(tmp_path / "images")


def test_folders_that_cannot_be_told_apart_as_classes(tmp_path):
    write_images(tmp_path / "images", count=10, classes=("cat", "dog"))
    write_images(tmp_path / "images" / "cat", count=10, classes=("black", "white"))
    with pytest.raises(UserError, match="images/cat' and .*images/cat/black' of .* cannot be told apart"):
        images(tmp_path / "images")
    image(1).save(tmp_path / "images" / "dog.png")
    with pytest.raises(UserError, match="images' and .*images/cat' of .* cannot be told apart"):
        images(tmp_path / "images")


def test_classes_that_are_not_among_those_held_out_keep_their_numbers(tmp_path):
    write_images(tmp_path / "images" / "train", count=12, classes=("a", "b", "c"))
    for classes in (("b", "c"), ("c",)):
        write_images(tmp_path / "-".join(classes), count=4, classes=classes)
        train, held_out, names = images(tmp_path / "images", eval_dataset=str(tmp_path / "-".join(classes)))
        assert len(train) == 12 and names == held_out.features["label"].names == ["a", "b", "c"]
        assert {names[label] for label in held_out["label"]} == set(classes)
    write_images(tmp_path / "images" / "val", count=4, classes=("c", "d"))
    with pytest.raises(UserError, match="held-out data has the classes c, d, but the training data has a, b, c"):
        images(tmp_path / "images", eval_split="validation")


@pytest.mark.parametrize("column", ["picture", "class"])
def test_only_images_and_classes_are_read_of_parquet(tmp_path, column):
    (tmp_path / "data").mkdir()
    for number, other in enumerate(([1] * 10, ["x"] * 10)):
        rows = {"picture": [image(value) for value in range(10)], "class": [0, 1] * 5, "other": other}
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"train[{number}].parquet")
    train, held_out, _ = images(tmp_path / "data", **COLUMNS)
    assert len(train) + len(held_out) == 20
    rows.pop(column)
    Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "z.parquet")
    with pytest.raises(UserError, match=rf"z.parquet' has no column '{column}'; it has .*other"):
        images(tmp_path / "data", **COLUMNS)


def test_images_held_out_are_loaded_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []
    rows = [{"bytes": encoded(noise(number), "JPEG"), "path": f"{number}.jpg"} for number in range(4)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "other": Value("string")})
    data = Dataset.from_dict({"image": rows, "label": [0, 1] * 2, "other": ["x"] * 4}, features=features)

    def load_dataset(*args, split, streaming, **kwargs):
        asked.append((split, streaming))
        return data.to_iterable_dataset()

    monkeypatch.setattr(training.data.splits, "load_dataset", load_dataset)
    train, held_out, names = load_images(ImageDataArguments("user/images", eval_split="test"), 3, held_out_only=True)
    assert train is None and asked == [("test", True)] and names == ["a", "b"]
    assert held_out["label"][:] == [0, 1] * 2 and [file["bytes"] for file in files_of(held_out)] == [
        row["bytes"] for row in rows
    ]


@pytest.mark.parametrize("num_labels", [None, 5])
def test_images_in_parquet(tmp_path, num_labels):
    write_parquet(tmp_path / "images.parquet", [0, 2, 1, 2] * 5)
    train, held_out, names = images(tmp_path / "images.parquet", num_labels=num_labels, **COLUMNS)
    assert names == [str(number) for number in range(num_labels or 3)]
    assert train.column_names == ["image", "label"] and len(train) == 16 and len(held_out) == 4
    assert train[0]["image"].size == (8, 8)


def test_layouts_of_imagenet(tmp_path):
    """The Hub's copy is parquet with the bytes of the files; the original has folders for splits and classes."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["tench", "goldfish"])})
    for split, count in (("train", 6), ("validation", 4)):
        rows = [{"bytes": encoded(noise(number), "JPEG"), "path": f"n0{number}.JPEG"} for number in range(count)]
        part = Dataset.from_dict({"image": rows, "label": [0, 1] * (count // 2)}, features=features)
        part.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        for number, row in enumerate(rows):
            folder = tmp_path / "folders" / {"validation": "val"}.get(split, split) / f"n{number % 2:08}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.JPEG").write_bytes(row["bytes"])
    files = {"dataset": tmp_path / "train-*.parquet", "eval_dataset": str(tmp_path / "validation-*.parquet")}
    train, held_out, names = images(**files, num_channels=3)
    assert (len(train), len(held_out), names) == (6, 4, ["tench", "goldfish"])
    assert train[5]["image"].size == (50, 40) and train["label"][:] == [0, 1] * 3
    train, held_out, names = images(tmp_path / "folders", num_channels=3, eval_split="validation")
    assert (len(train), len(held_out), names) == (6, 4, ["n00000000", "n00000001"])


def test_labels_are_read_without_the_images(tmp_path, monkeypatch):
    write_images(tmp_path / "images", count=100)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or open_image(*args, **kwargs))
    images(tmp_path / "images")
    assert len(opened) == 32 + 20  # the first ones to train on, and all held out


# Reading one image


def noise(seed, size=(50, 40), mode="RGB") -> Image.Image:
    """Smooth, so that it survives JPEG, and different everywhere."""
    values = np.random.default_rng(seed).integers(256, size=(5, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def read(content: bytes, num_channels: int = 3, **options):
    return read_image({"bytes": content, "path": None}, num_channels, **options)


def transparent() -> Image.Image:
    picture = noise(0, mode="RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


STORED = {
    "RGB": encoded(noise(0)),
    "JPEG": encoded(noise(0), "JPEG"),
    "L": encoded(noise(0, mode="L")),
    "1": encoded(noise(0, mode="1")),
    "P": encoded(noise(0).quantize(16)),
    "P with a transparent color": encoded(noise(0).quantize(16), transparency=3),
    "LA": encoded(noise(0, mode="LA")),
    "RGBA": encoded(transparent()),
    "CMYK": encoded(noise(0, mode="CMYK"), "JPEG"),
    "GIF": encoded(noise(0), "GIF"),
    "WebP": encoded(noise(0), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", STORED)
def test_images_of_all_kinds_become_what_the_processor_makes_of_them(name):
    picture = Image.open(io.BytesIO(STORED[name]))
    processor = ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=True)
    expected = np.asarray(processor(picture)["pixel_values"][0])
    got = read(STORED[name])
    assert got.mode == "RGB" and (np.asarray(got).transpose(2, 0, 1) == expected).all()
    grey = read(STORED[name], 1)
    assert grey.mode == "L"
    assert np.abs(np.asarray(grey).astype(int) - np.asarray(got.convert("L"))).max() <= 1


def test_upper_bits_of_16_remain():
    values = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    for num_channels in (1, 3):
        got = np.asarray(read(encoded(Image.fromarray(values)), num_channels)).reshape(5, -1)
        assert got.tolist() == [[value] * num_channels for value in (0, 0, 1, 127, 255)]


def test_other_numbers_of_channels_must_match():
    assert read(STORED["RGBA"], 4).mode == "RGBA" and read(STORED["LA"], 2).mode == "LA"
    with pytest.raises(ValueError, match=r"3 channels \(RGB\), but `num_channels` is 4"):
        read(STORED["RGB"], 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(0, (400, 240)), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(read(content)), np.asarray(upright))
    # So is a part of them, also where it is decoded at a smaller size.
    box = random_crop_box(*upright.size, np.random.default_rng(1))
    part = read(content, size=(32, 24), generator=np.random.default_rng(1))
    expected = upright.resize((24, 32), Image.Resampling.BILINEAR, box=box)
    assert part.size == (24, 32)
    assert np.abs(np.asarray(part).astype(int) - np.asarray(expected)).mean() < 3


def test_jpeg_files_are_decoded_no_larger_than_the_part_needs(monkeypatch):
    content, decoded = encoded(noise(0, (1000, 800)), "JPEG"), []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args, **kwargs: decoded.append(self.size) or resize(self, *args, **kwargs)
    )
    for seed in range(30):
        left, upper, right, lower = random_crop_box(1000, 800, np.random.default_rng(seed))
        read(content, size=(50, 50), generator=np.random.default_rng(seed))
        (size,), shrink = decoded, min(right - left, lower - upper) / 50
        decoded.clear()
        factor = 1000 / size[0]
        assert factor <= shrink and (factor == 8 or 2 * factor > shrink * 0.9), (factor, shrink)


# Images that cannot be read


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def bomb() -> bytes:
    """A file that says it holds more pixels than Pillow accepts."""
    content = bytearray(encoded(noise(0)))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    return bytes(content)


def bad_chunk() -> bytes:
    content = bytearray(encoded(noise(0)))
    content[content.index(b"IDAT") + 20] ^= 0xFF
    return bytes(content)


BROKEN = {
    "cut JPEG": cut(STORED["JPEG"]),
    "cut PNG": cut(STORED["RGB"]),
    "no image": b"<html>404</html>",
    "empty": b"",
    "bad chunk": bad_chunk(),
    "bomb": bomb(),
    "no file": None,
}
RECIPE = {"random_crop": True, "horizontal_flip": True, "rand_augment_operations": 2, "mixup_alpha": 0.2}


def data_of(contents: list) -> Dataset:
    rows = [{"bytes": content, "path": f"{number}.jpg"} for number, content in enumerate(contents)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"image": rows, "label": [number % 3 for number in range(len(rows))]}, features=features)


def examples_of(contents: list, size=16, seed=0, **augmentation) -> ImageExamples:
    config = DCAVisionConfig(image_size=size, patch_size=4)
    options = ImageDataArguments(**augmentation)
    files = ImageFiles(data_of(contents), 3, "pictures")
    return ImageExamples(files, image_processor(config, None), (size, size), options, seed)


def pictures(count: int) -> list[bytes]:
    return [encoded(noise(number), "JPEG") for number in range(count)]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("recipe", [{}, RECIPE])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_next_image_takes_the_place_of_one_that_cannot_be_read(kind, recipe):
    contents = pictures(30)
    contents[7] = contents[29] = BROKEN[kind]
    examples = examples_of(contents)
    got = examples.__getitems__([6, 7, 8, 29, 0])
    assert [example["label"] for example in got] == [0, 8 % 3, 8 % 3, 0, 0]
    assert torch.equal(got[1]["pixel_values"], got[2]["pixel_values"])
    assert torch.equal(got[3]["pixel_values"], got[4]["pixel_values"])  # the one after the last is the first
    augmented = examples_of(contents, **recipe)
    assert len({augmented[7]["pixel_values"].numpy().tobytes() for _ in range(3)}) == 1
    # They are counted once, however often they are met, and not opened again.
    assert examples.files.unreadable(torch.device("cpu")) == [7, 29]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_module, "read_image", lambda file, *args: file["path"])
        assert examples.files.read([7])[0] == ["8.jpg"]


def test_what_is_drawn_does_not_depend_on_which_images_are_known_to_be_broken():
    contents = [encoded(noise(number, (300, 200)), "JPEG", quality=95) for number in range(30)]
    contents[7] = contents[7][: len(contents[7]) * 9 // 10]  # its size can be read, and a part of it be drawn
    examples = examples_of(contents, **RECIPE)
    first = examples.__getitems__([7])
    assert examples.files.unreadable(torch.device("cpu")) == [7]
    assert same(first, examples.__getitems__([7]))


def test_images_that_worker_processes_could_not_read_are_known():
    contents = pictures(60)
    contents[3] = contents[41] = BROKEN["no image"]
    examples = examples_of(contents)
    loader = DataLoader(examples, 4, num_workers=2, collate_fn=lambda batch: collate(batch, 3))
    assert sum(len(batch["labels"]) for batch in loader) == 60
    assert examples.files.unreadable(torch.device("cpu")) == [3, 41]


def test_run_ends_where_too_many_cannot_be_read():
    contents = pictures(40)
    contents[20:25] = [BROKEN["no image"]] * 5
    examples = examples_of(contents)
    examples.__getitems__(list(range(19)) + [21])
    with pytest.raises(UnreadableImages) as error:
        examples[20]
    # Of 40 images, 4 may be broken. (The one after image 24 was met.)
    assert str(error.value).startswith(
        "5 of 25 images cannot be read, for example image 20 of 'pictures' (20.jpg): cannot"
    )
    with pytest.raises(UnreadableImages) as in_main_process:
        ExceptionWrapper((type(error.value), error.value, error.tb), "in DataLoader worker process 0").reraise()
    assert str(in_main_process.value) == str(error.value)


def test_few_broken_images_among_the_first_do_not_end_a_run():
    contents = pictures(120)
    contents[:10] = [BROKEN["no image"]] * 10
    examples = examples_of(contents)
    assert examples[0]["label"] == 10 % 3
    contents[10] = BROKEN["no image"]
    with pytest.raises(UnreadableImages, match="11 of 11 images cannot be read, for example image 10 of 'pictures'"):
        examples_of(contents)[0]


def test_user_is_told_once_of_images_that_cannot_be_read(capsys):
    contents = pictures(30)
    contents[4] = BROKEN["cut JPEG"]
    train, held_out = examples_of(contents), examples_of(pictures(3))
    callback = ImagesCallback(train, held_out)
    state = SimpleNamespace(log_history=[], is_world_process_zero=True, epoch=1.5)

    def log(**logs):
        state.log_history.append({**logs, "step": 1})
        callback.on_log(SimpleNamespace(device=torch.device("cpu")), state, None, logs=logs)
        return logs

    assert log(loss=1.0) == {"loss": 1.0}
    assert capsys.readouterr().err == ""
    train.__getitems__([3, 4])
    assert log(loss=1.0) == {"loss": 1.0, "unreadable_images": 1}
    line = capsys.readouterr().err
    assert line.startswith("warning: image 4 of 'pictures' (4.jpg) cannot be read") and line.count("\n") == 1
    assert log(train_runtime=1.0)["train_unreadable_images"] == 1
    assert log(eval_runtime=1.0)["eval_unreadable_images"] == 0
    assert state.log_history[1] == {"loss": 1.0, "step": 1, "unreadable_images": 1}
    assert state.log_history[2]["train_unreadable_images"] == 1
    assert capsys.readouterr().err == ""


# Augmented examples


def same(first: list[dict], second: list[dict]) -> bool:
    return all(
        torch.equal(one["pixel_values"], other["pixel_values"])
        and (one["label"], one.get("mixing_weight")) == (other["label"], other.get("mixing_weight"))
        for one, other in zip(first, second, strict=True)
    )


def test_randomness_follows_from_seed_epoch_and_index_alone():
    contents = pictures(8)
    examples = examples_of(contents, **RECIPE)
    first = examples.__getitems__([5, 2])
    assert same(first, [examples[5], examples[2]]) and same(
        first, examples_of(contents, **RECIPE).__getitems__([5, 2])
    )
    assert not same(first[:1], [examples_of(contents, seed=1, **RECIPE)[5]])
    examples.set_epoch(1)
    second = examples.__getitems__([5, 2])
    assert not torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    assert first[0]["mixing_weight"] != second[0]["mixing_weight"] != second[1]["mixing_weight"]
    examples.set_epoch(0)
    assert same(first, examples.__getitems__([5, 2]))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_see_the_epoch(context):
    contents = pictures(8)
    examples = examples_of(contents, **RECIPE)
    loader = DataLoader(
        examples, 4, num_workers=1, persistent_workers=True, collate_fn=list, multiprocessing_context=context
    )
    for epoch in (0, 1):
        examples.set_epoch(epoch)
        alone = examples_of(contents, **RECIPE)
        alone.set_epoch(epoch)
        assert same([each for batch in loader for each in batch], alone.__getitems__(list(range(8)))), epoch


def test_without_augmentation_the_processor_makes_the_examples():
    contents = pictures(3)
    examples = examples_of(contents)
    expected = examples.processor([read(content) for content in contents], return_tensors="pt")["pixel_values"]
    got = [examples[index] for index in range(3)]
    assert torch.equal(torch.stack([each["pixel_values"] for each in got]), expected)
    assert [set(each) for each in got] == [{"pixel_values", "label"}] * 3
    assert same([examples.select([2, 0])[0]], got[2:])


def test_half_of_the_images_are_mirrored():
    contents = [encoded(noise(0, (16, 16)))] * 200
    examples, plain = examples_of(contents, horizontal_flip=True), examples_of(contents)[0]["pixel_values"]
    mirrored = 0
    for example in examples.__getitems__(list(range(200))):
        values = example["pixel_values"]
        assert torch.equal(values, plain) or torch.equal(values, plain.flip(-1))
        mirrored += torch.equal(values, plain.flip(-1))
    assert 75 <= mirrored <= 125


def test_crops_are_what_the_processor_would_make_of_them():
    contents = pictures(4)
    examples = examples_of(contents, random_crop=True)
    for index, example in enumerate(examples.__getitems__([0, 1, 2, 3])):
        part = read(contents[index], size=(16, 16), generator=np.random.default_rng([0, 0, index]))
        expected = examples.processor(part, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(example["pixel_values"], expected, rtol=0, atol=1e-6)
        assert example["pixel_values"].is_contiguous()


def test_pairs_of_a_batch_are_mixed_with_the_weight_of_the_first():
    examples = examples_of(pictures(4), mixup_alpha=0.2)
    examples.set_epoch(3)
    rows = examples.__getitems__([2, 0, 1, 3])
    batch = collate(rows, 3)
    for number, (row, other) in enumerate(((0, 1), (1, 0), (2, 3), (3, 2))):
        weight = rows[number // 2 * 2]["mixing_weight"]
        assert 0.5 <= weight < 1
        expected = weight * rows[row]["pixel_values"] + (1 - weight) * rows[other]["pixel_values"]
        torch.testing.assert_close(batch["pixel_values"][number], expected)
        labels = torch.zeros(3)
        labels[rows[row]["label"]] += weight
        labels[rows[other]["label"]] += 1 - weight
        torch.testing.assert_close(batch["labels"][number], labels)


@pytest.mark.parametrize("recipe", [RECIPE, {"mixup_alpha": 0.5}])
def test_batches_are_the_same_for_any_number_of_processes(recipe):
    contents = pictures(12)
    order = [7, 2, 11, 4, 9, 0, 1, 8, 3, 10, 5, 6]
    whole = collate(examples_of(contents, **recipe).__getitems__(order), 3)
    for size in (2, 4, 6):
        parts = [
            collate(examples_of(contents, **recipe).__getitems__(order[first : first + size]), 3)
            for first in range(0, 12, size)
        ]
        for name, values in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), values), (size, name)


@pytest.mark.slow
def test_processes_train_on_mixed_images_as_one_does(room):
    write_images(room / "images", count=30)
    options = ["--mixup_alpha=0.5", "--horizontal_flip", "--rand_augment_operations=1", "--random_crop", "--use_cpu"]
    losses = []
    for processes, batch in ((1, 8), (1, 2), (2, 4), (2, 2)):
        launch = (
            ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
        )
        sizes = ["--global_batch_size=8", f"--per_device_train_batch_size={batch}", "--overwrite", "--output_dir=run"]
        line = [sys.executable, "-m", *launch, "training.image_classification", IMAGE_RUN, *options, *sizes]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        completed = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert completed.returncode == 0, completed.stderr
        history = json.loads((room / "run" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert len(losses[0]) == 6
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("size", "eval_resize"), [(224, 256), (8, 10), ([8, 16], 20)])
def test_evaluation_takes_the_middle_of_an_image(size, eval_resize):
    config = DCAVisionConfig(image_size=size, patch_size=8)
    height, width = config.image_height_width
    picture = noise(0, (500, 375))
    values = image_processor(config, eval_resize)(picture, return_tensors="pt")["pixel_values"][0]
    # (Pillow's bilinear filter, on the whole image, of which the middle is then taken.)
    whole = picture.resize((int(eval_resize * 500 / 375), eval_resize), Image.Resampling.BILINEAR)
    left, upper = (whole.width - width) // 2, (whole.height - height) // 2
    middle = np.asarray(whole.crop((left, upper, left + width, upper + height))) / 127.5 - 1
    assert values.shape == (3, height, width)
    np.testing.assert_allclose(values.permute(1, 2, 0), middle, atol=1e-6)


# The benchmark


def test_benchmark_of_the_pipeline_next_to_a_training_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {"images": 6, "batch": 2, "workers": 1, "layers": 1, "image_size": 32, "rounds": 2}
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    call(benchmark.main, *arguments)
    results = json.loads((tmp_path / "runs/benchmarks/images/results.json").read_text())
    assert list(results["rates"]) == ["pipeline, 1 worker", "training step"]
    for each in results["rates"].values():
        assert len(each["rates"]) == 2 and min(each["rates"]) > 0
    printed = capsys.readouterr().out
    assert "| training step" in printed and results["notes"][0] in printed


def test_slower_one_is_the_bottleneck():
    rates = {"pipeline, 1 worker": 50.0, "pipeline, 2 workers": 90.0, "training step": 60.0}
    assert benchmark.verdict(rates) == (
        "The training step is the bottleneck: pipeline, 2 workers, is 1.50 x as fast as the training step."
    )
    assert benchmark.verdict({**rates, "training step": 180.0}).startswith("The pipeline is the bottleneck")


# Refusals


def bytes_of(file, content):
    file.write_bytes(content)


def write_broken(folder):
    write_images(folder)
    for file in (folder / "odd").iterdir():
        file.write_bytes(b"no image")


def write_other_classes(folder):
    write_images(folder)
    write_images(folder.parent / "other", classes=("odd", "zero"))


WRONG_IMAGES = [
    (lambda path: None, "nowhere", [], ["'nowhere'", "Hub"]),
    (lambda path: path.mkdir(), "images", [], ["'images'"]),
    (lambda path: write_images(path, channels=3), "images", ["--num_channels=4"], ["image 1 of 'images'", "3 channels", "`num_channels` is 4"]),
    (write_broken, "images", [], ["2 of ", "of 'images'", "odd/", ".png", "cannot be read", "repair or remove"]),
    (lambda path: write_images(path), "images", ["--eval_resize=7"], ["`eval_resize` is 7", "at least `image_size`, 8"]),
    (lambda path: write_images(path), "images", ["--mixup_alpha=-1"], ["`mixup_alpha` is -1.0", "at least 0"]),
    (lambda path: write_images(path), "images", ["--mixup_alpha=0.2", "--per_device_train_batch_size=3"], ["`mixup_alpha` is 0.2", "`per_device_train_batch_size` is 3", "even"]),
    (lambda path: write_images(path), "images", ["--rand_augment_operations=-1"], ["`rand_augment_operations` is -1", "at least 0"]),
    (lambda path: write_images(path), "images", ["--rand_augment_magnitude=11"], ["`rand_augment_magnitude` is 11.0", "between 0 and 10"]),
    (lambda path: write_images(path, channels=4), "images", ["--num_channels=4", "--rand_augment_operations=2"], ["`rand_augment_operations` is 2", "`num_channels` is 4"]),
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
    (lambda path: write_parquet(path, [0, 1] * 9, ["x.png"] * 18), "a.parquet", [], ["image 1 of 'a.parquet' (x.png)", "No such file"]),
    (lambda path: write_parquet(path, [0, 1] * 9, [image(1), None] * 9), "a.parquet", [], ["2 of", "'a.parquet' (no file name)", "cannot be read"]),
    (lambda path: None, "digits", ["--num_channels=4"], ["image 10 of 'digits'", "1 channels"]),
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
