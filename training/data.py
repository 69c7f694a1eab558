"""The data of a run: text in blocks of tokens, or images with labels, from a file, the Hub or what is built in."""

import dataclasses
import glob
import hashlib
import itertools
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetBuildError, DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from training.errors import UserError, innermost_message


# Which loader of `datasets` reads a file, by its ending.
TEXT_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
IMAGE_FORMATS = {".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TOKENIZER_BATCH = 256


@dataclasses.dataclass
class DataArguments:
    """Where the data of a run comes from."""

    dataset: str = dataclasses.field(
        metadata={"help": "A built-in data set, a local file, pattern or folder, or the id of a data set on the Hub."}
    )
    dataset_config: str | None = dataclasses.field(
        default=None, metadata={"help": "The configuration of a data set on the Hub."}
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


@dataclasses.dataclass
class TextDataArguments(DataArguments):
    """The text of a run."""

    dataset: str = dataclasses.field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the source text of Python's standard library), a local file, pattern or folder (text, "
            "JSON lines, parquet, CSV), or the id of a data set on the Hub."
        },
    )
    text_column: str = dataclasses.field(
        default="text", metadata={"help": "The column with the text, or with lists of token ids."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the training data while training, instead of before."}
    )
    block_size: int = dataclasses.field(
        default=128, metadata={"help": "The length of the training sequences, in tokens."}
    )
    max_eval_documents: int | None = dataclasses.field(
        default=None, metadata={"help": "The most documents to evaluate on."}
    )
    tokenizer: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The path or Hub id of a tokenizer; if none, one is trained with `vocab_size` tokens."},
    )
    tokenizer_documents: int = dataclasses.field(
        default=100_000, metadata={"help": "The most documents to train a tokenizer on."}
    )


@dataclasses.dataclass
class ImageDataArguments(DataArguments):
    """The images of a run."""

    dataset: str = dataclasses.field(
        default="digits",
        metadata={
            "help": "'digits' (scikit-learn's handwritten digits), a local folder with one folder of images for each "
            "class, parquet files, or the id of a data set on the Hub."
        },
    )
    eval_fraction: float = dataclasses.field(
        default=0.2, metadata={"help": "The share of the images to hold out, of each class alike."}
    )
    image_column: str = dataclasses.field(default="image", metadata={"help": "The column with the images."})
    label_column: str = dataclasses.field(default="label", metadata={"help": "The column with the classes."})
    num_labels: int | None = dataclasses.field(
        default=None, metadata={"help": "The number of classes, where the data does not name them."}
    )


def load_splits(
    arguments: DataArguments, built_in, formats: dict[str, str], column: str, seed: int, streaming=False, classes=None
):
    """
    The examples to train on and those held out, no example in both.

    Args:
        built_in: a mapping from names of built-in data sets to functions that give both parts.
        formats: which loader of `datasets` reads a local file, by its ending.
        column: a column that the data must have.
        seed: the seed of the split, where a share of the training split is held out.
        streaming: read the training part as it is used.
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
        return train, _load(arguments.eval_dataset, "train", arguments, formats, column)
    if arguments.eval_split is not None:
        return train, _load(arguments.dataset, arguments.eval_split, arguments, formats, column)
    if streaming:
        raise UserError("`streaming` is on, so nothing can be split off: name an `eval_split` or an `eval_dataset`.")
    stratified = isinstance(train.features.get(classes), ClassLabel)
    return _hold_out(train, arguments, seed, classes if stratified else None)


def _hold_out(data: Dataset, arguments: DataArguments, seed: int, classes: str | None) -> tuple[Dataset, Dataset]:
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
            data = load_dataset(name, arguments.dataset_config, split=split, streaming=streaming)
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
    except (DatasetNotFoundError, DatasetBuildError, OSError, ValueError, ConnectionError) as error:
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


def standard_library(arguments: TextDataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """
    The source text of the running Python's standard library, one document a file, `text` and `path`.

    Files of equal text are taken once. A file is held out by its path alone, whatever the seed: no release of Python
    and no run has a file in both parts.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            with tokenize.open(file) as stream:  # in the encoding that the file declares
                texts.setdefault(stream.read(), path.as_posix())
        except (SyntaxError, UnicodeDecodeError):
            continue  # the few files that test wrong encodings
    parts = {True: [], False: []}
    for text, path in texts.items():
        draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
        if text:
            parts[draw < arguments.eval_fraction].append((draw, path, text))
    # In the order of the draws, a first few documents are a fair sample.
    held_out, train = (
        Dataset.from_dict({"path": [path for _, path, _ in part], "text": [text for _, _, text in part]})
        for part in (sorted(parts[True]), sorted(parts[False]))
    )
    return train, held_out


def handwritten_digits(arguments: ImageDataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split with a fixed seed, of each class alike."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / digits.images.max())).round().astype(np.uint8)
    features = Features(
        {"image": Image(mode="L"), "label": ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    data = Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)
    return _hold_out(data, arguments, seed=0, classes="label")


def load_text(arguments: TextDataArguments, seed: int) -> tuple[Dataset | IterableDataset, Dataset]:
    """The documents to train on and those held out, with the column `arguments.text_column`."""
    if arguments.block_size < 2:
        raise UserError(f"`block_size` is {arguments.block_size}; a block must have at least 2 tokens.")
    for name in ("max_eval_documents", "tokenizer_documents"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}; it must be at least 1.")
    train, held_out = load_splits(
        arguments, {"stdlib": standard_library}, TEXT_FORMATS, arguments.text_column, seed, arguments.streaming
    )
    if arguments.max_eval_documents is not None:
        held_out = held_out.select(range(min(arguments.max_eval_documents, len(held_out))))
    return train, held_out


def load_images(arguments: ImageDataArguments, num_channels: int, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """
    The images to train on and those held out, with the columns `image` and `label`, and the names of the classes.

    Raises:
        [`UserError`]: also where an image has other than `num_channels` channels, or a label is out of range.
    """
    train, held_out = load_splits(
        arguments,
        {"digits": handwritten_digits},
        IMAGE_FORMATS,
        arguments.image_column,
        seed,
        classes=arguments.label_column,
    )
    columns = {arguments.image_column: "image", arguments.label_column: "label"}
    parts = []
    sources = arguments.dataset, arguments.eval_dataset or arguments.dataset
    for part, source in zip((train, held_out), sources):
        if arguments.label_column not in part.column_names:
            raise UserError(
                f"The data {source!r} has no column {arguments.label_column!r}; it has {', '.join(part.column_names)}."
            )
        part = part.select_columns(list(columns)).rename_columns(columns)
        if not isinstance(part.features["image"], Image):
            try:
                part = part.cast_column("image", Image())
            except (NotImplementedError, TypeError, ValueError) as error:
                raise UserError(f"The column {arguments.image_column!r} of {source!r} holds no images.") from error
        parts.append(part)
    names = _class_names(arguments, *(part.features["label"] for part in parts), labels=parts[0]["label"])
    for part, source in zip(parts, sources):
        _check_images(part, num_channels, len(names), source)
    return *parts, names


def _class_names(arguments: ImageDataArguments, train_feature, held_out_feature, labels) -> list[str]:
    """The names of the classes: the data's, or the numbers from 0."""
    if isinstance(train_feature, ClassLabel):
        if isinstance(held_out_feature, ClassLabel) and held_out_feature.names != train_feature.names:
            raise UserError(
                f"The data held out has the classes {', '.join(held_out_feature.names)}, but those to train on are "
                f"{', '.join(train_feature.names)}: they must be the same."
            )
        return train_feature.names
    if "int" not in str(getattr(train_feature, "dtype", "")):
        raise UserError(
            f"The column {arguments.label_column!r} of {arguments.dataset!r} holds {labels[0]!r}, for one; it must hold "
            "integers from 0, one for each class."
        )
    num_labels = arguments.num_labels
    if num_labels is None:
        num_labels = 1 + max((label for label in labels if label is not None), default=0)
    elif num_labels < 1:
        raise UserError(f"`num_labels` is {num_labels}; it must be at least 1.")
    return [str(label) for label in range(num_labels)]


def _check_images(data: Dataset, num_channels: int, num_labels: int, name: str):
    for index in range(len(data)):
        try:
            example = data[index]
            channels = len(example["image"].getbands())
        except (AttributeError, OSError, SyntaxError, ValueError) as error:  # what Pillow raises, or there is none
            file = (data.cast_column("image", Image(decode=False))[index]["image"] or {}).get("path")
            raise UserError(
                f"Image {index} of {name!r} ({file or 'no file'}) cannot be read: {innermost_message(error)}"
            ) from error
        if channels != num_channels:
            raise UserError(
                f"Image {index} of {name!r} has {channels} channels ({example['image'].mode}), but `num_channels` is "
                f"{num_channels}: convert the images, or set `num_channels`."
            )
        label = example["label"]
        if not isinstance(label, int) or not 0 <= label < num_labels:
            raise UserError(
                f"The label of image {index} of {name!r} is {label!r}; it must be an integer from 0 to {num_labels - 1}."
            )


def texts(data: Dataset | IterableDataset, column: str) -> Iterator[str]:
    """
    The texts of a column, one by one.

    Raises:
        [`UserError`]: a document holds something else than text.
    """
    for batch in data.select_columns([column]).iter(TOKENIZER_BATCH):
        for document in batch[column]:
            if not isinstance(document, str):
                raise UserError(
                    f"A document has in {column!r} {document!r:.40}, from which no tokenizer can be trained: give text, "
                    "or lists of token ids with the `tokenizer` that they are of."
                )
            yield document


class PackedBlocks(torch.utils.data.IterableDataset):
    """
    Documents as blocks of `block_size` token ids: an end-of-text token after each document, all of them one after the
    other, cut at every `block_size` tokens. Nothing is lost but the last block, if it is not full.

    Args:
        data: the documents, with a column of texts or of lists of token ids.
        vocab_size: every token id must lie below it.

    Raises:
        [`UserError`]: a document holds something else than text, or a token id out of range.
    """

    def __init__(self, data, column: str, tokenizer: PreTrainedTokenizerBase, block_size: int, vocab_size: int):
        self.data, self.column, self.tokenizer = data, column, tokenizer
        self.block_size, self.vocab_size = block_size, vocab_size

    def tokens_of_documents(self) -> Iterator[list[int]]:
        """The token ids of each document, with the end-of-text token."""
        index = 0
        for batch in self.data.select_columns([self.column]).iter(TOKENIZER_BATCH):
            documents = batch[self.column]
            for document in documents:
                self._check(document, index)
                index += 1
            are_texts = {isinstance(document, str) for document in documents}
            if len(are_texts) > 1:
                raise UserError(f"The column {self.column!r} has both texts and lists of token ids: give one of them.")
            if True in are_texts:
                documents = self.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
            for document in documents:
                yield [*document, self.tokenizer.eos_token_id]

    def _check(self, document, index: int):
        if isinstance(document, str):
            return
        if not isinstance(document, list) or not all(isinstance(token, int) for token in document):
            raise UserError(
                f"Document {index} has in {self.column!r} {document!r:.40}; it must be text, or a list of token ids."
            )
        for token in document:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"Document {index} has the token id {token}; with `vocab_size` = {self.vocab_size} it must lie from 0 to {self.vocab_size - 1}."
                )

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        tokens = itertools.chain.from_iterable(self.tokens_of_documents())
        blocks = iter(lambda: list(itertools.islice(tokens, self.block_size)), [])
        # Each worker of a data loader has a copy of this: together they give each block once.
        worker = torch.utils.data.get_worker_info()
        for block in itertools.islice(blocks, worker.id, None, worker.num_workers) if worker else blocks:
            if len(block) == self.block_size:
                yield {"input_ids": block}

    def materialize(self) -> Dataset:
        """All blocks as a data set on disk, read by memory-mapping."""
        self.check_length()
        try:
            return Dataset.from_generator(self.__iter__, features=Features({"input_ids": [Value("int32")]}))
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def check_length(self) -> None:
        """
        Raises:
            [`UserError`]: the documents are too short for one block.
        """
        if next(iter(self), None) is None:
            tokens = sum(map(len, self.tokens_of_documents()))
            raise UserError(
                f"The text has {tokens} tokens, too short for one block of `block_size` = {self.block_size}: give more "
                "text, or a smaller `block_size`."
            )

    def tokens_per_byte(self) -> float:
        """How many tokens a byte of the documents (in UTF-8) becomes, end-of-text tokens included."""
        tokens = num_bytes = 0
        for document in self.tokens_of_documents():
            tokens += len(document)
            num_bytes += len(self.tokenizer.decode(document[:-1]).encode())
        if num_bytes == 0:
            raise UserError("All of the documents to evaluate on are empty: give some text.")
        return tokens / num_bytes
