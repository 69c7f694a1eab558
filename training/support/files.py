"""Reading files, replacing them atomically, and flushing them to disk."""

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
    """Give files the mode of new files in a folder: safetensors writes files that only their owner can read."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in files:
        file.chmod(mode)


def unfinished_name(name: str) -> str:
    """The name of a file until it is written completely."""
    return f".{name}.unfinished"


def write_whole(file: Path, text: str) -> None:
    """Replace a text file atomically: at any moment it has its old content, or all of the new."""
    unfinished = file.with_name(unfinished_name(file.name))
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system does not support it
            raise
    finally:
        os.close(descriptor)


class DamagedFile(UserError, ValueError):
    """A file does not hold what a command wrote to it, or cannot be read."""


def read_whole(
    file: Path, load: Callable[[str], Any], *keys: str, kind: type = dict, remedy: str = "restore it"
) -> Any:
    """
    The content of a text file that a command has written.

    Args:
        load: parses the text, or raises a `ValueError` or `yaml.YAMLError`.
        keys: the keys that the content must have.
        kind: the type that the content must have.
        remedy: what the user can do, as the end of a sentence.

    Raises:
        [`DamagedFile`]: the file cannot be read, or holds something else.
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
    """A loader that refuses duplicate keys, the first of which would be lost."""

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
        `yaml.YAMLError`: the text is not YAML, or has a key twice.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except (ValueError, RecursionError) as error:  # an impossible date, for example
        raise yaml.YAMLError(str(error)) from error


def output_folder(
    folder: Path, written: Iterable[str], is_own: Callable[[], bool], overwrite: bool | None = None
) -> Path:
    """
    The folder that a command writes to. It is created if missing.

    Args:
        written: the names of the files that the command writes.
        is_own: whether existing files of these names are from an earlier call of the same command.
        overwrite: whether such files may be replaced; `None` if they always may.

    Raises:
        [`UserError`]: the folder holds files of these names that are not the command's own or may not be replaced, or it
            cannot be created.
    """
    named = f"`output_dir` is {str(folder)!r}"
    there = [name for name in written if (folder / name).exists()]
    if there:
        try:
            own = is_own()
        except (OSError, ValueError, KeyError, TypeError):
            own = False
        if not own:
            raise UserError(f"{named}, which has a {there[0]} that this command did not write: choose another folder.")
        if overwrite is False:
            raise UserError(f"{named}, which holds results: choose another, or pass --overwrite to replace them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{named}, which cannot be created ({error.strerror}): choose another folder.") from error
    return folder
