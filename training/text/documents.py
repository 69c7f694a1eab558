"""The documents of a run."""

import hashlib
import itertools
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, List, Value

from training.data.reading import values_of
from training.data.splits import TEXT_FORMATS, code_of, load_splits, made_once
from training.support.errors import UserError
from training.text.fields import TextDataArguments


def standard_library(arguments: TextDataArguments) -> tuple[Dataset, Dataset]:
    """
    The source code of the running Python's standard library, one document per file, `text` and `path`.

    Files with the same text count once. Whether a file is held out depends only on its path: no release of Python and no run
    has a file in both parts.
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
    # In the order of the draws, the first documents are a random sample.
    held_out, train = (
        Dataset.from_dict({"path": [path for _, path, _ in part], "text": [text for _, _, text in part]})
        for part in (sorted(parts[True]), sorted(parts[False]))
    )
    return train, held_out


#: The number of words or punctuation marks in the n-grams that measure overlap, the usual one for near duplicates.
OVERLAP_LENGTH = 13


def runs_of_words(document: str | list[int]) -> set[int]:
    """The hashes of all n-grams of `OVERLAP_LENGTH` words or punctuation marks of a text, or of token ids."""
    words = document if isinstance(document, list) else re.findall(r"\w+|[^\w\s]", str(document))
    return {hash(tuple(words[i : i + OVERLAP_LENGTH])) for i in range(len(words) - OVERLAP_LENGTH + 1)}


def without_copies(held_out: Dataset, train: Dataset, column: str, share: float) -> Dataset:
    """
    The held-out documents that have at most a `share` of their n-grams in common with the training documents. (Documents that
    are shorter than one n-gram have none.)

    Raises:
        [`UserError`]: no document is left.
    """

    def kept():
        own = [runs_of_words(document) for document in values_of(held_out, column)]
        left = set().union(*own)
        seen = set()
        for document in values_of(train, column):
            seen |= runs_of_words(document) & left
        yield {"kept": [index for index, runs in enumerate(own) if len(runs & seen) <= share * len(runs)]}

    decisive = (held_out, train, column, share, code_of(runs_of_words, without_copies))
    indices = made_once(kept, Features({"kept": List(Value("int64"))}), *decisive)[0]["kept"]
    if not indices:
        raise UserError(
            f"`max_eval_overlap` is {share}, but all held-out documents have more than that in common with the training "
            "documents: raise it, or give other documents."
        )
    return held_out.select(indices)


def load_text(
    arguments: TextDataArguments, held_out_only: bool = False
) -> tuple[Dataset | IterableDataset | None, Dataset]:
    """
    The training documents and the held-out documents, with the column `arguments.text_column`.

    Args:
        held_out_only: return `None` in place of the training documents, and do not load them unless the held-out documents
            are a share of them.
    """
    if arguments.block_size < 2:
        raise UserError(f"`block_size` is {arguments.block_size}; a block must have at least 2 tokens.")
    for name in ("max_eval_documents", "tokenizer_documents", "stream_lanes", "shuffle_buffer"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}; it must be at least 1.")
    overlap = arguments.max_eval_overlap
    if overlap is not None and not 0 <= overlap < 1:
        raise UserError(f"`max_eval_overlap` is {overlap}; it must be at least 0 and below 1.")
    if overlap is not None and arguments.streaming:
        raise UserError("`max_eval_overlap` needs all training documents in advance: leave it out, or `streaming`.")
    train, held_out = load_splits(
        arguments,
        {"stdlib": standard_library},
        TEXT_FORMATS,
        [arguments.text_column],
        streaming=arguments.streaming,
        # A few documents can be read without downloading all.
        held_out_streaming=arguments.streaming and arguments.max_eval_documents is not None,
        held_out_only=held_out_only and overlap is None,
    )
    if overlap is not None:
        held_out = without_copies(held_out, train, arguments.text_column, overlap)
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
        [`UserError`]: a document is not text.
    """
    for document in values_of(data, column):
        if not isinstance(document, str):
            raise UserError(
                f"A document has in {column!r} {document!r:.40}, from which no tokenizer can be trained: give text, or set "
                "`tokenizer` to the one that the token ids come from."
            )
        yield document
