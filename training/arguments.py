"""
The arguments of a run: a YAML file with the sections `model`, `data` and `training`, over the file that its `base` names,
and the command line over both.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from accelerate.utils import GradientAccumulationPlugin
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, SchedulerType, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.training_args import OptimizerNames

from modeling_dca import DCABaseConfig
from modeling_dca.configuration_dca import nearest_name
from training.errors import UserError, innermost_message
from training.initial import initial_config


CONFIGURATION_ROOM = "configuration"
RUNS_FOLDER = "runs"
# What was asked for, in the folder of a run.
RECORD = "run.yaml"
# Where and how a run ended whose loss or weights became NaN or infinite.
DIVERGED = "diverged.json"
# The key of a YAML file that names another one, whose fields it takes where it has none of its own.
BASE = "base"
# What `resume_from_checkpoint` is when it is given without a path.
LAST = "last"

# The field of the section `model` that is no field of its configuration.
INITIAL_CHECKPOINT = "initial_checkpoint"

# Fields of a model's configuration that the run sets itself, from the tokenizer or the labels, or that the trainer has,
# and what a model that starts from random weights does not have.
NOT_MODEL_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "source_config"}

# From where to where a field may be: what the Trainer meets only when it is too late for a sentence, or never.
BOUNDS = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "global_batch_size": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_bucket_cap_mb": (1, math.inf),
    "ddp_timeout": (1, 10**9),  # more than 30 years, and less than a date can hold
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "eval_delay": (0, math.inf),
    # What NumPy takes.
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}

# Fields that say something each so many steps, or each such share of all, by the field that says whether they are asked.
INTERVALS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}

# Fields that can have one value alone: with others the Trainer would fail when all is trained, or not do what they say.
FIXED = {
    "prediction_loss_only": (False, "a run reports more than its loss"),
    "eval_do_concat_batches": (True, "a run reports figures of all that was held out"),
    "batch_eval_metrics": (False, "a run reports figures of all that was held out"),
    "include_for_metrics": ([], "the figures of a run need no more"),
    "label_names": (None, "all models that are trained here name them alike"),
    "length_column_name": ("length", "all examples have one length"),
    "use_liger_kernel": (False, "Liger has no kernels for these models"),
    "liger_kernel_config": (None, "Liger has no kernels for these models"),
    "deepspeed": (None, "a run is shared out among devices by the files of configuration/accelerate"),
    "parallelism_config": (None, "a run is shared out among devices by the files of configuration/accelerate"),
    "enable_jit_checkpoint": (False, "SIGTERM has a checkpoint written in any case"),
    "use_cache": (False, "there is nothing to keep in a cache where nothing is generated"),
    "do_predict": (False, "a run has nothing to predict"),
    "restore_callback_states_from_checkpoint": (False, "what is to be restored is, in any case"),
}


def check_one_gpu(arguments: TrainingArguments) -> None:
    """
    Raises:
        [`UserError`]: one process has several GPUs, over which the Trainer would spread it in a way that is not tested here.
    """
    if arguments.n_gpu > 1:
        line = shlex.join(["-m", f"training.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        raise UserError(
            f"There are {arguments.n_gpu} GPUs, for which as many processes are needed: `accelerate launch --config_file "
            f"configuration/accelerate/ddp.yaml --num_processes {arguments.n_gpu} {line}`; or let this one see one GPU alone, "
            "with CUDA_VISIBLE_DEVICES=0."
        )


@dataclasses.dataclass
class RunArguments(TrainingArguments):
    """The fields of [`~transformers.TrainingArguments`], with what every run of this project has."""

    #: What is measured on held-out data, and whether more of it is better.
    held_out_metrics: ClassVar[dict[str, bool]] = {"loss": False}

    baseline: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A residual scheme to train too, on the same batches, for comparison: 'standard', say; or 'none'."
        },
    )
    global_batch_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The examples of a training step over all devices; `gradient_accumulation_steps` follows from it, "
            "whatever the number of devices. An epoch is filled up to whole steps, with examples drawn again."
        },
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "Delete an earlier run that `output_dir` holds, and start again."}
    )
    push_to_hub: bool = dataclasses.field(
        default=False, metadata={"help": "Publish the run on the Hub when it is complete, as `training.publish` does."}
    )
    hub_strategy: str = dataclasses.field(
        default="end", metadata={"help": "When to push to the Hub: 'end', the only time that a run is whole."}
    )
    model_license: str = dataclasses.field(
        default="apache-2.0", metadata={"help": "The license that the model card states for the weights."}
    )
    optim: OptimizerNames | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The optimizer; if not given, 'adamw_torch' on an XLA device and "
            f"{TrainingArguments.default_optim!r} on others."
        },
    )
    # Every weight has a part in every loss.
    ddp_find_unused_parameters: bool = dataclasses.field(
        default=False,
        metadata={"help": "Have several devices look, in every step, for weights that had no part in it."},
    )
    # A loss that is not finite must be seen, not replaced by the last finite one.
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "Whether to leave losses that are not finite out of the logs."}
    )
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where to log to: integrations of the Trainer, 'all' that are installed, or 'none'."},
    )
    # (The parser takes what is a word or a truth value for a truth value alone.)
    include_num_input_tokens_seen: str = dataclasses.field(
        default="no",
        metadata={"help": "Whether to count the tokens that are trained on: 'all', 'non_padding' or 'no'."},
    )

    def __post_init__(self):
        self._check_values()
        self._set_words()
        self._set_metric()
        chosen_optimizer = self.optim
        if chosen_optimizer is None:
            self.optim = self.default_optim
        super().__post_init__()
        accumulation = self.accelerator_config.gradient_accumulation_kwargs or {}
        GradientAccumulationPlugin(**accumulation)  # which knows its fields
        if "num_steps" in accumulation:
            raise ValueError(
                "`accelerator_config` has `num_steps`: leave it out, and set `gradient_accumulation_steps`."
            )
        if self.global_batch_size is not None and self.accelerator_config.split_batches:
            raise ValueError("`accelerator_config` has `split_batches`, but `global_batch_size` says what a batch is.")
        if self.device.type == "cpu" and self.fp16:
            raise ValueError("`fp16` is for GPUs: leave it out on a CPU, or choose `bf16`.")
        if DebugOption.TPU_METRICS_DEBUG in self.debug and self.device.type != "xla":
            raise ValueError(f"`debug` is {DebugOption.TPU_METRICS_DEBUG.value!r}, but there is no TPU: leave it out.")
        if self.greater_is_better and self.lr_scheduler_type in (
            SchedulerType.REDUCE_ON_PLATEAU,
            SchedulerType.GREEDY,
        ):
            # (Left to itself, the schedule would take a metric that rises for one that gets no better.)
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.device.type == "xla":
            self._set_xla_defaults(chosen_optimizer)
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(f"`hub_strategy` is {str(self.hub_strategy.value)!r}; only 'end' is supported.")
        if self.global_batch_size is not None:
            self._set_gradient_accumulation_steps()

    def _check_values(self):
        """
        Raises:
            `ValueError`: a field has a value with which the Trainer would fail later, or do something else without a word.
        """
        for name, (smallest, largest) in BOUNDS.items():
            value = getattr(self, name)
            # (Comparing so, and not with `<`, refuses NaN, too.)
            if value is not None and not (smallest <= value <= largest and value < math.inf):
                limit = "finite" if largest == math.inf else f"at most {largest}"
                raise ValueError(f"`{name}` is {value}; it must be at least {smallest}, and {limit}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"`max_grad_norm` is {self.max_grad_norm}; it must be at least 0.")
        for name, strategy in INTERVALS.items():
            value = getattr(self, name)
            if getattr(self, strategy) == "steps" and value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be steps from 1 on, or a share of all below 1.")
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps}; it must be whole steps, or a share of all below 1."
            )
        if self.max_steps == 0:
            raise ValueError("`max_steps` is 0; it must be at least 1, or -1 for the steps of `num_train_epochs`.")
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}; it must be above 0, and finite.")
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; leave it out: {reason}.")
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but `dataloader_num_workers` is 0: set that, too."
                )
        if self.optim_target_modules is not None and not any(name in str(self.optim) for name in ("galore", "apollo")):
            raise ValueError(
                f"`optim_target_modules` is {self.optim_target_modules!r}, which is for GaLore and APOLLO alone: leave it out, "
                "or choose such an `optim`."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but all examples have one length: choose "
                "'random' or 'sequential'."
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "`save_strategy` is 'best', but nothing is evaluated to find it: set `eval_strategy`, too."
            )

    def _set_words(self):
        """Give fields that are words, or lists of words, what the Trainer takes."""
        self.report_to = (
            [self.report_to] if isinstance(self.report_to, str) else list(dict.fromkeys(self.report_to or []))
        )
        self.fsdp = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        for alone in {"all", "none"}.intersection(self.report_to):
            if len(self.report_to) > 1:
                raise ValueError(
                    f"`report_to` is {self.report_to}, but {alone!r} goes alone: leave it, or the others, out."
                )
        counted = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(counted, counted)
        if self.include_num_input_tokens_seen not in ("all", "non_padding", "no"):
            raise ValueError(
                f"`include_num_input_tokens_seen` is {counted!r}; it must be one of 'all', 'non_padding' and 'no'."
            )

    def _set_metric(self):
        """Know the metric that finds the best model, and that of two perplexities the lower one is better."""
        if self.metric_for_best_model is None:
            return
        name = self.metric_for_best_model.removeprefix("eval_")
        if name not in self.held_out_metrics:
            raise ValueError(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}; {nearest_name(name, self.held_out_metrics)}"
            )
        if self.greater_is_better is None:
            self.greater_is_better = self.held_out_metrics[name]

    def _set_xla_defaults(self, chosen_optimizer: OptimizerNames | None):
        if chosen_optimizer is None:
            self.optim = OptimizerNames.ADAMW_TORCH
        elif self.optim == OptimizerNames.ADAMW_TORCH_FUSED:
            raise ValueError(
                f"`optim` is {self.optim.value!r}, which XLA devices do not have: leave it out, or name 'adamw_torch'."
            )
        if self.eval_accumulation_steps is None:
            # On the device, what the batches so far gave would be a tensor, and so a graph, of another size with each.
            self.eval_accumulation_steps = 1

    def _set_gradient_accumulation_steps(self):
        at_once = self.per_device_train_batch_size * self.world_size
        steps, rest = divmod(self.global_batch_size, at_once)
        if rest:
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, but must be a multiple of {at_once}: "
                f"`per_device_train_batch_size` is {self.per_device_train_batch_size}, and the number of devices "
                f"{self.world_size}."
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but follows from "
                f"`global_batch_size` = {self.global_batch_size} as {steps}: leave one of them out."
            )
        self.gradient_accumulation_steps = steps


class Run(NamedTuple):
    """A run as it was asked for."""

    config: DCABaseConfig
    initial_checkpoint: str | None
    data: Any
    training: RunArguments
    named: dict[str, dict[str, Any]]  # the fields that the YAML file or the command line names, by section


# How a run is started is no part of what it is.
NOT_RECORDED = {"hub_token", "overwrite", "resume_from_checkpoint"}


class _RunParser(HfArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(
            prog, max_help_position=32, width=min(120, os.get_terminal_size().columns if os.isatty(1) else 120)
        )

    def add_usage(self, usage, actions, groups, prefix=None):
        # All of the fields stand below, with their meaning; they need not stand in the usage, too.
        super().add_usage(f"{self._prog} CONFIGURATION.yaml [--field value ...]", actions, groups, prefix)


def _field_documentation(config_class: type[DCABaseConfig]) -> dict[str, str]:
    """What the docstrings of DCA's configuration classes say of each field."""
    documentation = {}
    for parent in reversed(config_class.__mro__[: config_class.__mro__.index(DCABaseConfig) + 1]):
        for name, text in re.findall(
            r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)", parent.__doc__ or "", flags=re.MULTILINE
        ):
            documentation[name] = " ".join(text.split())
    return documentation


def model_fields(config_class: type[DCABaseConfig]) -> list[str]:
    """The names of the fields of a model's configuration that a run can choose."""
    return [name for name in _field_documentation(config_class) if name not in NOT_MODEL_FIELDS]


def known_fields(model_class, data_class, training_class) -> dict[str, list[str]]:
    """The names of the fields of a run, by section."""
    return {
        "model": [*model_fields(model_class.config_class), INITIAL_CHECKPOINT],
        "data": [field.name for field in dataclasses.fields(data_class)],
        "training": [field.name for field in dataclasses.fields(training_class) if field.init],
    }


class _YamlLoader(yaml.SafeLoader):
    """A loader that refuses a key that is there twice, of which the first would be lost."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.composer.ComposerError(
                    "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                )
            seen.add(name)
        return node


def load_yaml(text: str) -> Any:
    """
    Raises:
        `yaml.YAMLError`: the text is no YAML, or has a key twice.
    """
    return yaml.load(text, Loader=_YamlLoader)


def _yaml_value(text: str) -> Any:
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from error
    if isinstance(value, str):
        try:  # YAML 1.1 does not take 1e-6 for a number
            return float(value)
        except ValueError:
            return value
    return value


def _build_parser(command: str, description: str, config_class, data_class, training_class) -> _RunParser:
    data_class._argument_group_name, training_class._argument_group_name = "data", "training"
    parser = _RunParser(
        [data_class, training_class],
        prog=f"python -m {command}",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configuration", metavar="CONFIGURATION.yaml", help="the file that names model, data and run")
    group = parser.add_argument_group("model")
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    documentation = _field_documentation(config_class)
    for name in model_fields(config_class):
        # Fields that are not given are left to the configuration class.
        help_text = f"{documentation[name]} (default: {defaults[name]})".replace("%", "%%")
        group.add_argument(f"--{name}", type=_yaml_value, default=argparse.SUPPRESS, metavar="VALUE", help=help_text)
    group.add_argument(
        f"--{INITIAL_CHECKPOINT}",
        help="The path or Hub id of a checkpoint to start from instead of random weights: of DCA, or of a residual model "
        "that becomes DCA. All fields that decide the shape of the model are then those of the checkpoint.",
    )
    # `--resume_from_checkpoint` alone means the last checkpoint.
    resume = parser._option_string_actions["--resume_from_checkpoint"]
    resume.nargs, resume.const = "?", LAST
    return parser


def _read_yaml(path: Path, sections: dict[str, list[str]], named_by: tuple[Path, ...] = ()) -> dict[str, dict]:
    """
    The fields that a run's YAML file sets, by section, over those of the file that its `base` names.

    Args:
        named_by: the files that lead here by their `base`, the run's own first.
    """
    name = f"The configuration {path}" + (f", the `{BASE}` of {named_by[-1]}," if named_by else "")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not a YAML file: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} is not a YAML file with the sections {', '.join(sections)}.")
    merged = {}
    if BASE in content:
        base, named_by = content.pop(BASE), (*named_by, path)
        if not isinstance(base, str):
            raise UserError(
                f"`{BASE}` of {path} is {base!r}; it must be the path of a YAML file, as seen from the folder of this one."
            )
        base_file = path.parent / base
        if os.path.realpath(base_file) in map(os.path.realpath, named_by):
            raise UserError(f"`{BASE}` of {path} is {base!r}, but no file can be its own base: name another.")
        merged = _read_yaml(base_file, sections, named_by)
    for section, fields in content.items():
        if section not in sections:
            raise UserError(
                f"The configuration {path} has an unknown section {section!r}; {nearest_name(section, [*sections, BASE])}"
            )
        fields = {} if fields is None else fields
        if not isinstance(fields, dict):
            raise UserError(f"The section {section!r} of {path} is {fields!r}; it must name fields and their values.")
        for name in fields:
            if name not in sections[section]:
                raise UserError(
                    f"The section {section!r} of {path} has an unknown field {name!r}; {_nearest(name, sections[section])}"
                )
        merged[section] = {**merged.get(section, {}), **fields}
    return merged


def read_record(file: Path) -> dict[str, dict] | None:
    """What was asked for of a run, by section; `None` if the record is damaged."""
    try:
        record = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    sections = ("model", "data", "training")
    return (
        record if isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in sections) else None
    )


def as_arguments(content: dict[str, dict]) -> list[str]:
    """The fields of a YAML file as command-line arguments."""
    arguments = []
    for section, fields in content.items():
        for name, value in fields.items():
            if isinstance(value, list) and section != "model":
                arguments += [f"--{name}", *map(str, value)]
            elif isinstance(value, (dict, list, bool)) or (section == "model" and value is None):
                arguments.append(f"--{name}={json.dumps(value)}")
            elif value is not None:
                arguments.append(f"--{name}={value}")
    return arguments


def _nearest(name: str, known: list[str]) -> str:
    """The nearest known field: a run has too many of them to list."""
    sentence = nearest_name(name, known)
    return sentence.partition(" Known: ")[0] if sentence.startswith("did you mean") else "see --help for all fields."


def default_output_dir(configuration_file: Path) -> Path:
    """`runs/<path below configuration>`, or `runs/<name>` for a file from elsewhere."""
    parts = configuration_file.with_suffix("").parts
    if CONFIGURATION_ROOM in parts:
        last = len(parts) - 1 - parts[::-1].index(CONFIGURATION_ROOM)
        return Path(RUNS_FOLDER, *parts[last + 1 :])
    return Path(RUNS_FOLDER, parts[-1])


def parse_run(argv: list[str], command: str, description: str, model_class, data_class, training_class) -> Run:
    """
    The run that `argv` (`CONFIGURATION.yaml [--field value ...]`) asks for.

    Raises:
        [`UserError`]: with the field or file, its value and what would be right.
    """
    parser = _build_parser(command, description, model_class.config_class, data_class, training_class)
    if not argv or argv[0].startswith("-"):
        parser.parse_args([argument for argument in argv if argument in ("-h", "--help")])
    configuration_file = Path(argv[0])
    sections = known_fields(model_class, data_class, training_class)
    arguments = as_arguments(_read_yaml(configuration_file, sections))
    known = [name for names in sections.values() for name in names]
    named = {"output_dir"}
    for argument in [*arguments, *argv[1:]]:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            if name.startswith("no_") and name not in known:
                name = name.removeprefix("no_")
            if name not in known and name != "help":
                raise UserError(f"Unknown field --{name} on the command line; {_nearest(name, known)}")
            named.add(name)
    try:
        data, training, rest = parser.parse_args_into_dataclasses(
            [argv[0], f"--output_dir={default_output_dir(configuration_file)}", *arguments, *argv[1:]],
            look_for_args_file=False,
        )
        model = {name: value for name, value in vars(rest).items() if name != "configuration"}
        fields, checkpoint = dict(model), model[INITIAL_CHECKPOINT]
        del fields[INITIAL_CHECKPOINT]
        if checkpoint is None:
            config = model_class.config_class(**fields)
        else:
            config = initial_config(model_class, checkpoint, fields)
    except (StrictDataclassError, ValueError, TypeError, ImportError, OSError, OverflowError) as error:
        raise UserError(f"{configuration_file} and the command line: {innermost_message(error)}") from error
    if data.is_split_drawn:
        named.add("split_seed")  # so that no other default can ever hold out something else
    values = {"model": model, "data": vars(data), "training": training.to_dict()}
    values["training"]["report_to"] = training.report_to or ["none"]  # an empty list is none that could be given
    record = {
        section: {name: value for name, value in values[section].items() if name in named - NOT_RECORDED}
        for section in sections
    }
    if training.hub_token is not None:
        # The token must reach the client, but none of the files that training arguments are saved to.
        os.environ["HF_TOKEN"] = training.hub_token
        training.hub_token = None
    return Run(config, checkpoint, data, training, json.loads(json.dumps(record, default=str)))
