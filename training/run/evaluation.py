"""The evaluation of a checkpoint on held-out data, with the metrics of a run."""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from training.data.splits import DataArguments
from training.results.card import METRICS
from training.results.metrics import TAKEN
from training.results.record import find_record, read_record
from training.run.fields import check_one_gpu
from training.run.parallel import processes_per_batch
from training.run.task import Task
from training.support.errors import UserError, innermost_message, told
from training.support.files import read_json, write_whole
from training.support.parser import Parser
from training.support.tables import align
from training.variants.registry import VARIANTS


DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class EvaluationArguments:
    """How a checkpoint is evaluated."""

    batch_size: int = dataclasses.field(default=8, metadata={"help": "The batch size on each device."})
    device: str | None = dataclasses.field(
        default=None, metadata={"help": "'cpu', 'cuda', ...; by default the best one available."}
    )
    dtype: str | None = dataclasses.field(
        default=None,
        metadata={"help": f"The precision of the weights: {', '.join(DTYPES)}; by default that of the checkpoint."},
    )
    metrics: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Additional metrics of `evaluate`: names on the Hub ('f1'), or paths ('./my_metric'). Predictions and "
            "references are classes, or the next tokens of a text."
        },
    )
    output: str | None = dataclasses.field(default=None, metadata={"help": "A JSON file for the results."})
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace an existing `output`."})

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}; it must be at least 1.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if self.output is not None and Path(self.output).exists() and not self.overwrite:
            raise ValueError(f"`output` is {self.output!r}, which exists: choose another file, or pass --overwrite.")


def find_task(tasks: Iterable[Task], config: PreTrainedConfig, checkpoint: str) -> tuple[Task, type[PreTrainedModel]]:
    """
    The task of a checkpoint, and the class that loads it.

    Raises:
        [`UserError`]: it belongs to none of the tasks.
    """
    architectures = config.architectures or []
    for task in tasks:
        classes = task.mapping.get(type(config), ())
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            if model_class.__name__ in architectures:
                return task, model_class
        for variant in VARIANTS.values():  # of the class that the task trains
            model_class = variant.model(task.model_class)
            if model_class.__name__ in architectures and type(config) is model_class.config_class:
                return task, model_class
    raise UserError(
        f"{checkpoint!r} is a {' or '.join(architectures) or config.model_type}; only causal language models and image "
        "classifiers can be evaluated."
    )


def parse_evaluation(argv: list[str], tasks: Sequence[Task], command: str, description: str) -> dict[str, Any]:
    """
    The arguments of [`evaluate`] from `argv` (`CHECKPOINT [--field value ...]`), with those of the checkpoint's run as
    defaults.

    Args:
        tasks: the task on text, and that on images.
        command, description: as [`Parser`] takes them.
    """
    named = bool(argv) and not argv[0].startswith("-")
    given = {each[2:].partition("=")[0].replace("-", "_") for each in argv if each.startswith("--")}
    defaults, precision, config, task, model_class = {}, {}, None, None, None
    data_classes = dict(zip(("data", "data (of images)"), (each.data_class for each in tasks)))
    if named:
        file = Path(argv[0], "config.json")
        if file.exists():  # (some releases of transformers do not report a damaged file)
            read_json(file)
        with told(argv[0], "evaluated"):
            config = AutoConfig.from_pretrained(argv[0])
        task, model_class = find_task(tasks, config, argv[0])
        data_classes = {"data": task.data_class}
        record = find_record(Path(argv[0]))
        if record is not None:
            run = read_record(record, "restore it, or delete it and give the data with --dataset")
            training = run["training"]
            # On other data, only the length of the blocks is kept. A run's tokenizer is in its folder, whatever it came from.
            kept = (
                ("block_size",)
                if given & {"dataset", "eval_dataset"}
                else {*run["data"], "split_seed"} - {"tokenizer"}
            )
            # (In earlier releases, the split used the run's seed.)
            run_data = {"split_seed": training.get("seed", 42), **run["data"]}
            defaults = {name: value for name, value in run_data.items() if name in kept}
            if "eval_split" in given:
                defaults.pop("eval_dataset", None)
            if "per_device_eval_batch_size" in training:
                defaults["batch_size"] = training["per_device_eval_batch_size"]
            if "metrics" in training:
                defaults["metrics"] = training["metrics"]
            if training.get("use_cpu"):
                defaults["device"] = "cpu"
            precision = {name: training[name] for name in ("bf16", "fp16") if training.get(name)}
    parser = Parser(
        {**data_classes, "evaluation": EvaluationArguments},
        command,
        description,
        usage="%(prog)s CHECKPOINT [--field value ...]",
        conflict_handler="resolve",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder or Hub id of a model")
    parser.set_defaults(**defaults)
    if "--tokenizer" in parser._option_string_actions:
        parser._option_string_actions[
            "--tokenizer"
        ].help = "The path or Hub id of a tokenizer; by default the checkpoint's."
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    data, arguments = parsed
    if "eval_dataset" in given and "dataset" not in given:
        data.dataset = data.eval_dataset  # only the names of its classes are used
    asked = {"checkpoint": rest.checkpoint, "task": task, "model_class": model_class, "config": config}
    return {**asked, "data": data, "arguments": arguments, **({} if arguments.dtype else precision)}


def load_model(model_class: type[PreTrainedModel], checkpoint: str, dtype: str | None) -> PreTrainedModel:
    """
    Load a model, all of whose weights must be in its checkpoint.

    Raises:
        [`UserError`]: the checkpoint cannot be read, or lacks weights.
    """
    with told(checkpoint, "evaluated"):
        model, loading = model_class.from_pretrained(checkpoint, dtype=dtype or "auto", output_loading_info=True)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{checkpoint!r} lacks {len(missing)} weights of a {model_class.__name__}, for example {missing[0]}."
        )
    return model


@contextmanager
def held_out_trainer(
    checkpoint: str,
    task: Task,
    model_class: type[PreTrainedModel],
    data: DataArguments,
    arguments: EvaluationArguments,
    config: PreTrainedConfig,
    **precision: bool,
) -> Iterator[Trainer]:
    """
    A trainer that evaluates a checkpoint on held-out data, as [`evaluate`] does.

    Args:
        precision: the precision that a run used, `bf16` or `fp16`, as [`~transformers.TrainingArguments`] take it.

    Raises:
        [`UserError`]: the checkpoint cannot be read, or does not fit the data.
    """
    options = task.evaluation(data, config, checkpoint, arguments.metrics)
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
            if processes_per_batch(1) > 1:
                raise UserError(
                    "The launcher divides a model or its sequences, which evaluation does not support: launch with ddp.yaml."
                )
            device = trainer_arguments.device.type
            if arguments.device not in (None, device):
                raise UserError(
                    f"`device` is {arguments.device!r}, but the available device is {device!r}: leave it out."
                )
            trainer = Trainer(model, trainer_arguments, **options)
        except ValueError as error:
            raise UserError(f"{innermost_message(error)} (`--dtype` changes the precision.)") from error
        yield trainer


def evaluate(
    checkpoint: str,
    task: Task,
    model_class: type[PreTrainedModel],
    data: DataArguments,
    arguments: EvaluationArguments,
    config: PreTrainedConfig,
    **precision: bool,
) -> dict[str, Any]:
    """
    The held-out results of a checkpoint, by their names in a run's `all_results.json`.

    Arguments and errors are those of [`held_out_trainer`].
    """
    with held_out_trainer(checkpoint, task, model_class, data, arguments, config, **precision) as trainer:
        figures = trainer.evaluate()
    return {
        "checkpoint": checkpoint,
        "model": model_class.__name__,
        "parameters": trainer.model.num_parameters(),
        "task": task.name,
        "data": dataclasses.asdict(data),
        "examples": len(trainer.eval_dataset),
        "batch_size": arguments.batch_size,
        "device": trainer.args.device.type,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        **precision,
        **{name: value for name, value in figures.items() if name.startswith("eval_")},
    }


def report(figures: dict[str, Any], output: str | None) -> None:
    """
    Print the results of a checkpoint, and write them to a file, if one is given.

    Raises:
        [`UserError`]: the file cannot be written.
    """
    labels = {key: label for key, label, _ in METRICS[figures["task"]]}
    for key in figures:
        if key.startswith("eval_") and key.removeprefix("eval_") not in TAKEN:
            labels.setdefault(key, key.removeprefix("eval_"))  # of an additional metric
    rows = [[label, f"{figures[key]:.6g}"] for key, label in labels.items()]
    held_out = figures["data"]["eval_dataset"] or figures["data"]["dataset"]
    table = align(["", ""], rows)
    print(f"\n{figures['checkpoint']}, {figures['examples']:,} held-out examples of {held_out}:\n\n{table}\n")
    if output is not None:
        try:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(output), json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"`output` is {output!r}, which cannot be written: {error.strerror}.") from error
