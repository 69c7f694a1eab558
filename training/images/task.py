"""The training and evaluation of image classifiers."""

import functools
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import ClassLabel
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedConfig,
)

from modeling_dca import DCAForImageClassification, DCAVisionConfig
from modeling_dca.image_processing_dca import DCAImageProcessor
from training.data.splits import is_on_the_hub
from training.images.augmentation import mixed_cross_entropy
from training.images.fields import ImageClassificationArguments, ImageDataArguments
from training.images.reading import (
    MODES,
    ImageExamples,
    ImageFiles,
    ImagesCallback,
    check_pairs,
    collate,
    load_images,
    numbered_as,
    read_image,
)
from training.results.hub import public_name
from training.results.metrics import Accuracy, load_metrics, plain
from training.results.page import Example
from training.run.checks import check_batches, check_best_metric, check_hub
from training.run.fields import Run
from training.run.folder import make_output_folder
from training.run.task import Task
from training.run.training import check_before_data, run_models
from training.support.errors import UserError, innermost_message, told


def image_processor(config: DCAVisionConfig, eval_resize: int | None) -> BaseImageProcessor:
    """
    The image processor of a model, which makes pixel values from -1 to 1. It is saved with the model.

    Args:
        eval_resize: the size of the shorter side in pixels before the center crop; if `None`, the whole image is resized.

    Raises:
        [`UserError`]: the model's images are larger than `eval_resize`.
    """
    size = dict(zip(("height", "width"), config.image_height_width))
    options = {"size": size}
    if eval_resize is not None:
        if eval_resize < max(size.values()):
            raise UserError(f"`eval_resize` is {eval_resize}; it must be at least `image_size`, {max(size.values())}.")
        options = {"size": {"shortest_edge": eval_resize}, "do_center_crop": True, "crop_size": size}
    processor_class = DCAImageProcessor  # it alone converts colours to grey
    if config.num_channels != 1:
        from transformers import ViTImageProcessor as processor_class  # without torchvision, the import warns
    return processor_class(
        **options,
        do_convert_rgb=config.num_channels == 3,
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )


def classification_metrics(named: list[evaluate.EvaluationModule]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` with which a [`~transformers.Trainer`] evaluates any image classifier: accuracy, and `named`."""
    metrics = evaluate.combine([Accuracy(), *named])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # (Some models of transformers return more than logits.)
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return plain(metrics.compute(predictions=logits.argmax(-1), references=prediction.label_ids))

    return compute_metrics


def train_image_classifier(run: Run) -> None:
    """Train the model of a run, and its baseline, on its images."""
    data, config = run.data, run.config
    baseline, model_class, callbacks = check_before_data(run, DCAForImageClassification)
    check_hub(run.training)

    check_pairs(data.mixup_alpha, run.training.train_batch_size)
    processor = image_processor(config, data.eval_resize)
    if data.rand_augment_operations and config.num_channels not in MODES:
        raise UserError(
            f"`rand_augment_operations` is {data.rand_augment_operations}, but RandAugment is for images of 1 or 3 channels, "
            f"and `num_channels` is {config.num_channels}: set it to 0."
        )
    with run.training.main_process_first(desc="preparing the data"):
        train_images, held_out_images, names = load_images(data, config.num_channels)
    for each in filter(None, (config, baseline)):
        each.id2label, each.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    options = (processor, config.image_height_width)
    check_batches(run.training, len(train_images))
    named, figures = load_metrics(run.training.metrics, run.training.held_out_metrics, len(names))
    check_best_metric(run.training, figures)
    train_files = ImageFiles(train_images, config.num_channels, data.dataset)
    train_examples = ImageExamples(train_files, *options, augmentation=data, seed=run.training.seed)
    held_out_files = ImageFiles(held_out_images, config.num_channels, data.eval_dataset or data.dataset)
    held_out_examples = ImageExamples(held_out_files, *options)
    make_output_folder(run)

    # (The model's own loss would take class probabilities for several labels of one image.)
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
        model_class,
        baseline,
        note,
        train_dataset=train_examples,
        eval_dataset=held_out_examples,
        data_collator=functools.partial(collate, num_labels=len(names)),
        processing_class=processor,
        compute_metrics=classification_metrics(named),
        compute_loss_func=loss,
        callbacks=[*callbacks, ImagesCallback(train_examples, held_out_examples)],
    )


def image_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The mean loss of a batch, the same for all models. (Some models add further losses to their own.)"""
    return cross_entropy(outputs["logits"].float(), labels)


def image_options(
    data: ImageDataArguments, config: PreTrainedConfig, checkpoint: str, metrics: list[str]
) -> dict[str, Any]:
    """
    The held-out images, and how to evaluate on them.

    Raises:
        [`UserError`]: the classes of the data are not those of the model.
    """
    with told(checkpoint, "evaluated"):
        processor = AutoImageProcessor.from_pretrained(checkpoint)
    num_channels = getattr(config, "num_channels", 3)
    _, images, names = load_images(data, num_channels, held_out_only=True)
    known = [config.id2label[index] for index in range(config.num_labels)]
    has_names = isinstance(images.features["label"], ClassLabel)
    if set(names) <= set(known):
        images = numbered_as(images, known) if has_names else images
    # (If classes are only numbers, the last may be missing among the images.)
    elif len(names) > len(known) or has_names and len(names) < len(known):
        raise UserError(f"The data has {len(names)} classes, but {checkpoint!r} has {len(known)}.")
    else:
        print(
            f"note: the classes have other names than the model's ({names[0]!r}, not {known[0]!r}) and are matched by number."
        )
    files = ImageFiles(images, num_channels, data.eval_dataset or data.dataset)
    named, _ = load_metrics(metrics, ImageClassificationArguments.held_out_metrics, len(known))
    return {
        "eval_dataset": ImageExamples(files, processor, size=None),
        "data_collator": functools.partial(collate, num_labels=len(known)),
        "compute_metrics": classification_metrics(named),
        "compute_loss_func": image_loss,
    }


def image_example(file: str, data: ImageDataArguments, config: DCAVisionConfig, checkpoint: str) -> Example:
    """
    The image in a file, as a classifier takes it.

    Raises:
        [`UserError`]: the image cannot be read, or the image processor cannot be loaded.
    """
    try:
        image = read_image({"bytes": None, "path": file}, config.num_channels)
    except Exception as error:  # (broken files raise almost any exception)
        raise UserError(f"`image` is {file!r}, which cannot be read: {innermost_message(error)}.") from error
    with told(checkpoint, "shown"):
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    rows, columns = (size // patch for size, patch in zip(pixel_values.shape[-2:], config.patch_height_width))
    summary = ["class token"] if config.pooling != "mean" else []
    registers = [f"register {number}" for number in range(1, 1 + config.num_register_tokens)]
    patches = [f"row {row}, column {column}" for row in range(1, 1 + rows) for column in range(1, 1 + columns)]
    return Example(
        {"pixel_values": pixel_values},
        "patch",
        [*summary, *registers, *patches],
        (rows, columns),
        _picture_of(pixel_values[0], processor),
    )


def _picture_of(values: torch.Tensor, processor) -> str:
    """An image `(channels, height, width)` as a model sees it, as the data URI of a picture."""
    if getattr(processor, "do_normalize", True):
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (processor.image_mean, processor.image_std))
        values = values * std + mean
    pixels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


IMAGE_CLASSIFIERS = Task(
    "image-classification",
    DCAForImageClassification,
    ImageDataArguments,
    ImageClassificationArguments,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    train_image_classifier,
    image_options,
    image_example,
)
