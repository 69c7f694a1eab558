"""The text of a run, in blocks of tokens."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from training.data.files import check_document
from training.data.reading import read_shard, values_of
from training.data.splits import code_of, made_once
from training.support.errors import UserError
from training.text.tokenizer import plain_tokens


TOKENIZER_BATCH = 256


class PackedBlocks:
    """
    Documents, packed into blocks of `block_size` token ids. An end-of-text token follows each document, and the whole
    sequence is cut every `block_size` tokens. An incomplete last block is dropped.

    The name of a special token in a text is plain text: the only special token is the end of a document.

    Args:
        data: the documents, with a column of texts or of lists of token ids.
        vocab_size: all token ids must be below it.

    Raises:
        [`UserError`]: a document is not text, or has a token id out of range.
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
        documents, size = iter(documents), 1  # small at first, so that the first block comes soon
        are_texts = set()
        while batch := list(itertools.islice(documents, size)):
            size = min(2 * size, TOKENIZER_BATCH)
            are_texts |= {isinstance(document, str) for document in batch}
            if len(are_texts) > 1:
                raise UserError(f"The column {self.column!r} has both texts and lists of token ids: use one of them.")
            if True in are_texts:
                batch = plain_tokens(self.tokenizer, batch)
            for document in batch:
                yield [*document, self.tokenizer.eos_token_id]

    def checked(self, document: Any, place: str) -> str | list[int]:
        """The document itself, if it can be packed; `place` is for the error message."""
        check_document(document, self.column, place)
        if isinstance(document, str):
            return document
        for token in document:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{place} has the token id {token}; with `vocab_size` = {self.vocab_size} it must be from 0 to {self.vocab_size - 1}."
                )
        return document

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """
        The blocks, `input_ids` `(block_size,)` each.

        Raises:
            [`UserError`]: the documents are too short for one block.
        """
        left, count, size = np.empty(0, np.int32), 0, self.block_size
        documents = self.tokens_of_documents()
        while batch := list(itertools.islice(documents, TOKENIZER_BATCH if count else 1)):
            tokens = np.concatenate([left, *(np.array(document, np.int32) for document in batch)])
            whole = len(tokens) // size * size
            for block in tokens[:whole].reshape(-1, size):
                yield {"input_ids": block}
            left, count = tokens[whole:], count + whole // size
        if not count:
            raise UserError(
                f"The text has {len(left)} tokens, too few for one block of `block_size` = {size}: give more text, or lower "
                "`block_size`."
            )

    def materialize(self) -> Dataset:
        """All blocks, as a memory-mapped data set on disk. It is rebuilt when data, tokenizer or code change."""
        plain_tokens(
            self.tokenizer, [""]
        )  # (its state includes the arguments of the last call: these are always the same)
        warned = {"deprecation_warnings": None}  # (it also includes the warnings that were given)
        decisive = {**vars(self), "tokenizer": {**vars(self.tokenizer), **warned}}
        return made_once(
            self.__iter__,
            Features({"input_ids": List(Value("int32"))}),
            *decisive.values(),
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
        next(iter(self))

    def tokens_per_byte(self) -> float:
        """
        The number of tokens per byte of the documents in UTF-8, end-of-text tokens included. If documents are token ids, the
        bytes are those of the decoded text.
        """
        tokens = num_bytes = 0
        documents, encoded = itertools.tee(self.documents())
        for document, ids in zip(documents, self.encode(encoded)):
            tokens += len(ids)
            num_bytes += len((document if isinstance(document, str) else self.tokenizer.decode(document)).encode())
        if num_bytes == 0:
            raise UserError("All held-out documents are empty: give some text.")
        return tokens / num_bytes
