"""Where the data of a run comes from: built in, from local files or from the Hub, and what of it is held out."""

import dataclasses
import glob
from pathlib import Path

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetBuildError, DatasetGenerationError, DatasetNotFoundError

from training.errors import UserError, innermost_message
from training.stream import READ_ERRORS


# Which loader of `datasets` reads a file, by its ending.
TEXT_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
IMAGE_FORMATS = {".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


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
        metadata={"help": "The branch, tag or commit of a data set on the Hub; if none, its main branch."},
    )
    train_split: str = dataclasses.field(default="train", metadata={"help": "The split to train on."})
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "The split to hold out; if none, a share of the training split is."}
    )
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "A local file, pattern or folder to hold out, instead of a split."}
    )
    eval_fraction: float = dataclasses.field(
        default=0.05, metadata={"help": "The share of the examples to hold out, where no other is named for it."}
    )


def load_splits(
    arguments: DataArguments,
    built_in,
    formats: dict[str, str],
    column: str,
    seed: int,
    streaming=False,
    held_out_streaming=False,
    classes=None,
):
    """
    The examples to train on and those held out, no example in both.

    Args:
        built_in: a mapping from names of built-in data sets to functions that give both parts.
        formats: which loader of `datasets` reads a local file, by its ending.
        column: a column that the data must have.
        seed: the seed of the split, where a share of the training split is held out.
        streaming: read the training part as it is used.
        held_out_streaming: read the part that is held out as it is used, where it has its own name.
        classes: the column of the classes, where of each the same share is to be held out.

    Raises:
        [`UserError`]: the data is missing, empty, of another format, or has no such column.
    """
    if not 0 < arguments.eval_fraction < 1:
        raise UserError(f"`eval_fraction` is {arguments.eval_fraction}; it must lie between 0 and 1.")
    if arguments.dataset in built_in:
        for name in ("eval_split", "eval_dataset"):
            if getattr(arguments, name) is not None:
                raise UserError(
                    f"`{name}` is {getattr(arguments, name)!r}, but {arguments.dataset!r} has its own held-out part: leave it out."
                )
        return built_in[arguments.dataset](arguments, seed)
    train = _load(arguments.dataset, arguments.train_split, arguments, formats, column, streaming)
    if arguments.eval_dataset is not None:
        return train, _load(arguments.eval_dataset, "train", arguments, formats, column, held_out_streaming)
    if arguments.eval_split is not None:
        return train, _load(arguments.dataset, arguments.eval_split, arguments, formats, column, held_out_streaming)
    if streaming:
        raise UserError("`streaming` is on, so nothing can be split off: name an `eval_split` or an `eval_dataset`.")
    stratified = isinstance(train.features.get(classes), ClassLabel)
    return hold_out(train, arguments, seed, classes if stratified else None)


def hold_out(data: Dataset, arguments: DataArguments, seed: int, classes: str | None) -> tuple[Dataset, Dataset]:
    """What is left to train on, and a share of the examples, the same of each class."""
    try:
        parts = data.train_test_split(test_size=arguments.eval_fraction, seed=seed, stratify_by_column=classes)
    except ValueError as error:
        raise UserError(
            f"The {len(data)} examples of {arguments.dataset!r} (a text file is one) cannot be split with "
            f"`eval_fraction` = {arguments.eval_fraction}: name an `eval_dataset`, or give more examples "
            f"({innermost_message(error)})"
        ) from error
    return parts["train"], parts["test"]


def _load(name: str, split: str, arguments: DataArguments, formats, column: str, streaming: bool = False):
    """One split of a data set, from local files or from the Hub."""
    local = _local_files(name, formats)
    try:
        if local is None:
            data = load_dataset(
                name, arguments.dataset_config, split=split, revision=arguments.dataset_revision, streaming=streaming
            )
        else:
            loader, options = local
            data = load_dataset(loader, split=split, streaming=streaming, **options)
        # A stream is first read here.
        columns = data.column_names or list(next(iter(data), {}))
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise UserError(
            f"The data {name!r} cannot be read as {local[0] if local else 'data'}: {innermost_message(cause)}"
        ) from error
    except (DatasetNotFoundError, DatasetBuildError, *READ_ERRORS) as error:
        raise UserError(
            f"The split {split!r} of the data {name!r} cannot be loaded: {innermost_message(error)}"
        ) from error
    if not streaming and len(data) == 0 or not columns:
        raise UserError(f"The data {name!r} is empty: give a file with examples.")
    if column not in columns:
        raise UserError(f"The data {name!r} has no column {column!r}; it has {', '.join(columns)}.")
    return data


def _local_files(name: str, formats: dict[str, str]) -> tuple[str, dict] | None:
    """The loader of `datasets` and its options for local files, or `None` if `name` can only be an id on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if _ending(file) in formats)
        if not files and formats is IMAGE_FORMATS:
            return "imagefolder", {"data_dir": str(path)}
        if not files:
            raise UserError(f"The folder {name!r} holds no file that ends in {', '.join(formats)}.")
    else:
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            if _ending(path) or path.is_absolute() or name.startswith((".", "~")) or glob.has_magic(name):
                raise UserError(f"The data file {name!r} does not exist.")
            return None
    loaders = {formats.get(_ending(file)) for file in files}
    if len(loaders) > 1 or None in loaders:
        raise UserError(
            f"The data {name!r} has files of other formats than one of {', '.join(formats)}: {files[0]!r}, ..."
        )
    for file in files:
        if Path(file).stat().st_size == 0:
            raise UserError(f"The data file {file!r} is empty: give a file with examples.")
    (loader,) = loaders
    options = {"data_files": files}
    if loader == "text":
        options["sample_by"] = "document"  # a file is one document, and not each of its lines
    elif loader == "csv":
        options.update(keep_default_na=False, skip_blank_lines=False)  # "NA", say, is text
    return loader, options


def _ending(file: str | Path) -> str:
    """The ending that tells the format, in front of that of a compression."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def is_on_the_hub(name: str) -> bool:
    """Whether a `dataset` that could be loaded came from the Hub."""
    return name not in ("stdlib", "digits") and not glob.glob(str(Path(name).expanduser()), recursive=True)
