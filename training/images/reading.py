"""The images of a run and their classes: loading, decoding, and conversion to examples."""

import math
import sys
from io import BytesIO

import numpy as np
import torch
from accelerate.utils import gather
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, TrainerCallback

from training.data.splits import IMAGE_FORMATS, hold_out, load_splits
from training.images.augmentation import mix_up, mixing_weight, rand_augment, random_crop_box
from training.images.fields import ImageDataArguments
from training.support.errors import UserError, innermost_message


# A run ends if more than this share of the images so far cannot be read, where at least `FIRST_IMAGES` count as the images
# so far.
UNREADABLE_SHARE = 0.1
FIRST_IMAGES = 100
# The number of images of each part that are read before a run starts.
CHECKED_IMAGES = 32

# The states of an image.
NOT_MET, READ, UNREADABLE = 0, 1, 2

#: The mode of Pillow for a number of channels. Images of other modes are converted.
MODES = {1: "L", 3: "RGB"}


def handwritten_digits(arguments: ImageDataArguments) -> tuple[Dataset, Dataset]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, with a stratified split of a fixed seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / digits.images.max())).round().astype(np.uint8)
    features = Features(
        {"image": ImageFeature(mode="L"), "label": ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    data = Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)
    return hold_out(data, arguments, seed=0, classes="label")


def load_images(
    arguments: ImageDataArguments, num_channels: int, held_out_only: bool = False
) -> tuple[Dataset | None, Dataset, list[str]]:
    """
    The training images and the held-out images, with the columns `image` and `label`, and the names of the classes.

    All labels are checked, and the first images are read with `num_channels` channels (see [`ImageFiles`]).

    Args:
        held_out_only: return `None` in place of the training images, and do not load them unless the held-out images are a
            share of them.

    Raises:
        [`UserError`]: as in `load_splits`, or a label is out of range, or too many of the first images cannot be read.
    """
    columns = {arguments.image_column: "image", arguments.label_column: "label"}
    parts = load_splits(
        arguments,
        {"digits": handwritten_digits},
        IMAGE_FORMATS,
        list(columns),
        classes=arguments.label_column,
        held_out_only=held_out_only,
    )
    loaded, names = [], None
    for part, source in zip(parts, (arguments.dataset, arguments.eval_dataset or arguments.dataset)):
        if part is None:
            continue
        if arguments.label_column not in part.column_names:
            raise UserError(
                f"The data {source!r} has no column {arguments.label_column!r}; it has {', '.join(part.column_names)}."
            )
        part = part.select_columns(list(columns)).rename_columns(columns)
        if not isinstance(part.features["image"], ImageFeature):
            try:
                part = part.cast_column("image", ImageFeature())
            except (NotImplementedError, TypeError, ValueError) as error:
                raise UserError(f"The column {arguments.image_column!r} of {source!r} holds no images.") from error
        own_names = _class_names(arguments, part, source)
        names = names or own_names
        if isinstance(part.features["label"], ClassLabel):
            if not set(own_names) <= set(names):
                raise UserError(
                    f"The held-out data has the classes {', '.join(own_names)}, but the training data has "
                    f"{', '.join(names)}: they must be the same."
                )
            part = numbered_as(part, names)
        for index, label in enumerate(part["label"][:]):
            if not isinstance(label, int) or not 0 <= label < len(names):
                raise UserError(
                    f"The label of image {index} of {source!r} is {label!r}; it must be an integer from 0 to "
                    f"{len(names) - 1}."
                )
        ImageFiles(part, num_channels, source).read(range(min(CHECKED_IMAGES, len(part))))
        loaded.append(part)
    return None if held_out_only else loaded[0], loaded[-1], names


def _class_names(arguments: ImageDataArguments, part: Dataset, source: str) -> list[str]:
    """The names of the classes: the data's, or the numbers from 0."""
    feature, labels = part.features["label"], part["label"][:]
    if isinstance(feature, ClassLabel):
        return feature.names
    if "int" not in str(getattr(feature, "dtype", "")):
        raise UserError(
            f"The column {arguments.label_column!r} of {source!r} holds, for example, {labels[0]!r}; it must hold integers "
            "from 0, one for each class."
        )
    num_labels = arguments.num_labels
    if num_labels is None:
        num_labels = 1 + max((label for label in labels if label is not None), default=0)
    elif num_labels < 1:
        raise UserError(f"`num_labels` is {num_labels}; it must be at least 1.")
    return [str(label) for label in range(num_labels)]


def numbered_as(part: Dataset, names: list[str]) -> Dataset:
    """Images with named classes, renumbered by the positions of their names in `names`."""
    own_names = part.features["label"].names
    if own_names == names:
        return part
    numbers = [names.index(name) for name in own_names]
    labels = [label if label is None or label < 0 else numbers[label] for label in part["label"][:]]
    return part.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))


class UnreadableImages(UserError):
    """Too many images cannot be read."""

    def __init__(self, message: str):
        # The message of a worker process starts with its traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2])


def read_image(
    file: dict, num_channels: int, size: tuple[int, int] | None = None, generator: np.random.Generator | None = None
) -> Image.Image:
    """
    An image, upright and with `num_channels` channels: grayscale for one and RGB for three, whatever its format. Transparent
    pixels become white, as in transformers' image processors. Of 16 bits, the upper 8 are kept.

    Args:
        file: `bytes` or `path` of the image, as [`~datasets.Image`] gives them without decoding it.
        size: height and width of the random crop, in pixels.
        generator: draws the crop; if `None`, the whole image is returned in its own size.

    Raises:
        ValueError: the image has another number of channels, and cannot be converted.
        Exception: almost any, from Pillow and its decoders, if the image is broken.
    """
    with Image.open(file["path"] if file["bytes"] is None else BytesIO(file["bytes"])) as image:
        orientation, box = image.getexif().get(ExifTags.Base.Orientation), None
        if generator is not None:
            sideways = orientation in (5, 6, 7, 8)
            width, height = image.size[::-1] if sideways else image.size
            box = np.array(random_crop_box(width, height, generator)) / (width, height, width, height)
            # A JPEG file is decoded at half its size or less, if that is enough for the crop.
            shrink = min((box[2] - box[0]) * width / size[1], (box[3] - box[1]) * height / size[0])
            image.draft(None, tuple(math.ceil(side / shrink) for side in image.size))
        image.load()
        image = _convert(image if orientation is None else ImageOps.exif_transpose(image), num_channels)
    if box is None:
        return image
    box = np.minimum(box, 1) * (image.size * 2)
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box=tuple(box))


def _convert(image: Image.Image, num_channels: int) -> Image.Image:
    mode = MODES.get(num_channels, image.mode)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif mode in MODES.values() and (image.mode[-1] in "Aa" or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)
    if len(image.getbands()) != num_channels:
        raise ValueError(
            f"it has {len(image.getbands())} channels ({image.mode}), but `num_channels` is {num_channels}"
        )
    return image


class ImageFiles:
    """
    Images that may be broken: one that cannot be read is replaced by the next one that can, with its label.

    All processes that share the object, such as those of a [`~torch.utils.data.DataLoader`], share the states of the images.

    Args:
        data: the data, with the columns `image` and `label`.
        num_channels: see [`read_image`].
        name: the name of the data, for messages.
    """

    def __init__(self, data: Dataset, num_channels: int, name: str):
        self.data = data.cast_column("image", ImageFeature(decode=False))
        self.num_channels = num_channels
        self.name = name
        self.met = torch.full((len(data),), NOT_MET, dtype=torch.uint8).share_memory_()

    def read(self, indices, size=None, generators=None) -> tuple[list[Image.Image], list[int]]:
        """
        The images and their labels, see [`read_image`].

        Raises:
            [`UnreadableImages`]: more than `UNREADABLE_SHARE` of all images so far cannot be read.
        """
        rows, images, labels = self.data[indices], [], []
        for index, file, label, generator in zip(
            indices, rows["image"], rows["label"], generators or [None] * len(indices)
        ):
            # (The random numbers of an image must not depend on whether another one is known to be broken.)
            state = generator and generator.bit_generator.state
            while (image := self._read(index, file, size, generator)) is None:
                if generator is not None:
                    generator.bit_generator.state = state
                index = (index + 1) % len(self.data)
                file, label = self.data[index]["image"], self.data[index]["label"]
            images.append(image)
            labels.append(label)
        return images, labels

    def _read(self, index: int, file: dict | None, size, generator) -> Image.Image | None:
        if self.met[index] == UNREADABLE:
            return None
        try:
            image = read_image(file, self.num_channels, size, generator)
        except Exception as error:  # (there is hardly one that no broken file raises)
            self.met[index] = UNREADABLE
            unreadable, met = int((self.met == UNREADABLE).sum()), int((self.met != NOT_MET).sum())
            if unreadable > UNREADABLE_SHARE * max(met, min(FIRST_IMAGES, len(self.data))):
                raise UnreadableImages(
                    f"{unreadable} of {met} images cannot be read, for example {self.describe(index, file)}: "
                    f"{innermost_message(error)}: repair or remove them."
                ) from error
            return None
        self.met[index] = READ
        return image

    def describe(self, index: int, file: dict | None = None) -> str:
        """The place of an image, for messages."""
        file = file or self.data[index]["image"] or {}
        return f"image {index} of {self.name!r} ({file.get('path') or 'no file name'})"

    def unreadable(self, device: torch.device) -> list[int]:
        """The indices of the images that could not be read, on any device."""
        met = gather(self.met.to(device)).view(-1, len(self.met)).amax(dim=0)
        return (met == UNREADABLE).nonzero().flatten().tolist()


class ImageExamples(torch.utils.data.Dataset):
    """
    Images as a model takes them: `pixel_values` `(channels, height, width)` from -1 to 1, `label`, and with MixUp the
    `mixing_weight` of the pair that starts with the example.

    The random numbers of an example depend only on `seed`, epoch and index: they are the same in a resumed run, and with any
    number of processes.

    Args:
        files: the images.
        processor: makes tensors of images, except of random crops.
        size: height and width of the model's images, in pixels.
        augmentation: how to augment the images; by default not at all.
        seed: the seed of the augmentation.
    """

    def __init__(
        self,
        files: ImageFiles,
        processor: BaseImageProcessor,
        size: tuple[int, int],
        augmentation: ImageDataArguments | None = None,
        seed: int = 0,
    ):
        self.files = files
        self.processor = processor
        self.size = size
        self.augmentation = augmentation or ImageDataArguments()
        self.seed = seed
        fields = ("random_crop", "horizontal_flip", "rand_augment_operations", "mixup_alpha")
        self.is_random = any(getattr(self.augmentation, field) for field in fields)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers must see it change

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.files.data)

    def select(self, indices) -> Subset:
        """Some of the examples."""
        return Subset(self, indices)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        augmentation = self.augmentation
        generators = [None] * len(indices)
        if self.is_random:
            epoch = int(self.epoch)
            generators = [np.random.default_rng([self.seed, epoch, index]) for index in indices]
        examples = [{} for _ in indices]
        if augmentation.mixup_alpha > 0:
            examples = [{"mixing_weight": mixing_weight(augmentation.mixup_alpha, each)} for each in generators]
        images, labels = self.files.read(indices, self.size, generators if augmentation.random_crop else None)
        if augmentation.horizontal_flip or augmentation.rand_augment_operations:
            images = [self._distort(image, generator) for image, generator in zip(images, generators)]
        if augmentation.random_crop:
            pixel_values = [_pixel_values(image) for image in images]
        else:
            pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        for example, values, label in zip(examples, pixel_values, labels):
            example.update(pixel_values=values, label=label)
        return examples

    def _distort(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        augmentation = self.augmentation
        if augmentation.horizontal_flip and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        operations, magnitude = augmentation.rand_augment_operations, augmentation.rand_augment_magnitude
        return rand_augment(image, operations, magnitude, generator)


def _pixel_values(image: Image.Image) -> Tensor:
    """The same as the processor makes of an image of the right size, in less time."""
    values = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
    return values.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def check_pairs(mixup_alpha: float, batch_size: int) -> None:
    """
    Raises:
        [`UserError`]: MixUp cannot mix the images of a batch in pairs.
    """
    if mixup_alpha > 0 and batch_size % 2:
        raise UserError(
            f"`mixup_alpha` is {mixup_alpha}, which mixes the images of a batch in pairs, but `per_device_train_batch_size` "
            f"is {batch_size}: choose an even number."
        )


def collate(examples: list[dict], num_labels: int) -> dict[str, Tensor]:
    """A batch of images with their classes, or with probabilities of the classes if MixUp mixes them."""
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    if "mixing_weight" in examples[0]:
        weights = torch.tensor([example["mixing_weight"] for example in examples[::2]])
        pixel_values, labels = mix_up(pixel_values, labels, num_labels, weights)
    return {"pixel_values": pixel_values, "labels": labels}


class ImagesCallback(TrainerCallback):
    """
    Sets the epoch of the training examples, and reports the number of images that could not be read: in a warning, the logs
    and the results.
    """

    def __init__(self, train: ImageExamples, held_out: ImageExamples):
        self.examples = {"train": train, "eval": held_out}
        self.warned = set()

    def on_train_begin(self, args, state, control, **kwargs):
        # (`auto_find_batch_size` calls this with every size that it tries.)
        check_pairs(self.examples["train"].augmentation.mixup_alpha, state.train_batch_size or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate calls `set_epoch`, too, but not with several processes or within the epoch of a resumed run.
        self.examples["train"].set_epoch(int(state.epoch or 0))

    def on_log(self, args, state, control, logs, **kwargs):
        part = "eval" if "eval_runtime" in logs else "train"
        files = self.examples[part].files
        unreadable = files.unreadable(args.device)
        if f"{part}_runtime" in logs:
            logs[f"{part}_unreadable_images"] = len(unreadable)
        elif unreadable:
            logs["unreadable_images"] = len(unreadable)
        state.log_history[-1].update(logs)
        if unreadable and part not in self.warned and state.is_world_process_zero:
            self.warned.add(part)
            tqdm.write(
                f"warning: {files.describe(unreadable[0])} cannot be read, and is replaced by the next image; "
                f"`{part}_unreadable_images` in the results counts all such images.",
                file=sys.stderr,
            )
