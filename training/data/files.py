"""The documents in local files (text, JSON, parquet or CSV): one column, whatever else the files hold."""

import codecs
import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.compression
import fsspec.utils
import pyarrow as pa
import pyarrow.parquet as pq

from training.support.errors import UserError, innermost_message


COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
PARQUET_BATCH = 256


def ending(file: str | Path) -> str:
    """The suffix of the format in lower case, without that of a compression."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def check_document(document: Any, column: str, place: str) -> None:
    """
    Check that a document is text or a list of token ids.

    Args:
        place: where the document is, for the error message.

    Raises:
        [`UserError`]: it is something else.
    """
    if isinstance(document, str):
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place} has in {column!r} the character {document[error.start]!a} at position {error.start}, an unpaired "
                "surrogate: fix the text."
            ) from error
    elif not isinstance(document, list) or not all(type(token) is int for token in document):
        raise UserError(f"{place} has in {column!r} {document!r:.40}; it must be text, or a list of token ids.")


def read_file(file: str, column: str) -> Iterator[tuple[str, Any]]:
    """
    The values of a column in a local file, each with a description of its place. A text file is one document, unchanged
    except for a byte order mark.

    Raises:
        [`UserError`]: the content of the file is invalid, or has no such column.
        OSError: the file cannot be read, which may be temporary.
    """
    kind = ending(file)
    place = f"The data file {file!r}"
    try:
        with open(file, "rb") as raw:
            for position, value in READERS[kind](_decompressed(raw, file), column):
                place = f"{position} of {file!r}"
                yield place, value
    except UserError as error:
        raise UserError(f"The data file {file!r}: {error}") from error.__cause__
    except (EOFError, ValueError, RecursionError, OSError, csv.Error, pa.ArrowException, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise  # an error of the disk or the network, not of the content
        after = "" if place.startswith("The") else f" after {place.partition(' of ')[0].lower()}"
        raise UserError(
            f"The data file {file!r} cannot be read as {kind.removeprefix('.')}{after}: {type(error).__name__}: "
            f"{innermost_message(error)}"
        ) from error


def _decompressed(raw: BinaryIO, file: str) -> BinaryIO:
    compression = fsspec.utils.infer_compression(file)
    if compression is None:
        return raw
    if compression not in fsspec.compression.compr:
        raise UserError(f"The compression {compression} is not installed: unpack the file.")
    return io.BufferedReader(fsspec.compression.compr[compression](raw, mode="rb"))


def _decoded(content: bytes, line: int = 1) -> str:
    """The text of bytes that start at a line of the file."""
    try:
        return (content.removeprefix(codecs.BOM_UTF8) if line == 1 else content).decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise UserError(f"Line {line} is not UTF-8 ({innermost_message(error)}): fix it.") from error


def _of_row(row: dict, column: str, position: str) -> Any:
    if column not in row:
        raise UserError(f"{position} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}.")
    return row[column]


def _read_text(stream: BinaryIO, column: str) -> Iterator[tuple[str, str]]:
    text = _decoded(stream.read())
    yield "Document 0", _of_row({"text": text}, column, "It")


def _read_json(stream: BinaryIO, column: str) -> Iterator[tuple[str, Any]]:
    """JSON lines, or one list of objects."""
    first = True
    for number, line in enumerate(stream, 1):
        text = _decoded(line, number)
        if not text.strip():
            continue
        position = f"Line {number}"
        if first and text.lstrip().startswith("["):
            rows = json.loads(text + _decoded(stream.read(), number + 1))
            rows = ((f"Row {index}", row) for index, row in enumerate(rows))
        else:
            rows = [(position, _parsed(text, position))]
        first = False
        for position, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{position} is {row!r:.40}; it must be a JSON object with the column {column!r}.")
            yield position, _of_row(row, column, position)


def _parsed(text: str, position: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{position} is not JSON ({innermost_message(error)}): fix it.") from error


def _read_csv(stream: BinaryIO, column: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document may be long
    rows = csv.reader((_decoded(line, number) for number, line in enumerate(stream, 1)), strict=True)
    names = next(rows, [])
    if names.count(column) > 1:
        raise UserError(f"It has several columns {column!r}: keep one of them.")
    for row in rows:
        position = f"Line {rows.line_num}"
        if not row and len(names) == 1:
            row = [""]  # an empty document
        if not row:
            continue
        if len(row) != len(names):
            raise UserError(f"{position} has {len(row)} fields, but the first line has {len(names)}: fix it.")
        yield position, _of_row(dict(zip(names, row)), column, position)


def _read_parquet(stream: BinaryIO, column: str) -> Iterator[tuple[str, Any]]:
    file = pq.ParquetFile(stream)
    _of_row(dict.fromkeys(file.schema_arrow.names), column, "It")
    index = 0
    for batch in file.iter_batches(PARQUET_BATCH, columns=[column]):
        for value in batch.column(column).to_pylist():
            yield f"Row {index}", value
            index += 1


#: The readers, by the suffix of a file.
READERS: dict[str, Callable[[BinaryIO, str], Iterator[tuple[str, Any]]]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
