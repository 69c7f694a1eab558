"""
Train a DCA image classifier:

    python -m training.image_classification configuration/demo/image.yaml [--field value ...]

`--help` lists all fields. Several processes: `accelerate launch -m training.image_classification ...`.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from transformers import EvalPrediction, ViTImageProcessor

from modeling_dca import DCAForImageClassification
from training.arguments import RunArguments, parse_run
from training.data import is_on_the_hub
from training.errors import command
from training.images import ImageDataArguments, load_images
from training.metrics import Accuracy
from training.run import (
    check_hub,
    check_model,
    check_output_folder,
    config_of_baseline,
    make_output_folder,
    run_models,
)


@dataclasses.dataclass
class ImageClassificationArguments(RunArguments):
    """The paper's recipe for ImageNet (table 8; Beyer et al., 2022), where a run does not say otherwise."""

    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "The peak learning rate."})
    lr_scheduler_type: str = dataclasses.field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = dataclasses.field(
        default=10_000, metadata={"help": "Steps to warm up, or below 1 their share."}
    )
    weight_decay: float = dataclasses.field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    # The images are turned into tensors as they are read, from columns that the model does not know.
    remove_unused_columns: bool = dataclasses.field(
        default=False, metadata={"help": "Whether to drop the columns that the model does not take."}
    )


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of images and their classes."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["label"] for example in examples]),
    }


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
    check_model(DCAForImageClassification, config)
    check_output_folder(run.training)
    check_hub(run.training)

    with run.training.main_process_first(desc="preparing the data"):
        train_images, held_out_images, names = load_images(data, config.num_channels, run.training.seed)
    for each in filter(None, (config, baseline)):
        each.id2label, each.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    height, width = config.image_height_width
    processor = ViTImageProcessor(
        size={"height": height, "width": width},
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )
    if run.training.should_save:
        make_output_folder(run)

    def to_tensors(examples: dict) -> dict:
        return {**processor(examples["image"], return_tensors="pt"), "label": examples["label"]}

    metric = Accuracy()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    source = "scikit-learn's handwritten digits (8 x 8 pixels)" if data.dataset == "digits" else data.dataset
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
        train_dataset=train_images.with_transform(to_tensors),
        eval_dataset=held_out_images.with_transform(to_tensors),
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )


if __name__ == "__main__":
    main()
