"""The rows of data from files or the network, with retries where they may help."""

import asyncio
import itertools
import logging
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HTTPError

from training.support.errors import UserError, innermost_message


logger = logging.getLogger(__name__)

# How often to open a file again that cannot be read, and the seconds to wait the first time; the wait doubles each time.
# (`datasets` has already retried by then if the server could not be reached.)
RETRIES = 6
FIRST_WAIT = 2.0
# Errors of a lost connection, a failing server, or an incomplete download.
PASSING_ERRORS = (OSError, EOFError, zlib.error, HTTPError, asyncio.TimeoutError)
# These, and errors of the content of a file.
READ_ERRORS = (*PASSING_ERRORS, ValueError, NotImplementedError, pa.ArrowException)

READ_BATCH = 256


def shard_name(data: IterableDataset, shard: int) -> str:
    """The path or URL of a file of the data."""
    for values in getattr(data._ex_iterable, "kwargs", {}).values():  # there is no public API
        if isinstance(values, list) and len(values) == data.num_shards and isinstance(values[shard], str):
            return repr(values[shard])
    return f"{shard + 1} of {data.num_shards}"


def read_shard(data: IterableDataset, column: str, shard: int, row: int = 0) -> Iterator[tuple[int, list]]:
    """
    The values of a column in a file of the data, starting at a row: for each batch, the number of its first row and its values.

    A file that cannot be read is opened again, after a wait that doubles each time, and reading continues where it failed.

    Raises:
        [`UserError`]: the file cannot be read after `RETRIES` retries, or its content is invalid.
    """
    failures = 0
    while True:
        try:
            for batch in data.shard(data.num_shards, shard).select_columns([column]).skip(row).iter(READ_BATCH):
                values = batch[column]
                yield row, values
                row += len(values)
                failures = 0
            return
        except READ_ERRORS as error:
            reason = f"{type(error).__name__}: {innermost_message(error)}"
            failure = f"The data file {shard_name(data, shard)} cannot be read from row {row} on ({reason})"
            if not isinstance(error, PASSING_ERRORS):
                raise UserError(f"{failure}: fix it.") from error
            failures += 1
            if failures > RETRIES:
                raise UserError(
                    f"{failure}, after {RETRIES} retries: check the file or the connection, and continue with "
                    "--resume_from_checkpoint."
                ) from error
            wait = FIRST_WAIT * 2 ** (failures - 1)
            logger.warning(str(UserError(f"{failure}: retry {failures} of {RETRIES} in {wait:g} s.")))
            time.sleep(wait)


def values_of(data: Dataset | IterableDataset, column: str) -> Iterator[Any]:
    """All values of a column, in the order of the data."""
    if isinstance(data, Dataset):
        batches = (batch[column] for batch in data.select_columns([column]).iter(READ_BATCH))
    else:
        batches = (values for shard in range(data.num_shards) for _, values in read_shard(data, column, shard))
    return itertools.chain.from_iterable(batches)
