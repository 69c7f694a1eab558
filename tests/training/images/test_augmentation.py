"""Augmentation: the arithmetic of every operation on pixels known beforehand, and the shares of what is drawn."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from training.images.augmentation import (
    CROP_AREA,
    CROP_ASPECT,
    FILL,
    OPERATIONS,
    mix_up,
    mixed_cross_entropy,
    mixing_weight,
    rand_augment,
    random_crop_box,
)


class Draws:
    """A generator whose draws are known."""

    def __init__(self, random=0.0, integers=0):
        self.random = lambda: random
        self.integers = lambda high: np.full_like(high, integers) if np.ndim(high) else integers


def grey(*rows) -> Image.Image:
    return Image.fromarray(np.array(rows, np.uint8))


def pixels(image) -> list:
    return np.asarray(image).tolist()


def apply(name, image, level=1.0, **draws):
    return pixels(OPERATIONS[name](image, level, Draws(**draws)))


RAMP = grey([0, 50, 100], [127, 128, 200])
COLOR = Image.fromarray(np.array([[[200, 100, 50]]], np.uint8))


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("AutoContrast", 1.0, [[0, 63, 127], [161, 163, 255]]),  # v * 255 / 200
        ("Invert", 1.0, [[255, 205, 155], [128, 127, 55]]),
        ("Posterize", 1.0, [[0, 48, 96], [112, 128, 192]]),  # the upper 4 bits
        ("Posterize", 0.5, [[0, 0, 64], [64, 128, 192]]),  # the upper 2
        ("Solarize", 1.0, [[0, 50, 100], [127, 128, 200]]),  # from 256 on
        ("Solarize", 0.5, [[0, 50, 100], [127, 127, 55]]),  # from 128 on
        ("SolarizeAdd", 1.0, [[110, 160, 210], [237, 128, 200]]),
        ("SolarizeAdd", 0.5, [[55, 105, 155], [182, 128, 200]]),
        ("Brightness", 1.0, [[0, 95, 190], [241, 243, 255]]),  # times 1.9
        ("Brightness", 0.5, [[0, 50, 100], [127, 128, 200]]),  # times 1
        ("Contrast", 1.0, [[0, 3, 99], [150, 152, 255]]),  # m + 1.9 (v - m) for the mean m = 101, cut to whole numbers
        ("Color", 1.0, [[0, 50, 100], [127, 128, 200]]),  # grey has none
    ],
)
def test_values_of_operations(name, level, expected):
    got = np.array(apply(name, RAMP, level))
    assert np.abs(got - np.array(expected)).max() <= 1, got  # (Pillow rounds as it likes)


def test_color_is_changed_about_the_grey_of_a_pixel():
    luminance = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    expected = [min(255, max(0, luminance + 1.9 * (value - luminance))) for value in (200, 100, 50)]
    assert np.abs(np.array(apply("Color", COLOR)[0][0]) - expected).max() <= 2


def test_equalize_spreads_the_values_evenly():
    image = grey(*np.repeat(np.arange(10, 26, dtype=np.uint8), 64).reshape(32, 32))
    # Each of the 16 values is there 64 times; a step is a 255th of all but the last.
    step = 15 * 64 // 255
    expected = {min(255, (64 * number + step // 2) // step) for number in range(16)}
    assert set(np.unique(apply("Equalize", image)).tolist()) == expected


def test_sharpness_moves_away_from_the_smoothed_image():
    image = grey(*[[100] * 3] * 3)
    image.putpixel((1, 1), 130)
    smoothed = (8 * 100 + 5 * 130) / 13
    sharp = apply("Sharpness", image)
    assert abs(sharp[1][1] - (smoothed + 1.9 * (130 - smoothed))) <= 2
    assert sharp[0] == [100] * 3  # the border stays


def numbered(size=224) -> np.ndarray:
    return (np.arange(size)[:, None] * 3 + np.arange(size) * 7).astype(np.uint8)


@pytest.mark.parametrize(("random", "sign"), [(0.0, 1), (0.9, -1)])
def test_translations_are_by_100_of_224_pixels(random, sign):
    start = numbered()
    for name, axis in (("TranslateX", 1), ("TranslateY", 0)):
        moved = np.array(apply(name, Image.fromarray(start), random=random))
        expected = np.full_like(start, FILL)
        here, there = (slice(None, 124), slice(100, None))[::sign]
        if axis == 1:
            expected[:, here] = start[:, there]
        else:
            expected[here] = start[there]
        assert (moved == expected).all()
    half = np.array(apply("TranslateX", Image.fromarray(start), 0.5, random=random))
    assert (half == FILL).all(axis=0).sum() == 50
    # In an image of half the size, by half as much.
    small = np.array(apply("TranslateX", Image.fromarray(start[:112, :112]), random=random))
    assert (small == FILL).all(axis=0).sum() == 50


@pytest.mark.parametrize(("random", "sign"), [(0.0, 1), (0.9, -1)])
def test_shears_move_each_line_in_proportion(random, sign):
    start = numbered()
    along_x = np.array(apply("ShearX", Image.fromarray(start), random=random))
    along_y = np.array(apply("ShearY", Image.fromarray(start), random=random))
    for line in (0, 10, 100, 200):
        shift = sign * round(0.3 * (line + 0.5))
        for got, expected in ((along_x[line], start[line]), (along_y[:, line], start[:, line])):
            moved = np.roll(expected, -shift)
            if shift:
                moved[slice(-shift, None) if sign > 0 else slice(None, -shift)] = FILL
            assert (got == moved).mean() > 0.99, line


def test_rotation_is_by_30_degrees_either_way():
    start = np.zeros((101, 101), np.uint8)
    start[48:53, 90] = 255  # to the right of the middle
    for random, sign in ((0.0, -1), (0.9, 1)):
        turned = np.array(apply("Rotate", Image.fromarray(start), random=random))
        down, right = (index.mean() - 50 for index in np.nonzero(turned == 255))
        assert math.degrees(math.atan2(down, right)) == pytest.approx(sign * 30, abs=1)
        assert math.hypot(down, right) == pytest.approx(40, abs=1)
        assert turned[0, 0] == FILL


def test_cutout_is_a_square_about_any_pixel():
    start = Image.new("RGB", (224, 224), "white")
    cut = np.array(apply("Cutout", start, integers=100))
    assert (cut[60:140, 60:140] == FILL).all() and (cut == FILL).all(axis=-1).sum() == 80 * 80
    corner = np.array(apply("Cutout", start, 0.5, integers=0))
    assert (corner[:20, :20] == FILL).all() and (corner == FILL).all(axis=-1).sum() == 20 * 20
    assert np.asarray(start).min() == 255  # it was changed in a copy


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_operations_keep_size_and_mode_and_are_drawn_alike(mode):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(256, size=(20, 30, 3), dtype=np.uint8)).convert(mode)
    before = image.tobytes()
    for name, operation in OPERATIONS.items():
        for level in (0.0, 0.3, 1.0):
            augmented = operation(image, level, np.random.default_rng(1))
            assert (augmented.size, augmented.mode) == (image.size, mode), name
            assert augmented.tobytes() == operation(image, level, np.random.default_rng(1)).tobytes(), name
    assert image.tobytes() == before
    drawn = [rand_augment(image, 2, 10, np.random.default_rng(seed)).tobytes() for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


def test_operations_are_drawn_evenly_and_one_after_another(monkeypatch):
    done = []
    for name in OPERATIONS:

        def note(image, level, generator, name=name):
            done.append((name, level))
            return image

        monkeypatch.setitem(OPERATIONS, name, note)
    generator = np.random.default_rng(0)
    for _ in range(1000):
        rand_augment(RAMP, 2, 4, generator)
    assert len(done) == 2000 and {level for _, level in done} == {0.4}
    counts = [sum(name == each for each, _ in done) for name in OPERATIONS]
    assert len(counts) == 16 and all(90 <= count <= 160 for count in counts), counts
    assert rand_augment(RAMP, 0, 10, generator) is RAMP


@pytest.mark.parametrize("size", [(500, 375), (30, 40), (900, 100), (8, 8)])
def test_random_crops_lie_in_the_image_and_have_the_shares_asked_for(size):
    width, height = size
    generator = np.random.default_rng(0)
    boxes = np.array([random_crop_box(width, height, generator) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all() and (upper >= 0).all() and (right <= width).all() and (lower <= height).all()
    area, aspect = (right - left) * (lower - upper) / (width * height), (right - left) / (lower - upper)
    assert area.min() >= CROP_AREA[0] - 1e-9 and aspect.min() >= CROP_ASPECT[0] - 1e-9
    assert aspect.max() <= CROP_ASPECT[1] + 1e-9
    assert area.min() < 0.06 and np.quantile(aspect, [0.05, 0.95]) == pytest.approx([0.78, 1.30], abs=0.02)
    # They come everywhere: as far to the left as to the right.
    assert np.median(left / np.maximum(width - (right - left), 1e-9)) == pytest.approx(0.5, abs=0.06)
    assert np.median(upper / np.maximum(height - (lower - upper), 1e-9)) == pytest.approx(0.5, abs=0.06)
    # Heights are as frequent as each other, as with TensorFlow: for a square image, the mean side is between the least
    # and the greatest one.
    if width == height:
        assert ((right - left) * (lower - upper)).max() > 0.9 * width * height


def test_images_too_long_for_a_crop_are_taken_whole():
    assert random_crop_box(1000, 10, np.random.default_rng(0)) == (0, 0, 1000, 10)


def test_mix_up_mixes_pairs():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    labels = torch.tensor([2, 0, 3, 3, 1])
    mixed, probabilities = mix_up(images, labels, num_labels=4, weights=torch.tensor([0.75, 0.5, 0.9]))
    # The last one has no other.
    assert mixed[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.5, 2.5, 4]
    assert mixed.shape == images.shape
    expected = [[0.25, 0, 0.75, 0], [0.75, 0, 0.25, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]]
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float))


def test_mixing_weights_are_the_greater_of_two_of_a_beta_distribution():
    generator = np.random.default_rng(0)
    weights = np.array([mixing_weight(0.2, generator) for _ in range(4000)])
    assert weights.min() >= 0.5 and weights.max() <= 1
    # The mean of max(x, 1 - x) is 1/2 + E|x - 1/2|, for Beta(a, a) with a = 0.2.
    a = 0.2
    deviation = 0.5 ** (2 * a) / (a * math.gamma(a) ** 2 / math.gamma(2 * a))
    assert weights.mean() == pytest.approx(0.5 + deviation, abs=0.01)


def test_loss_of_mixed_labels_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    labels = torch.tensor([[0.75, 0.25], [0.1, 0.9]])
    by_hand = [-0.75 * math.log(1 / 4) - 0.25 * math.log(3 / 4), -0.1 * math.log(4 / 5) - 0.9 * math.log(1 / 5)]
    outputs = SimpleNamespace(logits=logits)
    assert mixed_cross_entropy(outputs, labels).item() == pytest.approx(sum(by_hand) / 2)
    # Two batches of two images make a step; the Trainer counts the probabilities of all of them.
    assert mixed_cross_entropy(outputs, labels, torch.tensor(8)).item() == pytest.approx(sum(by_hand) / 4)


def test_loss_of_classes_is_that_of_their_probabilities():
    outputs = SimpleNamespace(logits=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    classes = torch.tensor([0, 3, 1])
    probabilities = torch.nn.functional.one_hot(classes, 4).float()
    for smoothing in (0.0, 0.1):
        losses = [
            mixed_cross_entropy(outputs, labels, label_smoothing=smoothing) for labels in (classes, probabilities)
        ]
        torch.testing.assert_close(*losses)
    assert mixed_cross_entropy(outputs, classes, 6).item() == pytest.approx(
        mixed_cross_entropy(outputs, classes).item() / 2
    )
