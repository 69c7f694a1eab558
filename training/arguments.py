"""The arguments of a run: a YAML file with the sections `model`, `data` and `training`, and the command line over it."""

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import nearest_name
from training.errors import UserError, innermost_message


CONFIGURATION_ROOM = "configuration"
RUNS_FOLDER = "runs"
# What was asked for, in the folder of a run.
RECORD = "run.yaml"
# What `resume_from_checkpoint` is when it is given without a path.
LAST = "last"

# Fields of a model's configuration that the run sets itself, from the tokenizer or the labels, or that the trainer has,
# and what a model that starts from random weights does not have.
NOT_MODEL_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "residual_config"}

# What the Trainer meets only when it is too late for a sentence.
SMALLEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
}


@dataclasses.dataclass
class RunArguments(TrainingArguments):
    """The fields of [`~transformers.TrainingArguments`], with what every run of this project has."""

    baseline: str | None = dataclasses.field(
        default=None,
        metadata={"help": "A residual scheme to train too, on the same batches, for comparison: 'standard', say."},
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
    # A loss that is not finite must be seen, not replaced by the last finite one.
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "Whether to leave losses that are not finite out of the logs."}
    )
    report_to: str | None = dataclasses.field(
        default="tensorboard", metadata={"help": "Where to log to: an integration of the Trainer, or 'none'."}
    )

    def __post_init__(self):
        for name, smallest in SMALLEST.items():
            # (Comparing so, and not with `<`, refuses NaN, too.)
            if not getattr(self, name) >= smallest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {smallest}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 0 and below 1.")
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(f"`hub_strategy` is {str(self.hub_strategy.value)!r}; only 'end' is supported.")


class Run(NamedTuple):
    """A run as it was asked for."""

    config: DCAConfig
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


def _field_documentation(config_class: type[DCAConfig]) -> dict[str, str]:
    """What the docstrings of DCA's configuration classes say of each field."""
    documentation = {}
    for parent in reversed(config_class.__mro__[: config_class.__mro__.index(DCAConfig) + 1]):
        for name, text in re.findall(
            r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)", parent.__doc__ or "", flags=re.MULTILINE
        ):
            documentation[name] = " ".join(text.split())
    return documentation


def model_fields(config_class: type[DCAConfig]) -> list[str]:
    """The names of the fields of a model's configuration that a run can choose."""
    return [name for name in _field_documentation(config_class) if name not in NOT_MODEL_FIELDS]


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
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
    # `--resume_from_checkpoint` alone means the last checkpoint.
    resume = parser._option_string_actions["--resume_from_checkpoint"]
    resume.nargs, resume.const = "?", LAST
    return parser


def _read_yaml(path: Path, sections: dict[str, list[str]]) -> list[str]:
    """The fields that a run's YAML file sets, as command-line arguments."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration {path} is not a YAML file: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The configuration {path} is not a YAML file with the sections {', '.join(sections)}.")
    arguments = []
    for section, fields in content.items():
        if section not in sections:
            raise UserError(
                f"The configuration {path} has an unknown section {section!r}; {nearest_name(section, sections)}"
            )
        fields = {} if fields is None else fields
        if not isinstance(fields, dict):
            raise UserError(f"The section {section!r} of {path} is {fields!r}; it must name fields and their values.")
        for name, value in fields.items():
            if name not in sections[section]:
                raise UserError(
                    f"The section {section!r} of {path} has an unknown field {name!r}; {_nearest(name, sections[section])}"
                )
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


def parse_run(argv: list[str], command: str, description: str, config_class, data_class, training_class) -> Run:
    """
    The run that `argv` (`CONFIGURATION.yaml [--field value ...]`) asks for.

    Raises:
        [`UserError`]: with the field or file, its value and what would be right.
    """
    parser = _build_parser(command, description, config_class, data_class, training_class)
    if not argv or argv[0].startswith("-"):
        parser.parse_args([argument for argument in argv if argument in ("-h", "--help")])
    configuration_file = Path(argv[0])
    sections = {
        "model": model_fields(config_class),
        "data": [field.name for field in dataclasses.fields(data_class)],
        "training": [field.name for field in dataclasses.fields(training_class) if field.init],
    }
    arguments = _read_yaml(configuration_file, sections)
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
        config = config_class(**model)
    except (StrictDataclassError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{configuration_file} and the command line: {innermost_message(error)}") from error
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
    return Run(config, data, training, json.loads(json.dumps(record, default=str)))
