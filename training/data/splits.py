"""
The source of a run's data (built-in, local files or the Hub), and the part of it that is held out.

A local folder has splits if all of its top-level folders have the name of a split: train, validation and test (or training,
valid, val, dev, testing, eval, evaluation). Splits of images must also contain a folder for each class. All other folders,
and all files, belong to the split `train`, whatever their names: `freight_train`, for example, is a class.
"""

import dataclasses
import functools
import glob
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetBuildError, DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from tqdm.auto import tqdm

from training.data import files as files_module
from training.data.files import READERS, check_document, ending, read_file
from training.data.reading import READ_ERRORS
from training.support.errors import UserError, innermost_message


#: The suffixes of the local files that can be read.
TEXT_FORMATS = tuple(READERS)
IMAGE_FORMATS = (".parquet",)

BUILT_IN = ("stdlib", "digits")

#: The splits, by the names of the top-level folders of a local folder.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclasses.dataclass
class DataArguments:
    """Where the data of a run comes from."""

    dataset: str = dataclasses.field(
        metadata={"help": "A built-in data set, a local file, pattern or folder, or the id of a data set on the Hub."}
    )
    dataset_config: str | None = dataclasses.field(
        default=None, metadata={"help": "The configuration of a data set on the Hub."}
    )
    dataset_revision: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The branch, tag or commit of a data set on the Hub; by default its main branch."},
    )
    train_split: str = dataclasses.field(
        default="train",
        metadata={
            "help": "The split to train on. A local folder has the splits train, validation and test if all of its top-level "
            "folders are named so (or training, valid, val, dev, testing, eval, evaluation); otherwise all of it is train."
        },
    )
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "The split to hold out; by default a share of the training split."}
    )
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "A local file, pattern or folder to hold out, instead of a split."}
    )
    eval_fraction: float = dataclasses.field(
        default=0.05,
        metadata={"help": "The share of the examples to hold out, without `eval_split` or `eval_dataset`."},
    )
    split_seed: int = dataclasses.field(
        default=42, metadata={"help": "The seed that draws the share of the training split to hold out."}
    )

    @property
    def is_split_drawn(self) -> bool:
        """Whether `split_seed` decides what is held out."""
        return self.eval_split is None and self.eval_dataset is None and self.dataset not in BUILT_IN


def load_splits(
    arguments: DataArguments,
    built_in,
    formats: tuple[str, ...],
    columns: list[str],
    streaming=False,
    held_out_streaming=False,
    classes=None,
    held_out_only=False,
):
    """
    The training examples and the held-out examples. No example is in both.

    Args:
        built_in: a mapping from names of built-in data sets to functions that return both parts.
        formats: the suffixes of local files, `TEXT_FORMATS` or `IMAGE_FORMATS`.
        columns: the columns to read; the data must have the first of them.
        streaming: stream the training examples.
        held_out_streaming: stream the held-out examples, if they are a split or data set of their own.
        classes: the column of the classes, to hold out the same share of each.
        held_out_only: return `None` in place of the training examples, and do not load them unless the held-out examples
            are a share of them.

    Raises:
        [`UserError`]: the data is missing, empty or of another format, or has no such column.
    """
    if not 0 < arguments.eval_fraction < 1:
        raise UserError(f"`eval_fraction` is {arguments.eval_fraction}; it must lie between 0 and 1.")
    if not 0 <= arguments.split_seed < 2**32:
        raise UserError(f"`split_seed` is {arguments.split_seed}; it must lie between 0 and {2**32 - 1}.")
    if arguments.eval_split is not None and arguments.eval_dataset is not None:
        raise UserError(
            f"`eval_split` is {arguments.eval_split!r} and `eval_dataset` is {arguments.eval_dataset!r}, but only one can be "
            "held out: leave one of them out."
        )
    if arguments.dataset in built_in:
        for name in ("eval_split", "eval_dataset"):
            if getattr(arguments, name) is not None:
                raise UserError(
                    f"`{name}` is {getattr(arguments, name)!r}, but {arguments.dataset!r} has its own held-out part: leave it out."
                )
        return built_in[arguments.dataset](arguments)
    load = functools.partial(_load, arguments=arguments, formats=formats, columns=columns)
    train = None
    if arguments.is_split_drawn or not held_out_only:
        train = load(arguments.dataset, arguments.train_split, streaming=streaming)
    held_out = {"streaming": held_out_streaming, "is_held_out": True, "alone": held_out_only}
    if arguments.eval_dataset is not None:
        if train is not None:
            _warn_of_shared_files(arguments, formats)
        return train, load(arguments.eval_dataset, None, **held_out)
    if arguments.eval_split is not None:
        return train, load(arguments.dataset, arguments.eval_split, **held_out)
    if streaming:
        raise UserError("`streaming` is set, so no share can be held out: set `eval_split` or `eval_dataset`.")
    stratified = isinstance(train.features.get(classes), ClassLabel)
    return hold_out(train, arguments, arguments.split_seed, classes if stratified else None)


def hold_out(data: Dataset, arguments: DataArguments, seed: int, classes: str | None) -> tuple[Dataset, Dataset]:
    """The training examples, and the held-out share of all examples, the same share of each class."""
    try:
        parts = data.train_test_split(test_size=arguments.eval_fraction, seed=seed, stratify_by_column=classes)
    except ValueError as error:
        raise UserError(
            f"The {len(data)} examples of {arguments.dataset!r} (a text file is one) cannot be split with "
            f"`eval_fraction` = {arguments.eval_fraction}: set `eval_dataset`, or give more examples "
            f"({innermost_message(error)})"
        ) from error
    return parts["train"], parts["test"]


def _warn_of_shared_files(arguments: DataArguments, formats: tuple[str, ...]) -> None:
    """Warn of local files that are both trained on and held out, which may be intended."""
    parts = _local_parts(arguments.dataset, formats) or {}, _local_parts(arguments.eval_dataset, formats) or {}
    used = re.findall(r"\w+", arguments.train_split)
    train = {os.path.realpath(file) for split, files in parts[0].items() if split in used for file in files}
    shared = sorted(train & {os.path.realpath(file) for files in parts[1].values() for file in files})
    if shared and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        tqdm.write(
            f"warning: {len(shared)} files of `eval_dataset` are trained on, too, for example {shared[0]!r}: their metrics say "
            "nothing about other data.",
            file=sys.stderr,
        )


def _load(
    name: str,
    split: str | None,
    arguments: DataArguments,
    formats: tuple[str, ...],
    columns: list[str],
    streaming: bool = False,
    is_held_out: bool = False,
    alone: bool = False,
):
    """
    One split of a data set, from local files or from the Hub.

    Args:
        split: the name of the split; if `None`, all of a local file or folder.
        alone: do not read the other splits. (By default those of the Hub are loaded together, and cached.)
    """
    parts = _local_parts(name, formats)
    if split is None and parts is not None and len(parts) > 1:
        raise UserError(f"The folder {name!r} has the splits {', '.join(parts)}: give the folder of one of them.")
    split = split or (next(iter(parts)) if parts else "train")
    try:
        if parts is None:
            data = load_dataset(
                name,
                arguments.dataset_config,
                split=split,
                revision=arguments.dataset_revision,
                # (A stream cannot be sliced, and is not read from the cache.)
                streaming=streaming or (alone and "[" not in split and not datasets.config.HF_HUB_OFFLINE),
            )
            if isinstance(data, IterableDataset) and not streaming:
                data = _kept(data, columns)
        elif formats is TEXT_FORMATS:
            data = _documents(parts, split, columns[0], streaming, is_held_out)
        else:
            data = _local_images(name, parts, split, columns, is_held_out)
        # A stream is first read here.
        names = data.column_names or list(next(iter(data), {}))
    except DatasetGenerationError as error:
        raise UserError(f"The data {name!r} cannot be read: {innermost_message(error.__cause__ or error)}") from error
    except (DatasetNotFoundError, DatasetBuildError, *READ_ERRORS) as error:
        raise UserError(
            f"The split {split!r} of the data {name!r} cannot be loaded: {innermost_message(error)}"
        ) from error
    if not names or isinstance(data, Dataset) and len(data) == 0:
        raise UserError(f"The data {name!r} is empty: give a file with examples.")
    if columns[0] not in names:
        raise UserError(f"The data {name!r} has no column {columns[0]!r}; it has {', '.join(names)}.")
    return data


# Local files


def _local_parts(name: str, formats: tuple[str, ...]) -> dict[str, list[Path]] | None:
    """The files of each split, or the folders of images; `None` if `name` can only be an id on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        folders = dict(_walk(path))
        found = [folder / file for folder, names in folders.items() for file in names if ending(file) in formats]
        found = [file for file in found if formats is TEXT_FORMATS or file.name not in ImageFolder.METADATA_FILENAMES]
        if not found and formats is IMAGE_FORMATS:
            return _image_folders(path, folders)
        if not found:
            raise UserError(f"The folder {name!r} has no file with a suffix of {', '.join(formats)}.")
        parts = _splits(path, sorted(found, key=str)) or {"train": sorted(found, key=str)}
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)), key=str)
        parts = {"train": [file for file in found if not file.is_dir()]}
        if not parts["train"]:
            if ending(path) or path.is_absolute() or name.startswith((".", "~")) or glob.has_magic(name):
                raise UserError(f"The data file {name!r} does not exist.")
            return None
    found = [file for files in parts.values() for file in files]
    endings = {ending(file) for file in found}
    if not endings <= set(formats) or len({"json" if "json" in each else each for each in endings}) > 1:
        raise UserError(
            f"The data {name!r} has files of several formats or of none of {', '.join(formats)}: {str(found[0])!r}, ..."
        )
    for file in found:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"The data file {str(file)!r} cannot be read: {error.strerror}.") from error
        if size == 0:
            raise UserError(f"The data file {str(file)!r} is empty: give a file with examples.")
    return parts


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders below a folder and the names of their files. It follows links, and skips hidden files and folders."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        # (A link to a parent folder would recurse forever.)
        folders[:] = [
            each
            for each in sorted(folders)
            if not each.startswith(".") and not Path(here).is_relative_to(os.path.realpath(Path(parent, each)))
        ]
        yield Path(parent), sorted(each for each in names if not each.startswith("."))


def _splits(folder: Path, paths: list[Path]) -> dict[str, list[Path]] | None:
    """The paths of each split, if all top-level folders are splits; see the docstring of this module."""
    parts = {}
    for path in paths:
        split = SPLIT_FOLDERS.get(path.relative_to(folder).parts[0].lower()) if path != folder else None
        if split is None:
            return None
        parts.setdefault(split, []).append(path)
    return parts


def _image_folders(root: Path, folders: dict[Path, list[str]]) -> dict[str, list[Path]]:
    """
    The folders with images of each split. Each of them is a class.

    Raises:
        [`UserError`]: there is none, or the folders do not define the classes uniquely.
    """
    found, described = [], False
    for folder, names in folders.items():
        metadata = not set(names).isdisjoint(ImageFolder.METADATA_FILENAMES)
        if metadata or any(Path(each).suffix.lower() in ImageFolder.EXTENSIONS for each in names):
            found.append(folder)
            described = described or metadata
    if not found:
        raise UserError(
            f"The folder {str(root)!r} has no images, and no file with a suffix of {', '.join(IMAGE_FORMATS)}."
        )
    has_classes = described or any(len(folder.relative_to(root).parts) > 1 for folder in found)
    parts = _splits(root, found) if has_classes else None
    for classes in (parts or {"train": found}).values() if not described else ():
        by_name = {}
        for each in classes:
            inner = each.relative_to(root).parts[1 if parts else 0 :]
            first = by_name.setdefault(None, (inner, each))
            same = by_name.setdefault(each.name, (inner, each))
            other = same[1] if same[0] != inner else first[1] if len(first[0]) != len(inner) else None
            if other is not None:
                raise UserError(
                    f"The folders {str(other)!r} and {str(each)!r} of {str(root)!r} cannot be told apart as classes: use one folder of "
                    "images per class, side by side and with different names, either at the top level or below the folders "
                    "train, validation and test, with nothing else beside these."
                )
    return parts or {"train": found}


def _mentioned(parts: dict[str, list[Path]], split: str) -> dict[str, list[Path]]:
    """The parts that occur in the name of a split, which may be a sum of slices."""
    mentioned = {name: files for name, files in parts.items() if re.search(rf"\b{name}\b", split)}
    if not mentioned:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(parts)}.')
    return mentioned


def _local_images(name, parts: dict[str, list[Path]], split: str, columns: list[str], is_held_out: bool) -> Dataset:
    parts, options = _mentioned(parts, split), {}
    folders = next(iter(parts.values()))[0].is_dir()
    if folders:
        loader, end = "imagefolder", "/*"
        if is_held_out and not any(folder == Path(name).expanduser() for files in parts.values() for folder in files):
            options["drop_labels"] = False  # also of a single class
    else:
        loader, end = "parquet", ""
        options["columns"] = columns
        for file in (file for files in parts.values() for file in files):
            try:
                names = pq.read_schema(file).names
            except (pa.ArrowException, ValueError) as error:
                raise UserError(
                    f"The data file {str(file)!r} cannot be read as parquet: {innermost_message(error)}"
                ) from error
            for column in columns:
                if column not in names:
                    raise UserError(
                        f"The data file {str(file)!r} has no column {column!r}; it has {', '.join(names)}."
                    )
    # The loader would take names for patterns.
    patterns = {each: [glob.escape(str(file.absolute())) + end for file in files] for each, files in parts.items()}
    return load_dataset(loader, data_files=patterns, split=split, **options)


def _documents(
    parts: dict[str, list[Path]], split: str, column: str, streaming: bool, is_held_out: bool
) -> Dataset | IterableDataset:
    """A split of local text, with one column."""
    parts = {name: list(map(str, files)) for name, files in _mentioned(parts, split).items()}
    if streaming:
        names = [each.strip() for each in split.split("+")]
        if not set(names) <= set(parts):
            raise ValueError(f"A stream takes only whole splits. Should be one of {list(parts)}.")
        files = [file for name in names for file in parts[name]]
        for number, file in enumerate(files if not is_held_out else ()):
            # A missing column is found before the training starts. (A text file would have to be read completely.)
            if number == 0 or ending(file) != ".txt":
                next(read_file(file, column), None)
        return IterableDataset.from_generator(_rows, gen_kwargs={"files": files, "column": column})
    loaded = {name: _document_set(files, column) for name, files in parts.items()}
    instructions = ReadInstruction.from_spec(split).to_absolute({name: len(data) for name, data in loaded.items()})
    chosen = [(loaded[each.splitname], range(each.from_, each.to)) for each in instructions]
    chosen = [data if len(rows) == len(data) else data.select(rows) for data, rows in chosen]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def _rows(files: list[str], column: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for place, document in read_file(file, column):
            check_document(document, column, place)
            yield {column: document}


def _document_set(files: list[str], column: str) -> Dataset:
    """The documents of files, on disk."""
    first = next((document for file in files for _, document in read_file(file, column)), "")
    is_text = isinstance(first, str)

    def rows():
        for file in files:
            for place, document in read_file(file, column):
                check_document(document, column, place)
                if isinstance(document, str) != is_text:
                    raise UserError(
                        f"{place} has in {column!r} {document!r:.40}, but others are {'texts' if is_text else 'token ids'}: "
                        "give either texts or lists of token ids."
                    )
                yield {column: document}

    features = Features({column: Value("large_string") if is_text else List(Value("int64"))})
    states = [(os.path.abspath(file), os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    return made_once(rows, features, states, column, code_of(rows, check_document, files_module))


# The cache on disk


class _Rows:
    """A generator function that `datasets` identifies by a fingerprint only."""

    def __init__(self, rows: Callable[[], Iterable[dict]], fingerprint: str):
        self.rows, self.fingerprint = rows, fingerprint

    def __call__(self) -> Iterator[dict]:
        yield from self.rows()

    def __getstate__(self) -> dict:
        return {"fingerprint": self.fingerprint}


def made_once(rows: Callable[[], Iterable[dict]], features: Features, *decisive) -> Dataset:
    """
    The rows as a data set on disk, which is cached.

    Args:
        decisive: everything that the rows depend on, including the code (`code_of`).
    """
    # Hashed one by one: whether two of them share an object depends on what the process did before.
    fingerprint = Hasher.hash([Hasher.hash(each) for each in decisive])
    try:
        return Dataset.from_generator(_Rows(rows, fingerprint), features=features, writer_batch_size=100)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def code_of(*things) -> list:
    """The code of functions, and of the functions of classes and modules, for a fingerprint that changes with it."""
    code = []
    for thing in things:
        if inspect.isclass(thing) or inspect.ismodule(thing):
            functions = [
                (name, value)
                for name, value in sorted(vars(thing).items(), key=lambda item: item[0])
                if _function(value)
            ]
            code += [(name, code_of(function)) for name, function in functions]
        else:
            function = _function(thing)
            code.append((function.__code__, function.__defaults__))
    return code


def _function(value: Any) -> Any | None:
    """The function itself, of a property or method, too; `None` for other values."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return value if inspect.isfunction(value) else None


def _kept(stream: IterableDataset, columns: list[str]) -> Dataset:
    """Those of `columns` that a stream has, cached on disk."""
    names = stream.column_names or list(next(iter(stream), {}))
    if columns[0] not in names:
        return stream
    stream = stream.select_columns([name for name in columns if name in names])
    raw = stream
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, ImageFeature):
            raw = raw.cast_column(name, ImageFeature(decode=False))
    return made_once(lambda: raw, stream.features, raw)


def is_on_the_hub(name: str) -> bool:
    """Whether a `dataset` that could be loaded came from the Hub."""
    path = Path(name).expanduser()
    return name not in BUILT_IN and not path.exists() and not glob.glob(str(path), recursive=True)
