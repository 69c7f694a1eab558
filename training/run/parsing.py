"""
The arguments of a run: a YAML file with the sections `model`, `data` and `training`. Its fields override those of the file
that its `base` names, and the command line overrides both.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.auto_docstring import parse_docstring

from modeling_dca import DCABaseConfig
from modeling_dca.configuration_dca import nearest_name
from training.results.record import RUNS_FOLDER
from training.run.fields import LAST, Run
from training.run.initial import INITIAL_CHECKPOINT, initial_config
from training.support.errors import UserError, innermost_message
from training.support.files import load_yaml
from training.support.parser import Parser
from training.variants.registry import VARIANTS


CONFIGURATION_ROOM = "configuration"
# The key of a YAML file that names another file, whose fields it inherits.
BASE = "base"

# Fields of a model's configuration that a run cannot choose: they come from the tokenizer, from the labels or from the
# trainer, or do not apply to a model that starts from random weights.
NOT_MODEL_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "source_config"}


# Fields that say how a run is started, not what it is.
NOT_RECORDED = {"hub_token", "overwrite", "resume_from_checkpoint"}


def _field_documentation(config_class: type[DCABaseConfig]) -> dict[str, str]:
    """The description of each field in the docstrings of DCA's configuration classes."""
    documentation = {}
    for parent in reversed(config_class.__mro__[: config_class.__mro__.index(DCABaseConfig) + 1]):
        for paragraph in (parent.__doc__ or "").split("\n\n"):
            if paragraph.lstrip().startswith("Args:"):
                fields, _ = parse_docstring(paragraph)
                documentation |= {name: " ".join(told["description"].split()) for name, told in fields.items()}
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


def _yaml_value(text: str) -> Any:
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from error
    if isinstance(value, str):
        try:  # in YAML 1.1, 1e-6 is not a number
            return float(value)
        except ValueError:
            return value
    return value


def _build_parser(command: str, description: str, config_class, data_class, training_class) -> Parser:
    usage = "%(prog)s CONFIGURATION.yaml [--field value ...]"  # all fields are listed below
    parser = Parser({"data": data_class, "training": training_class}, command, description, usage=usage)
    parser.add_argument("configuration", metavar="CONFIGURATION.yaml", help="the file that names model, data and run")
    group = parser.add_argument_group("model")
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    documentation = _field_documentation(config_class)
    for name in model_fields(config_class):
        # The configuration class sets the defaults.
        help_text = f"{documentation[name]} (default: {defaults[name]})".replace("%", "%%")
        group.add_argument(f"--{name}", type=_yaml_value, default=argparse.SUPPRESS, metavar="VALUE", help=help_text)
    group.add_argument(
        f"--{INITIAL_CHECKPOINT}",
        help="The path or Hub id of a checkpoint to start from instead of random weights: a DCA model, or a residual model to "
        "convert to DCA. The checkpoint then decides all fields of the model's architecture.",
    )
    # `--resume_from_checkpoint` alone means the last checkpoint.
    resume = parser._option_string_actions["--resume_from_checkpoint"]
    resume.nargs, resume.const = "?", LAST
    resume.help = (
        "Resume the run in `output_dir` from its last checkpoint, or from the given path. 'auto' starts a run if there is none, "
        "and otherwise resumes it from the last checkpoint that is intact."
    )
    return parser


def _read_yaml(path: Path, sections: dict[str, list[str]], named_by: tuple[Path, ...] = ()) -> dict[str, dict]:
    """
    The fields that a run's YAML file sets, by section, merged with those of the file that its `base` names.

    Args:
        named_by: the files whose `base` leads here, the run's own first.
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
                f"`{BASE}` of {path} is {base!r}; it must be the path of a YAML file, relative to the folder of this one."
            )
        base_file = path.parent / base
        if os.path.realpath(base_file) in map(os.path.realpath, named_by):
            raise UserError(f"`{BASE}` of {path} is {base!r}, but a file cannot be its own base: name another file.")
        merged = _read_yaml(base_file, sections, named_by)
    for section, fields in content.items():
        if section not in sections:
            raise UserError(
                f"The configuration {path} has an unknown section {section!r}; {nearest_name(section, [*sections, BASE])}"
            )
        fields = {} if fields is None else fields
        if not isinstance(fields, dict):
            raise UserError(f"The section {section!r} of {path} is {fields!r}; it must map fields to values.")
        for name in fields:
            if name not in sections[section]:
                raise UserError(
                    f"The section {section!r} of {path} has an unknown field {name!r}; {_nearest(name, sections[section])}"
                )
        merged[section] = {**merged.get(section, {}), **fields}
    return merged


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
    """The nearest known field, without the list of all: a run has too many."""
    sentence = nearest_name(name, known)
    return sentence.partition(" Known: ")[0] if sentence.startswith("did you mean") else "see --help for all fields."


def default_output_dir(configuration_file: Path) -> Path:
    """`runs/<path below configuration>`, or `runs/<name>` for a file elsewhere."""
    parts = configuration_file.with_suffix("").parts
    if CONFIGURATION_ROOM in parts:
        last = len(parts) - 1 - parts[::-1].index(CONFIGURATION_ROOM)
        return Path(RUNS_FOLDER, *parts[last + 1 :])
    return Path(RUNS_FOLDER, parts[-1])


def parse_run(argv: list[str], command: str, description: str, model_class, data_class, training_class) -> Run:
    """
    The run that `argv` (`CONFIGURATION.yaml [--field value ...]`) requests.

    Raises:
        [`UserError`]: a file cannot be read, or a field is unknown or has an invalid value.
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
        variant = VARIANTS.get(training.variant)
        if variant is not None and variant.scheme is not None and checkpoint is None:
            fields.setdefault("residual_scheme", "standard")  # the backbone
        if checkpoint is None:
            config = model_class.config_class(**fields)
        else:
            config = initial_config(model_class, checkpoint, fields)
        if variant is not None and variant.scheme is not None:
            # Loading a checkpoint needs them.
            config.variant, config.variant_fields = training.variant, variant.settings(training.variant_fields or {})
    except (StrictDataclassError, ValueError, TypeError, ImportError, OSError, OverflowError) as error:
        raise UserError(f"{configuration_file} and the command line: {innermost_message(error)}") from error
    if data.is_split_drawn:
        named.add("split_seed")  # so that a new default never holds out other examples
    values = {"model": model, "data": vars(data), "training": training.to_dict()}
    values["training"]["report_to"] = training.report_to or ["none"]  # the parser takes no empty list
    record = {
        section: {name: value for name, value in values[section].items() if name in named - NOT_RECORDED}
        for section in sections
    }
    if training.hub_token is not None:
        # The client needs the token, but no file that the training arguments are saved to may hold it.
        os.environ["HF_TOKEN"] = training.hub_token
        training.hub_token = None
    return Run(config, checkpoint, data, training, json.loads(json.dumps(record, default=str)))
