"""
Evaluate a checkpoint on held-out data:

    python -m training.evaluate CHECKPOINT [--dataset ... --batch_size 32 --output FILE.json ...]

CHECKPOINT is the folder or Hub id of any causal language model or image classifier of this family or of transformers, and
its tokenizer or image processor is used. In the folder of a run it is evaluated on that run's own held-out data, with
what the run came to, unless told otherwise. `--eval_dataset FILE` alone evaluates on all of a file or folder. `--help`
after a checkpoint lists its fields.
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import modeling_dca  # noqa: F401 (registers the family with the Auto classes)
from training.arguments import RECORD, check_one_gpu
from training.benchmarks.report import align
from training.card import METRICS
from training.causal_lm import evaluation_options
from training.data import DataArguments
from training.errors import UserError, command, innermost_message, told
from training.image_classification import compute_accuracy
from training.images import ImageDataArguments, ImageExamples, ImageFiles, collate, load_images, numbered_as
from training.text import PackedBlocks, TextDataArguments, load_text
from training.tokenizer import load_tokenizer


#: By task: what loads its models, and the fields of its data.
TASKS = {
    "text-generation": (MODEL_FOR_CAUSAL_LM_MAPPING, TextDataArguments),
    "image-classification": (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, ImageDataArguments),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class EvaluationArguments:
    """How a checkpoint is evaluated."""

    batch_size: int = dataclasses.field(default=8, metadata={"help": "The examples of a batch, on each device."})
    device: str | None = dataclasses.field(
        default=None, metadata={"help": "'cpu', 'cuda', ...; if none, the best that there is."}
    )
    dtype: str | None = dataclasses.field(
        default=None,
        metadata={"help": f"The precision of the weights: {', '.join(DTYPES)}; if none, that of the checkpoint."},
    )
    output: str | None = dataclasses.field(default=None, metadata={"help": "A file to write the figures to, as JSON."})
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace the file that `output` names."})

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}; it must be at least 1.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if self.output is not None and Path(self.output).exists() and not self.overwrite:
            raise ValueError(f"`output` is {self.output!r}, which exists: name another file, or pass --overwrite.")


def find_record(checkpoint: Path) -> Path | None:
    """The record of the run that a folder is of: the run's own, or that of its baseline or of one of its checkpoints."""
    places = (checkpoint, *checkpoint.absolute().parents[:2])
    return next((place / RECORD for place in places if (place / RECORD).exists()), None)


def find_task(config: PreTrainedConfig, checkpoint: str) -> tuple[str, type[PreTrainedModel]]:
    """
    The task of a checkpoint, and the class that loads it.

    Raises:
        [`UserError`]: it is neither a language model nor an image classifier.
    """
    architectures = config.architectures or []
    for task, (mapping, _) in TASKS.items():
        classes = mapping.get(type(config), ())
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            if model_class.__name__ in architectures:
                return task, model_class
    raise UserError(
        f"{checkpoint!r} is a {' or '.join(architectures) or config.model_type}; what is evaluated are causal language models "
        "and image classifiers."
    )


def load_model(model_class: type[PreTrainedModel], checkpoint: str, dtype: str | None) -> PreTrainedModel:
    """
    Load a model of which all weights are in its checkpoint.

    Raises:
        [`UserError`]: the checkpoint cannot be read, or lacks weights.
    """
    with told(checkpoint, "evaluated"):
        model, loading = model_class.from_pretrained(checkpoint, dtype=dtype or "auto", output_loading_info=True)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{checkpoint!r} lacks {len(missing)} weights of a {model_class.__name__}: {missing[0]}, for one."
        )
    return model


def text_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """
    The mean loss of a batch, the same for all models: some add further losses to it in their own, and of some the trainer
    does not know how many labels that counts.
    """
    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=labels[:, 1:].numel())


def image_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """The same for images."""
    return cross_entropy(outputs["logits"].float(), labels)


def text_options(data: TextDataArguments, config: PreTrainedConfig, checkpoint: str) -> dict[str, Any]:
    """The held-out text in blocks, and how to evaluate on it."""
    limited = getattr(config, "position_embedding", "learned") == "learned"
    limited = limited and getattr(config, "rope_parameters", None) is None
    longest = getattr(config, "max_position_embeddings", None)
    if limited and longest is not None and data.block_size > longest:
        raise UserError(f"`block_size` is {data.block_size}, but {checkpoint!r} takes no more than {longest} tokens.")
    tokenizer = load_tokenizer(data.tokenizer or checkpoint, config.vocab_size)
    _, documents = load_text(data, held_out_only=True)
    held_out = PackedBlocks(documents, data.text_column, tokenizer, data.block_size, config.vocab_size)
    return evaluation_options(held_out, held_out.materialize()) | {"compute_loss_func": text_loss}


def image_options(data: ImageDataArguments, config: PreTrainedConfig, checkpoint: str) -> dict[str, Any]:
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
    # (Of classes that are only numbers, the last may be missing among the images.)
    elif len(names) > len(known) or has_names and len(names) < len(known):
        raise UserError(f"The data has {len(names)} classes, but {checkpoint!r} tells {len(known)} apart.")
    else:
        print(
            f"note: the classes have other names than the model's, {names[0]!r} for {known[0]!r}: they go by number."
        )
    files = ImageFiles(images, num_channels, data.eval_dataset or data.dataset)
    return {
        "eval_dataset": ImageExamples(files, processor, size=None),
        "data_collator": functools.partial(collate, num_labels=len(known)),
        "compute_metrics": compute_accuracy,
        "compute_loss_func": image_loss,
    }


def evaluate(
    checkpoint: str, data: DataArguments, arguments: EvaluationArguments, config: PreTrainedConfig, **precision: bool
) -> dict[str, Any]:
    """
    The held-out figures of a checkpoint, by the names that they have in a run's `all_results.json`.

    Args:
        precision: in what a run trained and evaluated, `bf16` or `fp16`, as [`~transformers.TrainingArguments`] take it.

    Raises:
        [`UserError`]: the checkpoint cannot be read, or the data does not go with it.
    """
    task, model_class = find_task(config, checkpoint)
    options = text_options if task == "text-generation" else image_options
    options = options(data, config, checkpoint)
    model = load_model(model_class, checkpoint, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer_arguments = TrainingArguments(
                folder,
                per_device_eval_batch_size=arguments.batch_size,
                use_cpu=arguments.device == "cpu" or (bool(precision) and not torch.accelerator.is_available()),
                average_tokens_across_devices=False,
                remove_unused_columns=False,
                report_to="none",
                **precision,
            )
            check_one_gpu(trainer_arguments)
            device = trainer_arguments.device.type
            if arguments.device not in (None, device):
                raise UserError(
                    f"`device` is {arguments.device!r}, but what there is here is {device!r}: leave it out."
                )
            trainer = Trainer(model, trainer_arguments, **options)
        except ValueError as error:
            raise UserError(f"{innermost_message(error)} (`--dtype` sets another precision.)") from error
        figures = trainer.evaluate()
    return {
        "checkpoint": checkpoint,
        "model": model_class.__name__,
        "parameters": model.num_parameters(),
        "task": task,
        "data": dataclasses.asdict(data),
        "examples": len(options["eval_dataset"]),
        "batch_size": arguments.batch_size,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        **precision,
        **{name: value for name, value in figures.items() if name.startswith("eval_")},
    }


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(HfArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(message)


def parse(argv: list[str]) -> tuple[str, DataArguments, EvaluationArguments, PreTrainedConfig, dict[str, bool]]:
    """What `argv` (`CHECKPOINT [--field value ...]`) asks for, where it names nothing of what the run had."""
    named = bool(argv) and not argv[0].startswith("-")
    given = {each[2:].partition("=")[0].replace("-", "_") for each in argv if each.startswith("--")}
    defaults, precision, data_classes, config = {}, {}, [TextDataArguments, ImageDataArguments], None
    if named:
        with told(argv[0], "evaluated"):
            config = AutoConfig.from_pretrained(argv[0])
        data_classes = [TASKS[find_task(config, argv[0])[0]][1]]
        record = find_record(Path(argv[0]))
        if record is not None:
            run = yaml.safe_load(record.read_text(encoding="utf-8"))
            training = run["training"]
            # On other data, the blocks are as long, and nothing else of the run's data counts. A run's tokenizer is in its
            # folder, whatever it was made from.
            kept = (
                ("block_size",)
                if given & {"dataset", "eval_dataset"}
                else {*run["data"], "split_seed"} - {"tokenizer"}
            )
            # (Before the split had a seed of its own, it was the run's.)
            run_data = {"split_seed": training.get("seed", 42), **run["data"]}
            defaults = {name: value for name, value in run_data.items() if name in kept}
            if "eval_split" in given:
                defaults.pop("eval_dataset", None)
            if "per_device_eval_batch_size" in training:
                defaults["batch_size"] = training["per_device_eval_batch_size"]
            if training.get("use_cpu"):
                defaults["device"] = "cpu"
            precision = {name: training[name] for name in ("bf16", "fp16") if training.get(name)}
    for data_class, name in zip(data_classes, ("data", "data (of images)")):
        data_class._argument_group_name = name
    parser = _Parser(
        [*data_classes, EvaluationArguments],
        prog="python -m training.evaluate",
        usage="%(prog)s CHECKPOINT [--field value ...]",
        description=__doc__,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder or Hub id of a model")
    parser.set_defaults(**defaults)
    if "--tokenizer" in parser._option_string_actions:
        parser._option_string_actions[
            "--tokenizer"
        ].help = "Another tokenizer than the checkpoint's: its path or Hub id."
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    data, arguments = parsed
    if "eval_dataset" in given and "dataset" not in given:
        data.dataset = data.eval_dataset  # of which nothing is needed but the names of the classes
    return rest.checkpoint, data, arguments, config, {} if arguments.dtype else precision


@command
def main():
    checkpoint, data, arguments, config, precision = parse(sys.argv[1:])
    figures = evaluate(checkpoint, data, arguments, config, **precision)
    rows = [[label, f"{figures[key]:.6g}"] for key, label, _ in METRICS[figures["task"]]]
    held_out = data.eval_dataset or data.dataset
    print(f"\n{checkpoint}, {figures['examples']:,} held-out examples of {held_out}:\n\n{align(['', ''], rows)}\n")
    if arguments.output is not None:
        try:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"`output` is {arguments.output!r}, which cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    main()
