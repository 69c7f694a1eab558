"""The parser of all commands."""

import argparse
import dataclasses
import os
from typing import Any

from transformers import HfArgumentParser

from training.support.errors import UserError


def argument(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments, with its help."""
    return dataclasses.field(default=default, metadata={"help": help})


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of descriptions, and adds the default to the help of arguments that do not state it."""

    def __init__(self, prog: str):
        width = min(120, os.get_terminal_size().columns if os.isatty(1) else 120)
        super().__init__(prog, max_help_position=32, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or action.default is False or "default:" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """
    A parser of dataclasses and of other arguments. It reports errors as a `UserError`.

    Args:
        dataclasses: one class, or several by the name of the group that `--help` lists their fields in.
        command: what the user types after `python -m`.
        description: what the command does, for `--help`.
    """

    def __init__(
        self, dataclasses: dict[str, type] | type | None = None, command: str = "", description: str = "", **options
    ):
        classes = dataclasses or {}
        if isinstance(dataclasses, dict):
            for name, each in dataclasses.items():
                each._argument_group_name = name
            classes = list(dataclasses.values())
        options = {"allow_abbrev": False, "formatter_class": HelpFormatter, **options}
        options.setdefault("prog", f"python -m {command}")  # (that of a command within one is given)
        super().__init__(classes, description=description, **options)

    def error(self, message: str):
        raise UserError(f"{message[0].upper()}{message[1:]}; --help lists all arguments.")
