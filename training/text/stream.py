"""
Text that is streamed during training, in the same order for any number of processes and workers.

The documents are divided into a fixed number of lanes. Each lane shuffles its part of the files independently and packs it
into blocks. Block `g` of a run is block `g // lanes` of lane `g % lanes`, whichever process reads that lane.
"""

import itertools
import json
import os
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec.asyn
import torch
from torch.utils.data import DataLoader

from training.data.reading import READ_BATCH, read_shard, shard_name
from training.support.errors import UserError
from training.support.files import DamagedFile, read_json
from training.text.blocks import PackedBlocks


STATE_FILE = "stream_state_{}.json"


class _Read:
    """A file that is being read, and a buffer of its last documents for slower lanes."""

    def __init__(self, batches: Iterator[tuple[int, list]], row: int, of: Callable[[int], bool], capacity: int):
        self.batches, self.of, self.capacity = batches, of, capacity
        self.first = self.end = row  # the first row in the buffer, and the row after its last one
        # For each batch its first row, the row after its last one, and the documents with their rows.
        self.kept: deque[tuple[int, int, list[tuple[int, Any]]]] = deque()
        self.num_kept = 0

    def advance(self) -> bool:
        """Read the next batch; return whether there was one."""
        batch = next(self.batches, None)
        if batch is None:
            return False
        first, values = batch
        documents = [(row, value) for row, value in enumerate(values, first) if self.of(row)]
        self.end = first + len(values)
        self.kept.append((first, self.end, documents))
        self.num_kept += len(documents)
        while self.num_kept > self.capacity and len(self.kept) > 1:
            self.num_kept -= len(self.kept.popleft()[2])
            self.first = self.kept[0][0]
        return True

    def documents(self, row: int) -> tuple[int, list[tuple[int, Any]]]:
        """The row after the batch that holds `row`, and the buffered documents of the batch from `row` on."""
        end, documents = next((end, documents) for _, end, documents in self.kept if row < end)
        return end, [(index, document) for index, document in documents if index >= row]


class SharedReads:
    """
    Reads a file once for all lanes that share it, while they are within a buffer of two shuffle buffers per lane. A lane that
    is further behind opens the file again, together with other lanes near it.

    Args:
        lanes: the lanes that read; documents of other lanes are not buffered.
    """

    def __init__(self, stream: "TextStream", lanes: Collection[int]):
        self.stream, self.lanes = stream, lanes
        # By file. A read is dropped when no lane uses it, except the last one of a shared file, which a lane may still need.
        self.open: dict[int, weakref.WeakSet[_Read]] = defaultdict(weakref.WeakSet)
        self.last: dict[int, _Read] = {}

    def documents(self, shard: int, row: int) -> Iterator[tuple[int, Any]]:
        """The documents of the lanes in a file from a row on, with their rows."""
        read = None
        while True:
            if read is None or row < read.first:
                read = next((each for each in self.open[shard] if each.first <= row <= each.end), None)
            if read is None:
                read = self._start(shard, row)
            if row == read.end and not read.advance():
                return
            row, documents = read.documents(row)
            yield from documents

    def _start(self, shard: int, row: int) -> _Read:
        packed, lane_of = self.stream.packed, self.stream.lane_of
        lanes = frozenset(self.stream.lanes_of(shard)).intersection(self.lanes)
        capacity = 2 * max(self.stream.shuffle_buffer, READ_BATCH) * len(lanes) if len(lanes) > 1 else 0
        batches = read_shard(packed.data, packed.column, shard, row)
        read = _Read(batches, row, lambda index: lane_of(shard, index) in lanes, capacity)
        self.open[shard].add(read)
        if len(lanes) > 1:
            self.last[shard] = read
        return read


class TextStream:
    """
    The blocks of a stream, as endless lanes that share no document.

    Each file is divided into `num_lanes` parts by the rows `r % num_lanes`, and all lanes have the same number of parts: whole
    files if their number is a multiple of `num_lanes`. At its end, a lane starts its next epoch.

    Args:
        packed: the documents, and how they are packed into blocks.
        shuffle_buffer: the number of documents of a lane that are read and shuffled at a time; the order of its files is
            shuffled, too. 1 keeps the order of both.
        seed: the seed of the shuffles.
    """

    def __init__(self, packed: PackedBlocks, num_lanes: int, shuffle_buffer: int, seed: int):
        self.packed, self.num_lanes, self.shuffle_buffer, self.seed = packed, num_lanes, shuffle_buffer, seed
        self.num_files = packed.data.num_shards

    @property
    def order(self) -> dict[str, int]:
        """What the order of the blocks depends on, apart from the text."""
        return {
            "files": self.num_files,
            "stream_lanes": self.num_lanes,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }

    def batches(self, batch_size: int, collate: Callable[[list[dict]], Any], **options: int | None) -> "StreamBatches":
        """The batches of one process, see [`StreamBatches`]."""
        return StreamBatches(self, batch_size, collate, **options)

    def start(self) -> dict[str, Any]:
        """The start of a lane. `blocks` counts the blocks before a mark, and `tokens` are left over from them."""
        return {"epoch": 0, "chunk": 0, "file": 0, "row": 0, "tokens": [], "blocks": 0}

    def _shuffle(self, values: list, *place: int) -> None:
        if self.shuffle_buffer > 1:
            random.Random(" ".join(map(str, (self.seed, *place)))).shuffle(values)

    def lanes_of(self, shard: int) -> range:
        """The lanes that have a part of a file."""
        lanes = self.num_lanes
        return range(shard * lanes // self.num_files, ((shard + 1) * lanes - 1) // self.num_files + 1)

    def lane_of(self, shard: int, row: int) -> int:
        """The lane that has a row of a file."""
        return (shard * self.num_lanes + row % self.num_lanes) // self.num_files

    def _documents(
        self, lane: int, epoch: int, file: int, row: int, reads: SharedReads
    ) -> Iterator[tuple[int, int, Any]]:
        """The rest of an epoch of a lane, from a row of a file on, as (file, row, document)."""
        parts = self.num_files  # a file has `num_lanes` parts, and a lane has `num_files`
        files = list(range(lane * parts // self.num_lanes, ((lane + 1) * parts - 1) // self.num_lanes + 1))
        self._shuffle(files, lane, epoch)
        for position in range(file, len(files)):
            shard = files[position]
            name = shard_name(self.packed.data, shard)
            for index, document in reads.documents(shard, row):
                if self.lane_of(shard, index) == lane:
                    yield position, index, self.packed.checked(document, f"Document {index} of {name}")
            row = 0

    def blocks(
        self, lane: int, mark: dict[str, Any], reads: SharedReads | None = None
    ) -> Iterator[tuple[list[int], dict[str, Any] | None]]:
        """
        The endless blocks of a lane from a mark on. It shares what it reads with other lanes through `reads`.

        The first block of each chunk of documents comes with a mark from which that chunk can be read again.
        """
        reads = reads or SharedReads(self, [lane])
        epoch, chunk, file, row = (mark[name] for name in ("epoch", "chunk", "file", "row"))
        tokens, blocks, size = mark["tokens"], mark["blocks"], self.packed.block_size
        while True:
            documents = self._documents(lane, epoch, file, row, reads)
            while read := list(itertools.islice(documents, self.shuffle_buffer)):
                mark = {"epoch": epoch, "chunk": chunk, "file": file, "row": row, "tokens": tokens, "blocks": blocks}
                file, row = read[-1][0], read[-1][1] + 1
                chosen = [document for _, _, document in read]
                self._shuffle(chosen, lane, epoch, chunk)
                for document in self.packed.encode(chosen):
                    tokens = tokens + document
                    for start in range(0, len(tokens) - size + 1, size):
                        yield tokens[start : start + size], mark
                        mark, blocks = None, blocks + 1
                    tokens = tokens[len(tokens) // size * size :]
                chunk += 1
            if chunk == 0:
                raise UserError(
                    f"The data has no document for lane {lane + 1} of `stream_lanes` = {self.num_lanes}: give more documents, "
                    "or lower `stream_lanes`."
                )
            epoch, chunk, file, row = epoch + 1, 0, 0, 0


def check_lanes(num_lanes: int, num_processes: int) -> None:
    """
    Raises:
        [`UserError`]: the lanes cannot be divided evenly among the processes.
    """
    if num_lanes % num_processes:
        raise UserError(
            f"`stream_lanes` is {num_lanes}, which {num_processes} processes cannot share evenly: give a multiple of "
            f"{num_processes}."
        )


class _Rounds(torch.utils.data.IterableDataset):
    """One block of each lane at a time, as (lane, block, mark). Each worker has its own lanes."""

    def __init__(self, stream: TextStream, starts: dict[int, tuple[dict[str, Any], int]]):
        self.stream, self.starts = stream, starts

    def __iter__(self) -> Iterator[list[tuple[int, list[int], dict[str, Any] | None]] | UserError]:
        worker = torch.utils.data.get_worker_info()
        lanes = list(self.starts)[worker.id :: worker.num_workers] if worker else list(self.starts)
        blocks, reads = {}, SharedReads(self.stream, lanes)
        for lane in lanes:
            mark, skipped = self.starts[lane]
            blocks[lane] = itertools.islice(self.stream.blocks(lane, mark, reads), skipped, None)
        try:
            while blocks:
                yield [(lane, *next(blocks[lane])) for lane in lanes]
        except UserError as error:
            yield error  # raised here, it would carry the traceback of the worker


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker_id: int) -> None:
    fsspec.asyn.reset_lock()  # its thread was not forked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel


class StreamBatches(torch.utils.data.IterableDataset):
    """
    The batches of one process, and its position in the stream.

    Args:
        collate: makes a batch from examples with `input_ids`.
        prefetch_factor: the number of batches that each worker reads ahead.

    Raises:
        [`UserError`]: the lanes cannot be divided evenly among the processes.
    """

    def __init__(
        self,
        stream: TextStream,
        batch_size: int,
        collate: Callable[[list[dict]], Any],
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
    ):
        check_lanes(stream.num_lanes, num_processes)
        self.stream, self.batch_size, self.collate = stream, batch_size, collate
        self.num_processes, self.process_index = num_processes, process_index
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor or 2
        # The number of blocks that all processes were trained on. For each lane of this process: the mark before its next
        # block, and the later marks that the loader, which reads ahead, has passed.
        self.num_blocks = 0
        self.marks = {lane: deque([stream.start()]) for lane in range(process_index, stream.num_lanes, num_processes)}

    def _blocks_of(self, lane: int) -> int:
        """The number of blocks of a lane that were trained on."""
        rounds, rest = divmod(self.num_blocks, self.stream.num_lanes)
        return rounds + (lane < rest)

    def __iter__(self) -> Iterator[Any]:
        starts = {lane: (marks[0], self._blocks_of(lane) - marks[0]["blocks"]) for lane, marks in self.marks.items()}
        options = {}
        if self.num_workers:
            rounds = -(-self.batch_size // len(starts))
            options = {"prefetch_factor": self.prefetch_factor * rounds, "worker_init_fn": _start_worker}
        # With its own generator, it does not change the state of the global one.
        loader = DataLoader(
            _Rounds(self.stream, starts),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            generator=torch.Generator(),
            **options,
        )
        blocks = self._in_order(iter(loader), self.num_blocks)
        while True:
            yield self.collate([{"input_ids": block} for block in itertools.islice(blocks, self.batch_size)])

    def _in_order(self, rounds: Iterator, first: int) -> Iterator[list[int]]:
        """The blocks of this process, starting at block `first` of the run."""
        waiting = {lane: deque() for lane in self.marks}
        first += (self.process_index - first) % self.num_processes
        for number in itertools.count(first, self.num_processes):
            lane = number % self.stream.num_lanes
            while not waiting[lane]:
                entries = next(rounds)
                if isinstance(entries, UserError):
                    raise entries
                for entry in entries:
                    waiting[entry[0]].append(entry[1:])
            block, mark = waiting[lane].popleft()
            if mark is not None:
                self.marks[lane].append(mark)
            yield block

    def trained(self) -> None:
        """Note that every process was trained on a batch."""
        self.num_blocks += self.batch_size * self.num_processes
        for lane, marks in self.marks.items():
            while len(marks) > 1 and marks[1]["blocks"] <= self._blocks_of(lane):
                marks.popleft()

    def save(self, folder: str | Path) -> None:
        """Write the positions of the lanes of this process to a checkpoint."""
        state = {
            "order": self.stream.order,
            "num_processes": self.num_processes,
            "num_blocks": self.num_blocks,
            "lanes": {lane: marks[0] for lane, marks in self.marks.items()},
        }
        file = Path(folder, STATE_FILE.format(self.process_index))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """
        Continue at the position in a checkpoint, whatever the number of processes that wrote it.

        Raises:
            [`UserError`]: the checkpoint has no position, or that of a stream in another order.
        """
        lanes = {}
        process, num_processes = 0, 1
        while process < num_processes:
            file = Path(folder, STATE_FILE.format(process))
            try:
                state = read_json(file, "order", "num_processes", "lanes", "num_blocks")
            except DamagedFile as error:
                raise UserError(
                    f"The checkpoint {folder} lacks the position of its stream: {file.name} is missing or damaged."
                ) from error
            if state["order"] != self.stream.order:
                now, before = (" ".join(f"{k}={v}" for k, v in o.items()) for o in (self.stream.order, state["order"]))
                raise UserError(
                    f"The checkpoint {folder} is of a stream with another order ({before}) than this run ({now})."
                )
            # (A folder that was written twice may have files of more processes.)
            process, num_processes = process + 1, state["num_processes"]
            lanes.update(state["lanes"])
        self.num_blocks = state["num_blocks"]
        self.marks = {lane: deque([lanes[str(lane)]]) for lane in self.marks}
