"""The images of a run, with their classes."""

import dataclasses

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from training.data import IMAGE_FORMATS, DataArguments, hold_out, load_splits
from training.errors import UserError, innermost_message


@dataclasses.dataclass
class ImageDataArguments(DataArguments):
    """The images of a run."""

    dataset: str = dataclasses.field(
        default="digits",
        metadata={
            "help": "'digits' (scikit-learn's handwritten digits), a local folder with one folder of images for each "
            "class, parquet files, or the id of a data set on the Hub."
        },
    )
    eval_fraction: float = dataclasses.field(
        default=0.2, metadata={"help": "The share of the images to hold out, of each class alike."}
    )
    image_column: str = dataclasses.field(default="image", metadata={"help": "The column with the images."})
    label_column: str = dataclasses.field(default="label", metadata={"help": "The column with the classes."})
    num_labels: int | None = dataclasses.field(
        default=None, metadata={"help": "The number of classes, where the data does not name them."}
    )


def handwritten_digits(arguments: ImageDataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split with a fixed seed, of each class alike."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / digits.images.max())).round().astype(np.uint8)
    features = Features(
        {"image": Image(mode="L"), "label": ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    data = Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)
    return hold_out(data, arguments, seed=0, classes="label")


def load_images(arguments: ImageDataArguments, num_channels: int, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """
    The images to train on and those held out, with the columns `image` and `label`, and the names of the classes.

    Raises:
        [`UserError`]: also where an image has other than `num_channels` channels, or a label is out of range.
    """
    train, held_out = load_splits(
        arguments,
        {"digits": handwritten_digits},
        IMAGE_FORMATS,
        arguments.image_column,
        seed,
        classes=arguments.label_column,
    )
    columns = {arguments.image_column: "image", arguments.label_column: "label"}
    parts = []
    sources = arguments.dataset, arguments.eval_dataset or arguments.dataset
    for part, source in zip((train, held_out), sources):
        if arguments.label_column not in part.column_names:
            raise UserError(
                f"The data {source!r} has no column {arguments.label_column!r}; it has {', '.join(part.column_names)}."
            )
        part = part.select_columns(list(columns)).rename_columns(columns)
        if not isinstance(part.features["image"], Image):
            try:
                part = part.cast_column("image", Image())
            except (NotImplementedError, TypeError, ValueError) as error:
                raise UserError(f"The column {arguments.image_column!r} of {source!r} holds no images.") from error
        parts.append(part)
    names = _class_names(arguments, *(part.features["label"] for part in parts), labels=parts[0]["label"])
    for part, source in zip(parts, sources):
        _check_images(part, num_channels, len(names), source)
    return *parts, names


def _class_names(arguments: ImageDataArguments, train_feature, held_out_feature, labels) -> list[str]:
    """The names of the classes: the data's, or the numbers from 0."""
    if isinstance(train_feature, ClassLabel):
        if isinstance(held_out_feature, ClassLabel) and held_out_feature.names != train_feature.names:
            raise UserError(
                f"The data held out has the classes {', '.join(held_out_feature.names)}, but those to train on are "
                f"{', '.join(train_feature.names)}: they must be the same."
            )
        return train_feature.names
    if "int" not in str(getattr(train_feature, "dtype", "")):
        raise UserError(
            f"The column {arguments.label_column!r} of {arguments.dataset!r} holds {labels[0]!r}, for one; it must hold "
            "integers from 0, one for each class."
        )
    num_labels = arguments.num_labels
    if num_labels is None:
        num_labels = 1 + max((label for label in labels if label is not None), default=0)
    elif num_labels < 1:
        raise UserError(f"`num_labels` is {num_labels}; it must be at least 1.")
    return [str(label) for label in range(num_labels)]


def _check_images(data: Dataset, num_channels: int, num_labels: int, name: str):
    for index in range(len(data)):
        try:
            example = data[index]
            channels = len(example["image"].getbands())
        except (AttributeError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises, or there is none
            file = (data.cast_column("image", Image(decode=False))[index]["image"] or {}).get("path")
            raise UserError(
                f"Image {index} of {name!r} ({file or 'no file'}) cannot be read: {innermost_message(error)}"
            ) from error
        if channels != num_channels:
            raise UserError(
                f"Image {index} of {name!r} has {channels} channels ({example['image'].mode}), but `num_channels` is "
                f"{num_channels}: convert the images, or set `num_channels`."
            )
        label = example["label"]
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise UserError(
                f"The label of image {index} of {name!r} is {label!r}; it must be an integer from 0 to {num_labels - 1}."
            )
