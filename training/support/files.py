"""Files: read, written as a whole, and known to be on the disk."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from training.support.errors import UserError


def share(files: list[Path], folder: Path) -> None:
    """Give files the mode that new ones have in a folder: safetensors writes some that their owner alone can read."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in files:
        file.chmod(mode)


def unfinished_name(name: str) -> str:
    """What a file is called until all of it is written."""
    return f".{name}.unfinished"


def write_whole(file: Path, text: str) -> None:
    """Write a text file, of which there is at any moment what was before, or all that is new."""
    unfinished = file.with_name(unfinished_name(file.name))
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive the loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


class DamagedFile(UserError, ValueError):
    """A file does not hold what a command left in it, or cannot be read."""


def read_whole(
    file: Path, load: Callable[[str], Any], *keys: str, kind: type = dict, remedy: str = "put back what it was"
) -> Any:
    """
    What a command left in a text file.

    Args:
        load: makes the text what is returned, or raises a `ValueError` or `yaml.YAMLError`.
        keys: what it must have.
        kind: the type that it must be of.
        remedy: what helps, as the end of a sentence.

    Raises:
        [`DamagedFile`]: it cannot be read, or is something else.
    """
    try:
        content = load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error.strerror}): {remedy}.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DamagedFile(f"{file} is damaged ({error}): {remedy}.") from error
    if not isinstance(content, kind):
        raise DamagedFile(f"{file} is damaged (it holds {type(content).__name__}, not {kind.__name__}): {remedy}.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise DamagedFile(f"{file} is damaged (it lacks {', '.join(missing)}): {remedy}.")
    return content


def read_json(file: Path, *keys: str, **options: Any) -> Any:
    """[`read_whole`] of JSON."""
    return read_whole(file, json.loads, *keys, **options)


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
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except (ValueError, RecursionError) as error:  # a date that is none, say
        raise yaml.YAMLError(str(error)) from error


def output_folder(
    folder: Path, written: Iterable[str], is_own: Callable[[], bool], overwrite: bool | None = None
) -> Path:
    """
    The folder that a command writes into, which is made if missing.

    Args:
        written: the names of the files that the command writes.
        is_own: whether such files, where some are there, are of an earlier call of the same command.
        overwrite: whether those may be replaced; `None` where they always may, as the command goes on from them.

    Raises:
        [`UserError`]: the folder holds files of these names that are not the command's own or may not be replaced, or it
            cannot be made.
    """
    named = f"`output_dir` is {str(folder)!r}"
    there = [name for name in written if (folder / name).exists()]
    if there:
        try:
            own = is_own()
        except (OSError, ValueError, KeyError, TypeError):
            own = False
        if not own:
            raise UserError(f"{named}, where a {there[0]} is that is not of this command: name another folder.")
        if overwrite is False:
            raise UserError(f"{named}, which holds results: name another folder, or pass --overwrite to replace them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{named}, which cannot be made ({error.strerror}): name another folder.") from error
    return folder
