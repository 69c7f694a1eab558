"""
Measure whether images are prepared as fast as a vision transformer trains on them:

    python -m training.benchmarks.images [--workers 1 8 --batch 16 --device cuda ...]

The ImageNet recipe on JPEG files of a similar size, next to a training step of DCA's ViT-S/16. The files are in the cache of
the operating system: the disk is not measured. `--help` lists all arguments.
"""

import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from torch.utils.data import DataLoader

from modeling_dca import DCAForImageClassification, DCAVisionConfig
from training.benchmarks import report
from training.images.augmentation import mixed_cross_entropy
from training.images.fields import ImageDataArguments
from training.images.reading import ImageExamples, ImageFiles, collate
from training.images.task import image_processor
from training.results.record import RUNS_FOLDER
from training.support.errors import UserError, command
from training.support.machine import describe_machine
from training.support.parser import Parser, argument
from training.support.tables import align
from training.support.timing import interleave, seconds, spread


#: Height and width of the files, the most frequent ones in ImageNet, and the number of classes.
FILE_SIZE = (375, 500)
NUM_LABELS = 1000
RECIPE = {"random_crop": True, "horizontal_flip": True, "rand_augment_operations": 2, "mixup_alpha": 0.2}
STEP = "training step"
SMALLEST = {"images": 1, "batch": 1, "rounds": 1, "warmup": 1, "layers": 1, "image_size": 16}


@dataclasses.dataclass
class ImageBenchmarkArguments:
    """What to measure, and where."""

    images: int = argument(512, "Files per round.")
    batch: int = argument(16, "Images per batch and training step.")
    workers: list[int] = dataclasses.field(
        default_factory=lambda: sorted({1, os.cpu_count() or 1}),
        metadata={"help": "Numbers of worker processes; by default one, and as many as the machine has cores."},
    )
    layers: int = argument(12, "Number of blocks.")
    image_size: int = argument(224, "Height and width of the images after cropping.")
    device: str = argument("cpu", "Where the training step runs.")
    bf16: bool = argument(False, "Run the training step in bfloat16, as `--bf16` does in training.")
    rounds: int = argument(5, "Measured rounds.")
    warmup: int = argument(1, "Warm-up rounds.")
    output_dir: str = argument(f"{RUNS_FOLDER}/benchmarks/images", "The output folder.")
    overwrite: bool = argument(False, "Replace earlier results in `output_dir`.")

    def __post_init__(self):
        for name, smallest in SMALLEST.items():
            if getattr(self, name) < smallest:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least {smallest}.")
        if min(self.workers) < 1:
            raise UserError(f"`workers` is {min(self.workers)}; it must be at least 1.")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"`device` is {self.device!r}; it must be 'cpu' or 'cuda'.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("`device` is 'cuda', but PyTorch finds no GPU here: pass --device cpu.")


def write_files(folder: Path, count: int) -> Dataset:
    """JPEG files of large shapes with some noise, in ImageNet's layout and of the size of photographs (about 110 kB)."""
    generator, (height, width) = np.random.default_rng(0), FILE_SIZE
    (folder / "n00000000").mkdir()
    (folder / "n00000001").mkdir()
    for number in range(count):
        shapes = Image.fromarray(generator.integers(256, size=(height // 16, width // 16, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + generator.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"n0000000{number % 2}" / f"{number}.JPEG", quality=90)
    return load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder / "cache"))


def pipelines(arguments: ImageBenchmarkArguments, data: Dataset) -> dict[str, Callable]:
    """For each number of workers, a function that reads all images once."""
    config = DCAVisionConfig(image_size=arguments.image_size, patch_size=16)
    recipe = ImageDataArguments(**RECIPE)
    examples = ImageExamples(
        ImageFiles(data, 3, "benchmark"), image_processor(config, None), config.image_height_width, recipe
    )
    subjects = {}
    for workers in arguments.workers:
        loader = DataLoader(
            examples,
            arguments.batch,
            shuffle=True,
            collate_fn=lambda batch: collate(batch, NUM_LABELS),
            num_workers=workers,
            persistent_workers=True,
        )
        name = f"pipeline, {workers} worker{'s' if workers > 1 else ''}"
        subjects[name] = lambda loader=loader: sum(len(batch["labels"]) for batch in loader)
    return subjects


def training_step(arguments: ImageBenchmarkArguments) -> Callable[[], None]:
    """Forward and backward pass and a step of AdamW on a batch."""
    device = torch.device(arguments.device)
    config = DCAVisionConfig(
        image_size=arguments.image_size,
        patch_size=16,
        hidden_size=384,
        num_hidden_layers=arguments.layers,
        num_attention_heads=6,
        position_embedding="sincos",
        num_labels=NUM_LABELS,
    )
    model = DCAForImageClassification(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    pixel_values = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)
    labels = torch.rand(arguments.batch, NUM_LABELS, device=device).softmax(dim=-1)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            outputs = model(pixel_values)
        mixed_cross_entropy(outputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def benchmark(arguments: ImageBenchmarkArguments) -> dict:
    """Measure pipelines and training step in turns, and return the content of the file of results."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = write_files(Path(folder), arguments.images)
        subjects = {
            name: (run, arguments.images, torch.device("cpu")) for name, run in pipelines(arguments, data).items()
        }
        subjects[STEP] = (training_step(arguments), arguments.batch, device)

        def rate(subject: tuple[Callable, int, torch.device]) -> float:
            run, images, where = subject
            return images / seconds(run, where)

        values = interleave("images per second", subjects, rate, arguments.rounds, arguments.warmup)
        subjects.clear()  # ends the workers before their files go
    rates = {name: spread("rate", each) for name, each in values.items()}
    return {
        "title": f"ViT-S/16 with {arguments.layers} blocks, {arguments.image_size} px, batch {arguments.batch}, {device}"
        f"{', bfloat16' if arguments.bf16 else ''}",
        "command": shlex.join(["python", "-m", "training.benchmarks.images", *sys.argv[1:]]),
        "arguments": dataclasses.asdict(arguments),
        "machine": describe_machine(device),
        "rates": rates,
        "notes": [verdict({name: each["rate"] for name, each in rates.items()})],
    }


def verdict(rates: dict[str, float]) -> str:
    """A sentence on the bottleneck; `rates` are the images per second of each pipeline and of the training step."""
    name, best = max(((name, rate) for name, rate in rates.items() if name != STEP), key=lambda item: item[1])
    ratio = best / rates[STEP]
    return (
        f"The {STEP if ratio >= 1 else 'pipeline'} is the bottleneck: {name}, is {ratio:.2f} x as fast as the {STEP}."
    )


def table(results: dict) -> str:
    rows = [
        [name, f"{each['rate']:,.1f}", "{:,.1f} to {:,.1f}".format(*each["spread"])]
        for name, each in results["rates"].items()
    ]
    return "\n\n".join([align(["", "images/s", "spread"], rows), *results["notes"]])


@command
def main():
    description = "Measure whether images are prepared as fast as a vision transformer trains on them."
    parser = Parser(ImageBenchmarkArguments, "training.benchmarks.images", description)
    arguments = ImageBenchmarkArguments(**vars(parser.parse_args()))
    folder = report.make_output_folder(arguments)
    results = benchmark(arguments)
    (folder / report.RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{results['title']}\n\n{table(results)}\n\nThe results are in {folder}.")


if __name__ == "__main__":
    main()
