"""The fields of a run on images."""

import dataclasses
import math
from typing import ClassVar

from training.data.splits import DataArguments
from training.images.augmentation import MAX_MAGNITUDE
from training.run.fields import RunArguments, with_default


@dataclasses.dataclass
class ImageDataArguments(DataArguments):
    """The images of a run."""

    dataset: str = dataclasses.field(
        default="digits",
        metadata={
            "help": "'digits' (scikit-learn's handwritten digits), a local folder with a folder of images for each class, "
            "parquet files, or the id of a data set on the Hub."
        },
    )
    eval_fraction: float = dataclasses.field(
        default=0.2, metadata={"help": "The share of each class that is held out."}
    )
    image_column: str = dataclasses.field(default="image", metadata={"help": "The column with the images."})
    label_column: str = dataclasses.field(default="label", metadata={"help": "The column with the classes."})
    num_labels: int | None = dataclasses.field(
        default=None, metadata={"help": "The number of classes, if the data does not name them."}
    )
    eval_resize: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Resize the shorter side of each image to this number of pixels, and crop its center to `image_size`. By "
            "default the whole image is resized to `image_size`. Without `random_crop`, this applies to training images, too."
        },
    )
    random_crop: bool = dataclasses.field(
        default=False, metadata={"help": "Train on random crops of 5 %% to 100 %% of the area."}
    )
    horizontal_flip: bool = dataclasses.field(
        default=False, metadata={"help": "Flip each training image with a probability of one half."}
    )
    rand_augment_operations: int = dataclasses.field(
        default=0, metadata={"help": "The number of RandAugment operations on each training image."}
    )
    rand_augment_magnitude: float = dataclasses.field(
        default=10, metadata={"help": f"The magnitude of these operations, from 0 to {MAX_MAGNITUDE}."}
    )
    mixup_alpha: float = dataclasses.field(
        default=0,
        metadata={
            "help": "Mix the images of a batch in pairs (MixUp), with weights drawn from Beta(alpha, alpha). 0 turns it off."
        },
    )

    def __post_init__(self):
        for name in ("rand_augment_operations", "mixup_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.rand_augment_magnitude <= MAX_MAGNITUDE:
            raise ValueError(
                f"`rand_augment_magnitude` is {self.rand_augment_magnitude}; it must lie between 0 and {MAX_MAGNITUDE}."
            )


@dataclasses.dataclass
class ImageClassificationArguments(RunArguments):
    """
    The training arguments of an image classifier. The defaults are the paper's recipe for ImageNet (table 8; Beyer et al.,
    2022).
    """

    held_out_metrics: ClassVar = {"loss": False, "accuracy": True}

    learning_rate: float = with_default("learning_rate", 1e-3)
    lr_scheduler_type: str = with_default("lr_scheduler_type", "cosine")
    warmup_steps: float = with_default("warmup_steps", 10_000)
    weight_decay: float = with_default("weight_decay", 1e-4)
    # The collator needs columns that the model does not take.
    remove_unused_columns: bool = dataclasses.field(default=False, init=False)
