"""
Train a DCA image classifier:

    python -m training.image_classification configuration/demo/image.yaml [--field value ...]

`--help` lists all fields. Several processes: `accelerate launch -m training.image_classification ...`.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import ClassVar

from transformers import EvalPrediction, ViTImageProcessor

from modeling_dca import DCAForImageClassification, DCAVisionConfig
from training.arguments import RunArguments, parse_run
from training.augmentation import mixed_cross_entropy
from training.data import is_on_the_hub
from training.errors import UserError, command
from training.images import (
    MODES,
    ImageDataArguments,
    ImageExamples,
    ImageFiles,
    ImagesCallback,
    check_pairs,
    collate,
    load_images,
)
from training.metrics import Accuracy
from training.publish import public_name
from training.run import (
    check_batches,
    check_hub,
    check_model,
    check_optimizer,
    check_output_folder,
    check_trainer,
    config_of_baseline,
    make_output_folder,
    run_models,
)


@dataclasses.dataclass
class ImageClassificationArguments(RunArguments):
    """The paper's recipe for ImageNet (table 8; Beyer et al., 2022), where a run does not say otherwise."""

    held_out_metrics: ClassVar = {"loss": False, "accuracy": True}

    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "The peak learning rate."})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = dataclasses.field(
        default=10_000, metadata={"help": "Steps to warm up, or below 1 their share."}
    )
    weight_decay: float = dataclasses.field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    # The model does not take what the examples hold for their collator.
    remove_unused_columns: bool = dataclasses.field(default=False, init=False)


def image_processor(config: DCAVisionConfig, eval_resize: int | None) -> ViTImageProcessor:
    """
    What makes an image that is evaluated, here or where the model is loaded, into pixel values from -1 to 1.

    Args:
        eval_resize: pixels of the smaller side of an image whose middle is taken; if none, the image is taken whole.

    Raises:
        [`UserError`]: the model's images are larger than `eval_resize`.
    """
    size = dict(zip(("height", "width"), config.image_height_width))
    options = {"size": size}
    if eval_resize is not None:
        if eval_resize < max(size.values()):
            raise UserError(f"`eval_resize` is {eval_resize}; it must be at least `image_size`, {max(size.values())}.")
        options = {"size": {"shortest_edge": eval_resize}, "do_center_crop": True, "crop_size": size}
    return ViTImageProcessor(
        **options,
        do_convert_rgb=config.num_channels == 3,
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """How a [`~transformers.Trainer`] evaluates an image classifier, wherever it comes from."""
    # (Some models of transformers return more than logits.)
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return Accuracy().compute(predictions=logits.argmax(-1), references=prediction.label_ids)


@command
def main():
    run = parse_run(
        sys.argv[1:],
        "training.image_classification",
        "Train a DCA image classifier.",
        DCAForImageClassification,
        ImageDataArguments,
        ImageClassificationArguments,
    )
    data, config = run.data, run.config
    baseline = config_of_baseline(run)
    check_model(DCAForImageClassification, config, run.training.device)
    check_optimizer(run.training)
    check_trainer(run.training)
    check_output_folder(run.training)
    check_hub(run.training)

    check_pairs(data.mixup_alpha, run.training.train_batch_size)
    processor = image_processor(config, data.eval_resize)
    if data.rand_augment_operations and config.num_channels not in MODES:
        raise UserError(
            f"`rand_augment_operations` is {data.rand_augment_operations}, but RandAugment is for images of 1 or 3 channels "
            f"and `num_channels` is {config.num_channels}: set it to 0."
        )
    with run.training.main_process_first(desc="preparing the data"):
        train_images, held_out_images, names = load_images(data, config.num_channels)
    for each in filter(None, (config, baseline)):
        each.id2label, each.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    options = (processor, config.image_height_width)
    check_batches(run.training, len(train_images))
    train_files = ImageFiles(train_images, config.num_channels, data.dataset)
    train_examples = ImageExamples(train_files, *options, augmentation=data, seed=run.training.seed)
    held_out_files = ImageFiles(held_out_images, config.num_channels, data.eval_dataset or data.dataset)
    held_out_examples = ImageExamples(held_out_files, *options)
    if run.training.should_save:
        make_output_folder(run)

    # (The model's own loss would take probabilities of classes for several labels of one image.)
    smoothing = run.training.label_smoothing_factor
    loss = functools.partial(mixed_cross_entropy, label_smoothing=smoothing) if data.mixup_alpha else None
    source = (
        "scikit-learn's handwritten digits (8 x 8 pixels)" if data.dataset == "digits" else public_name(data.dataset)
    )
    note = {
        "task": "image-classification",
        "dataset": data.dataset if is_on_the_hub(data.dataset) else None,
        "dataset_name": "scikit-learn digits" if data.dataset == "digits" else Path(data.dataset).name,
        "data": f"Trained on {source}: {len(train_images):,} images of {len(names)} classes. Evaluated on "
        f"{len(held_out_images):,} images that were held out.",
    }
    run_models(
        run,
        DCAForImageClassification,
        baseline,
        note,
        train_dataset=train_examples,
        eval_dataset=held_out_examples,
        data_collator=functools.partial(collate, num_labels=len(names)),
        processing_class=processor,
        compute_metrics=compute_accuracy,
        compute_loss_func=loss,
        callbacks=[ImagesCallback(train_examples, held_out_examples)],
    )


if __name__ == "__main__":
    main()
