"""
The image augmentation of the ImageNet recipe (Beyer et al., 2022, arXiv 2205.01580), in Pillow and NumPy: random crop,
horizontal flip, RandAugment and MixUp.

All random numbers come from a generator that the caller passes, so that an augmentation can be repeated.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


#: The share of the image that a random crop takes, and its width as a multiple of its height.
CROP_AREA = (0.05, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

#: The largest magnitude of RandAugment; the level of an operation is its magnitude over this.
MAX_MAGNITUDE = 10
#: The pixel value with which RandAugment fills empty areas.
FILL = 128
# The image size that the recipe's distances in pixels are for.
RECIPE_SIZE = 224


def random_crop_box(width: int, height: int, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """
    A random crop of an image ("inception crop"), as TensorFlow's `sample_distorted_bounding_box` draws it, but not rounded
    to pixels: first the aspect ratio, then the height within the limits of `CROP_AREA` and the image, then the position.

    Returns:
        Left, upper, right and lower edge, in pixels; the whole image if it is too elongated for such a crop.
    """
    for _ in range(CROP_ATTEMPTS):
        aspect = generator.uniform(*CROP_ASPECT)
        least, most = (math.sqrt(share * width * height / aspect) for share in CROP_AREA)
        most = min(most, height, width / aspect)
        if least <= most:
            crop_height = generator.uniform(least, most)
            crop_width = min(crop_height * aspect, width)
            left = generator.uniform(0, width - crop_width)
            upper = generator.uniform(0, height - crop_height)
            return left, upper, left + crop_width, upper + crop_height
    return 0, 0, width, height


def _either_way(value: float, generator: np.random.Generator) -> float:
    return value if generator.random() < 0.5 else -value


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    """The image with the pixel at `(ax + by + c, dx + ey + f)` at `(x, y)`."""
    fill = (FILL,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=fill)


def _rotate(image: Image.Image, level: float, generator: np.random.Generator) -> Image.Image:
    fill = (FILL,) * len(image.getbands())
    return image.rotate(_either_way(30 * level, generator), Image.Resampling.NEAREST, fillcolor=fill)


def _solarize_add(image: Image.Image, level: float, generator: np.random.Generator) -> Image.Image:
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _cutout(image: Image.Image, level: float, generator: np.random.Generator) -> Image.Image:
    """A gray square of 80 x 80 pixels (of 224) at full magnitude, with its center anywhere in the image."""
    size = np.array(image.size)
    center = generator.integers(size)
    half = (40 * level * size / RECIPE_SIZE).astype(int)
    image = image.copy()
    image.paste((FILL,) * len(image.getbands()), (*np.maximum(center - half, 0), *np.minimum(center + half, size)))
    return image


def _enhance(kind: type) -> Callable:
    return lambda image, level, generator: kind(image).enhance(1.8 * level + 0.1)


#: The operations of RandAugment: `(image, level, generator)` to an image of the same size, `level` from 0 to 1.
OPERATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "AutoContrast": lambda image, level, generator: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, generator: ImageOps.equalize(image),
    "Invert": lambda image, level, generator: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": lambda image, level, generator: ImageOps.posterize(image, max(1, int(4 * level))),
    "Solarize": lambda image, level, generator: ImageOps.solarize(image, int(256 * level)),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, generator: _affine(image, 1, _either_way(0.3 * level, generator), 0, 0, 1, 0),
    "ShearY": lambda image, level, generator: _affine(image, 1, 0, 0, _either_way(0.3 * level, generator), 1, 0),
    "TranslateX": lambda image, level, generator: _affine(
        image, 1, 0, _either_way(100 * level * image.width / RECIPE_SIZE, generator), 0, 1, 0
    ),
    "TranslateY": lambda image, level, generator: _affine(
        image, 1, 0, 0, 0, 1, _either_way(100 * level * image.height / RECIPE_SIZE, generator)
    ),
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}


def rand_augment(image: Image.Image, operations: int, magnitude: float, generator: np.random.Generator) -> Image.Image:
    """
    RandAugment (Cubuk et al., 2020, arXiv 1909.13719): random operations one after another, all with the same magnitude.

    Operations and magnitudes are those of TensorFlow's reference and of big_vision, the source of the recipe. At magnitude
    10: rotation by 30 degrees, shear by 0.3 and translation by 100 of 224 pixels, each in either direction; a square of 80 of
    224 pixels cut out; colour, contrast, brightness and sharpness times 1.9; 4 bits kept of each value; 110 added to values
    below 128; and no value solarized (the threshold is 256). Distances scale with the size of the image. Contrast is changed
    about the mean of the image, as in Pillow; the reference mistakes the number of pixels for the mean.

    Args:
        image: an image of mode "L" or "RGB".
        operations: the number of operations; the same one may be drawn again.
        magnitude: from 0 to `MAX_MAGNITUDE`.
    """
    names = list(OPERATIONS)
    for _ in range(operations):
        name = names[generator.integers(len(names))]
        image = OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, generator)
    return image


def mixing_weight(alpha: float, generator: np.random.Generator) -> float:
    """The weight of an image that MixUp mixes with another: the greater of the two weights, from a beta distribution."""
    weight = generator.beta(alpha, alpha)
    return max(weight, 1 - weight)


def mix_up(pixel_values: Tensor, labels: Tensor, num_labels: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """
    MixUp (Zhang et al., 2018, arXiv 1710.09412): mixes the first image of a batch and its class with the second, the third
    with the fourth, and so on; an odd last one stays as it is. The pairs are the same for any number of processes that share
    a batch, if each takes an even number of images.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        labels: `(batch,)`, the classes.
        weights: `(pairs,)`, the weight of an image itself; the other of its pair has the rest. An odd last image needs one, too.

    Returns:
        The mixed images, and the probabilities of the classes, `(batch, num_labels)`.
    """
    probabilities = one_hot(labels, num_labels).to(pixel_values.dtype)
    others = torch.arange(len(labels)) ^ 1
    others[others == len(labels)] = len(labels) - 1
    weights = weights.repeat_interleave(2)[: len(labels)].to(pixel_values.dtype)

    def mixed(values: Tensor) -> Tensor:
        own = weights.view(-1, *[1] * (values.ndim - 1))
        return own * values + (1 - own) * values[others]

    return mixed(pixel_values), mixed(probabilities)


def mixed_cross_entropy(
    outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """
    The cross-entropy with classes, or with the probabilities of `mix_up`; a `compute_loss_func` of the Trainer.

    Args:
        outputs: those of the model, with `logits` `(batch, num_labels)`.
        labels: `(batch,)`, or `(batch, num_labels)`.
        num_items_in_batch: the number of elements of all `labels` in an optimizer step, as the Trainer counts them; by
            default the number in `labels`.
    """
    items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    losses = cross_entropy(outputs.logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
    # The Trainer counts every probability.
    return losses / (items if labels.ndim == 1 else items / labels.shape[-1])
