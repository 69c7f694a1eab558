"""The text of a run, in blocks of tokens."""

import dataclasses
import hashlib
import itertools
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from training.data import TEXT_FORMATS, DataArguments, code_of, load_splits, made_once
from training.errors import UserError
from training.files import check_document
from training.stream import read_shard, values_of
from training.tokenizer import plain_tokens


TOKENIZER_BATCH = 256


@dataclasses.dataclass
class TextDataArguments(DataArguments):
    """The text of a run."""

    dataset: str = dataclasses.field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the source text of Python's standard library), a local file, pattern or folder (text, "
            "JSON lines, parquet, CSV; in UTF-8), or the id of a data set on the Hub."
        },
    )
    text_column: str = dataclasses.field(
        default="text", metadata={"help": "The column with the text, or with lists of token ids."}
    )
    streaming: bool = dataclasses.field(
        default=False, metadata={"help": "Read the training data while training, instead of before."}
    )
    stream_lanes: int = dataclasses.field(
        default=16,
        metadata={
            "help": "The number of parts in which a stream is read side by side: a multiple of the number of processes, "
            "and best a divisor of the number of files. The order of the data depends on it."
        },
    )
    shuffle_buffer: int = dataclasses.field(
        default=1000,
        metadata={
            "help": "How many documents each lane of a stream shuffles at a time; with 1, they keep their order."
        },
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


def standard_library(arguments: TextDataArguments) -> tuple[Dataset, Dataset]:
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


def load_text(
    arguments: TextDataArguments, held_out_only: bool = False
) -> tuple[Dataset | IterableDataset | None, Dataset]:
    """
    The documents to train on and those held out, with the column `arguments.text_column`.

    Args:
        held_out_only: give `None` for those to train on, and do not load them where the others are not a share of them.
    """
    if arguments.block_size < 2:
        raise UserError(f"`block_size` is {arguments.block_size}; a block must have at least 2 tokens.")
    for name in ("max_eval_documents", "tokenizer_documents", "stream_lanes", "shuffle_buffer"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}; it must be at least 1.")
    train, held_out = load_splits(
        arguments,
        {"stdlib": standard_library},
        TEXT_FORMATS,
        [arguments.text_column],
        streaming=arguments.streaming,
        # A few documents need not be downloaded with all of the others.
        held_out_streaming=arguments.streaming and arguments.max_eval_documents is not None,
        held_out_only=held_out_only,
    )
    if isinstance(held_out, IterableDataset):
        first = itertools.islice(values_of(held_out, arguments.text_column), arguments.max_eval_documents)
        held_out = Dataset.from_dict({arguments.text_column: list(first)})
    elif arguments.max_eval_documents is not None:
        held_out = held_out.select(range(min(arguments.max_eval_documents, len(held_out))))
    return None if held_out_only else train, held_out


def texts(data: Dataset | IterableDataset, column: str) -> Iterator[str]:
    """
    The texts of a column, one by one.

    Raises:
        [`UserError`]: a document holds something else than text.
    """
    for document in values_of(data, column):
        if not isinstance(document, str):
            raise UserError(
                f"A document has in {column!r} {document!r:.40}, from which no tokenizer can be trained: give text, "
                "or lists of token ids with the `tokenizer` that they are of."
            )
        yield document


class PackedBlocks:
    """
    Documents as blocks of `block_size` token ids: an end-of-text token after each document, all of them one after the
    other, cut at every `block_size` tokens. Nothing is lost but the last block, if it is not full.

    What is written in a text like a special token is text: no token is special but the end of a document.

    Args:
        data: the documents, with a column of texts or of lists of token ids.
        vocab_size: every token id must lie below it.

    Raises:
        [`UserError`]: a document holds something else than text, or a token id out of range.
    """

    def __init__(self, data, column: str, tokenizer: PreTrainedTokenizerBase, block_size: int, vocab_size: int):
        self.data, self.column, self.tokenizer = data, column, tokenizer
        self.block_size, self.vocab_size = block_size, vocab_size

    def documents(self) -> Iterator[str | list[int]]:
        """The documents, each of them `checked`."""
        for index, document in enumerate(values_of(self.data, self.column)):
            yield self.checked(document, f"Document {index}")

    def tokens_of_documents(self) -> Iterator[list[int]]:
        """The token ids of each document, with the end-of-text token."""
        return self.encode(self.documents())

    def encode(self, documents: Iterable[str | list[int]]) -> Iterator[list[int]]:
        """The token ids of documents that were `checked`, with the end-of-text token."""
        documents = iter(documents)
        while batch := list(itertools.islice(documents, TOKENIZER_BATCH)):
            are_texts = {isinstance(document, str) for document in batch}
            if len(are_texts) > 1:
                raise UserError(f"The column {self.column!r} has both texts and lists of token ids: give one of them.")
            if True in are_texts:
                batch = plain_tokens(self.tokenizer, batch)
            for document in batch:
                yield [*document, self.tokenizer.eos_token_id]

    def checked(self, document: Any, place: str) -> str | list[int]:
        """The document, which stands at a `place`, if it can be packed."""
        check_document(document, self.column, place)
        if isinstance(document, str):
            return document
        for token in document:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{place} has the token id {token}; with `vocab_size` = {self.vocab_size} it must lie from 0 to {self.vocab_size - 1}."
                )
        return document

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        tokens = itertools.chain.from_iterable(self.tokens_of_documents())
        for block in iter(lambda: list(itertools.islice(tokens, self.block_size)), []):
            if len(block) == self.block_size:
                yield {"input_ids": block}

    def materialize(self) -> Dataset:
        """All blocks as a data set on disk, read by memory-mapping, and packed anew where data, tokenizer or code changed."""
        self.check_length()
        return made_once(
            self.__iter__,
            Features({"input_ids": List(Value("int32"))}),
            vars(self),
            (tokenizers.__version__, transformers.__version__),
            code_of(
                *type(self).__mro__, *type(self.tokenizer).__mro__, plain_tokens, check_document, values_of, read_shard
            ),
        )

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
        """
        How many tokens a byte of the documents (in UTF-8) becomes, end-of-text tokens included. The bytes are those of the
        texts, whatever the tokenizer makes of them; of token ids, those of what they are decoded to.
        """
        tokens = num_bytes = 0
        documents, encoded = itertools.tee(self.documents())
        for document, ids in zip(documents, self.encode(encoded)):
            tokens += len(ids)
            num_bytes += len((document if isinstance(document, str) else self.tokenizer.decode(document)).encode())
        if num_bytes == 0:
            raise UserError("All of the documents to evaluate on are empty: give some text.")
        return tokens / num_bytes
