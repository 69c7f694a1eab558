"""Text that is read while it is trained on: whole, in one order for any number of processes, and resumed exactly."""

import functools
import gzip
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tests.training.tiny import (
    TEXT_RUN,
    assert_same_weights,
    call,
    documents,
    failure,
    record_training,
    refusal,
    write_jsonl,
    write_room,
)
from training import causal_lm
from training.data import reading
from training.data.reading import RETRIES, values_of
from training.support.errors import UserError
from training.text import stream as stream_module
from training.text import task
from training.text.blocks import PackedBlocks
from training.text.documents import load_text
from training.text.fields import TextDataArguments
from training.text.stream import StreamBatches, TextStream


ROOT = Path(__file__).parents[3]

END = 9999
TOKENIZER = types.SimpleNamespace(eos_token_id=END)


def write_c4(file, texts):
    """Gzipped JSON lines with the columns of allenai/c4."""
    rows = [
        {"text": text, "timestamp": f"2019-04-{n % 28 + 1:02}T12:57:54Z", "url": f"https://example.org/{n}"}
        for n, text in enumerate(texts)
    ]
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_lm1b(file, texts):
    """Parquet as in the copy of billion-word-benchmark/lm1b that the Hub made, in several row groups."""
    pq.write_table(pa.table({"text": texts}), file, row_group_size=100)


LAYOUTS = {"c4-train.{:05}.json.gz": write_c4, "{:04}.parquet": write_lm1b}


def numbers(folder, *sizes):
    """A stream of files with so many documents each, of one token: their number."""
    count = itertools.count()
    for file, size in enumerate(sizes):
        write_jsonl(folder / f"{file:02}.jsonl", [[next(count)] for _ in range(size)], column="ids")
    return load_dataset("json", data_files=sorted(map(str, folder.glob("*.jsonl"))), split="train", streaming=True)


def stream_of(data, lanes, shuffle_buffer=3, seed=0, block_size=2):
    """With blocks of two tokens, each is a document and its end."""
    return TextStream(PackedBlocks(data, "ids", TOKENIZER, block_size, END + 1), lanes, shuffle_buffer, seed)


def epoch_of(stream, lane, epoch=0):
    """The documents of a lane in an epoch, in the order of training."""
    found, now = [], 0
    for (document, end), mark in stream.blocks(lane, stream.start()):
        assert end == END
        now = mark["epoch"] if mark else now
        if now > epoch:
            return found
        if now == epoch:
            found.append(document)


class Training:
    """Processes that train on a stream, without any model."""

    def __init__(self, stream, batch_size, processes=1, workers=0, checkpoint=None):
        self.ranks = [
            StreamBatches(stream, batch_size, self.collate, processes, rank, workers) for rank in range(processes)
        ]
        for rank in self.ranks if checkpoint else []:
            rank.load(checkpoint)
        self.loaders = [iter(rank) for rank in self.ranks]
        self.ahead = [[] for _ in self.ranks]

    @staticmethod
    def collate(examples):
        return [tuple(example["input_ids"]) for example in examples]

    def step(self, accumulation=1, ahead=0):
        """The blocks of a step, after which the loaders have read some batches ahead of it."""
        seen = []
        for _ in range(accumulation):
            for rank, loader, queue in zip(self.ranks, self.loaders, self.ahead):
                queue.extend(itertools.islice(loader, max(0, 1 + ahead - len(queue))))
                seen += queue.pop(0)
                rank.trained()
        return sorted(seen)

    def save(self, folder):
        for rank in self.ranks:
            rank.save(folder)


@pytest.fixture
def waits(monkeypatch):
    """How long was waited before a file was read again; no test waits."""
    waits = []
    monkeypatch.setattr(reading, "time", types.SimpleNamespace(sleep=waits.append))
    for name in ("READ_MAX_RETRIES", "OPEN_MAX_RETRIES"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}", 1)
    for name in ("OPEN_RETRY", "READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0)
    return waits


# Layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_hub(tmp_path, offline, name):
    texts = documents(700)
    for file in range(3):
        LAYOUTS[name](tmp_path / name.format(file), texts[file * 200 : (file + 1) * 200 + 100 * (file == 2)])
    train, held_out = load_text(
        TextDataArguments(dataset=str(tmp_path), eval_dataset=str(tmp_path), streaming=True, max_eval_documents=250)
    )
    assert isinstance(train, datasets.IterableDataset) and train.num_shards == 3
    assert list(values_of(train, "text")) == texts
    assert held_out["text"][:] == texts[:250]


def test_held_out_documents_are_read_no_further_than_needed(tmp_path, offline):
    write_c4(tmp_path / "a.json.gz", documents(20))
    (tmp_path / "b.json.gz").write_bytes(b"no gzip")
    options = {"dataset": str(tmp_path / "a.json.gz"), "eval_dataset": str(tmp_path), "max_eval_documents": 15}
    assert load_text(TextDataArguments(**options, streaming=True))[1]["text"][:] == documents(20)[:15]
    with pytest.raises(UserError):
        load_text(TextDataArguments(**options))


# Lanes


@pytest.mark.parametrize("shuffle_buffer", [1, 7])
@pytest.mark.parametrize(
    ("sizes", "lanes"),
    [((23,), 1), ((23,), 5), ((10, 9, 17), 2), ((10, 9, 17), 7), ((8, 8, 8, 8), 2), ((5, 1, 0, 9, 6, 30), 3)],
)
def test_lanes_share_no_document_and_leave_none_out(tmp_path, sizes, lanes, shuffle_buffer):
    stream = stream_of(numbers(tmp_path, *sizes), lanes, shuffle_buffer)
    for epoch in (0, 1):
        found = [epoch_of(stream, lane, epoch) for lane in range(lanes)]
        assert sorted(itertools.chain(*found)) == list(range(sum(sizes)))
        assert all(found)


@pytest.mark.parametrize("files", [1, 2, 3, 4, 8])
def test_lanes_are_equally_long_and_of_as_few_files_as_can_be(tmp_path, files):
    stream = stream_of(numbers(tmp_path, *[12] * files), 4)
    for lane in range(4):
        found = epoch_of(stream, lane)
        assert len(found) == 3 * files
        assert len({document // 12 for document in found}) <= {8: 2, 3: 2}.get(files, 1)


def test_documents_keep_their_order_or_are_shuffled_a_buffer_at_a_time(tmp_path):
    data = numbers(tmp_path, 60)
    assert epoch_of(stream_of(data, 2, shuffle_buffer=1), 1) == list(range(1, 60, 2))
    ordered = list(range(1, 60, 2))
    orders = {
        (seed, epoch): epoch_of(stream_of(data, 2, 12, seed), 1, epoch) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    for order in orders.values():
        for first in (0, 12, 24):
            chunk = order[first : first + 12]
            assert sorted(chunk) == ordered[first : first + 12]
            # The two whole chunks are in other orders.
            assert first == 24 or [ordered.index(n) % 12 for n in chunk] not in (
                list(range(12)),
                [ordered.index(n) % 12 for n in order[12 - first : 24 - first]],
            )
    assert len(set(map(tuple, orders.values()))) == len(orders)
    assert epoch_of(stream_of(data, 2, 12, 1), 1, 2) == orders[1, 2]
    # Another lane is in another order.
    assert [n // 2 for n in epoch_of(stream_of(data, 2, 12), 0)] != [n // 2 for n in orders[0, 0]]


def test_files_are_shuffled_too(tmp_path):
    stream = stream_of(numbers(tmp_path, *[2] * 12), 1, shuffle_buffer=2)
    orders = [[document // 2 for document in epoch_of(stream, 0, epoch)[::2]] for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, [*orders, range(12)]))) == 4


def test_blocks_of_a_run_are_those_of_the_lanes_in_turn(tmp_path):
    stream = stream_of(numbers(tmp_path, 9, 9), 4)
    training, seen = Training(stream, 3), []
    for _ in range(10):
        seen += training.loaders[0].__next__()
    lanes = [stream.blocks(lane, stream.start()) for lane in range(4)]
    assert seen == [tuple(next(lanes[number % 4])[0]) for number in range(30)]


@pytest.mark.parametrize("batch", [12, 8])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_steps_are_the_same_for_all_processes_workers_and_accumulations(tmp_path, batch, workers):
    stream = stream_of(numbers(tmp_path, 31, 13, 16), 12)
    training = Training(stream, batch)
    expected = [training.step() for _ in range(9)]
    assert 50 < len(set(itertools.chain(*expected))) < 9 * batch  # into the second epoch
    for processes, accumulation in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))[:: 1 if workers == 0 else 3]:
        training = Training(stream, batch // processes // accumulation, processes, workers)
        assert [training.step(accumulation) for _ in range(9)] == expected, (processes, accumulation)


def test_more_workers_than_lanes(tmp_path):
    stream = stream_of(numbers(tmp_path, 30), 3)
    assert [Training(stream, 4, workers=4).step() for _ in range(3)] == [Training(stream, 4).step() for _ in range(3)]


def counted(monkeypatch):
    """Where files are opened from now on, and the rows that are read of them."""
    opened, rows, read_shard = [], [], stream_module.read_shard

    def counting(data, column, shard, row=0):
        opened.append((shard, row))
        for first, values in read_shard(data, column, shard, row):
            rows.extend((shard, index) for index in range(first, first + len(values)))
            yield first, values

    monkeypatch.setattr(stream_module, "read_shard", counting)
    return opened, rows


@pytest.mark.parametrize("shuffle_buffer", [1, 10, 1000])
@pytest.mark.parametrize(("files", "lanes", "processes"), [(1, 6, 1), (1, 6, 2), (2, 6, 1), (3, 3, 1)])
def test_file_is_read_once_for_all_lanes_of_a_process(tmp_path, monkeypatch, files, lanes, processes, shuffle_buffer):
    stream = stream_of(numbers(tmp_path, *[600 // files] * files), lanes, shuffle_buffer)
    opened, rows = counted(monkeypatch)
    kept, advance = [], stream_module._Read.advance
    monkeypatch.setattr(stream_module._Read, "advance", lambda self: advance(self) and not kept.append(len(self.kept)))
    training = Training(stream, lanes // processes, processes)
    seen = list(itertools.chain(*(training.step() for _ in range(600 // lanes))))
    assert sorted(document for document, _ in seen) == list(range(600))
    assert len(opened) == files * processes and len(rows) == len(set(rows)) * processes == 600 * processes
    assert lanes > files or max(kept) == 1  # nothing is kept for others where there are none


def test_lanes_that_are_far_apart_read_on_their_own(tmp_path, monkeypatch):
    # Every other lane has documents that are 30 times as long.
    for module in (reading, stream_module):
        monkeypatch.setattr(module, "READ_BATCH", 4)
    write_jsonl(tmp_path / "a.jsonl", [[number] * (1 + 29 * (number % 2)) for number in range(800)], column="ids")
    data = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    stream = stream_of(data, 4, shuffle_buffer=2, block_size=5)
    alone = [itertools.islice(stream.blocks(lane, stream.start()), 150) for lane in range(4)]
    expected = [[block for block, _ in blocks] for blocks in alone]
    opened, rows = counted(monkeypatch)
    kept, advance = [], stream_module._Read.advance
    monkeypatch.setattr(stream_module._Read, "advance", lambda self: advance(self) and not kept.append(self.num_kept))
    training = Training(stream, 4)
    together = [next(training.loaders[0]) for _ in range(150)]
    assert [[list(batch[lane]) for batch in together] for lane in range(4)] == expected
    # What is kept does not grow with the file; the two fast lanes, which come to the second epoch, share what they read.
    assert max(kept) <= 2 * 4 * 4 and len(opened) > 2
    assert 800 < len(rows) < 1.2 * 2 * 800


# Resuming


@functools.cache
def longer_documents(count):
    lengths = [n * 7 % 11 for n in range(count)]
    return [[n * 20 + token for token in range(length)] for n, length in enumerate(lengths)]


@pytest.fixture
def longer(tmp_path):
    """Documents of 0 to 10 tokens, in three files."""
    (tmp_path / "data").mkdir()
    for file, part in enumerate((slice(0, 20), slice(20, 45), slice(45, 60))):
        write_jsonl(tmp_path / "data" / f"{file}.jsonl", longer_documents(60)[part], column="ids")
    files = sorted(map(str, (tmp_path / "data").iterdir()))
    return load_dataset("json", data_files=files, split="train", streaming=True)


@pytest.mark.parametrize("shuffle_buffer", [1, 4, 100])
@pytest.mark.parametrize("processes", [(1, 1), (2, 2), (1, 2), (2, 1), (6, 4)])
def test_stream_is_resumed_at_any_step(longer, tmp_path, processes, shuffle_buffer):
    stream = stream_of(longer, 12, shuffle_buffer, block_size=5)
    batch, steps = 24, 12
    whole = Training(stream, batch)
    expected = [whole.step() for _ in range(steps)]
    assert len({str(step) for step in expected}) == steps
    before = Training(stream, batch // processes[0], processes[0])
    for done in range(1, steps):
        assert before.step(ahead=done % 3) == expected[done - 1]
        before.save(tmp_path / "checkpoint")
        after = Training(stream, batch // processes[1], processes[1], checkpoint=tmp_path / "checkpoint")
        assert [after.step() for _ in range(min(3, steps - done))] == expected[done : done + 3]
    # Leftover tokens and further epochs had their part in this.
    marks = [marks[0] for rank in before.ranks for marks in rank.marks.values()]
    assert any(mark["tokens"] for mark in marks) and any(mark["epoch"] for mark in marks)


def test_blocks_before_and_after_resuming_lose_no_token(longer, tmp_path):
    stream = stream_of(longer, 1, 1, block_size=5)
    expected = [token for document in longer_documents(60) for token in (*document, END)]
    seen, training = [], Training(stream, 1)
    for _ in range(len(expected) // 5):
        seen += training.step()[0]
        training.save(tmp_path / "checkpoint")
        training = Training(stream, 1, checkpoint=tmp_path / "checkpoint")
    assert seen == expected[: len(seen)] and len(seen) > 300


def test_stream_is_resumed_with_workers_and_a_batch_that_is_no_multiple_of_the_lanes(longer, tmp_path):
    stream = stream_of(longer, 6, 4, block_size=5)
    whole = Training(stream, 4)
    expected = [whole.step() for _ in range(12)]
    before = Training(stream, 2, 2, workers=2)
    assert [before.step(ahead=1) for _ in range(5)] == expected[:5]  # the next block is the second worker's
    before.save(tmp_path / "checkpoint")
    for processes in (1, 2):
        after = Training(stream, 4 // processes, processes, workers=2, checkpoint=tmp_path / "checkpoint")
        assert [after.step() for _ in range(7)] == expected[5:]


def test_stream_is_resumed_with_another_global_batch(longer, tmp_path):
    stream = stream_of(longer, 6, block_size=5)
    whole = Training(stream, 1)
    order = [whole.step()[0] for _ in range(25)]
    before = Training(stream, 3, 3)
    assert before.step() == sorted(order[:9])
    before.save(tmp_path)
    after = Training(stream, 4, 2, checkpoint=tmp_path)
    assert [after.step(), after.step()] == [sorted(order[9:17]), sorted(order[17:25])]


def test_checkpoint_may_be_written_over_one_of_more_processes(longer, tmp_path):
    stream = stream_of(longer, 4, block_size=5)
    for processes, steps in ((4, 9), (2, 3)):
        training = Training(stream, 8 // processes, processes)
        for _ in range(steps):
            training.step()
        training.save(tmp_path)
    expected = training.step()
    assert Training(stream, 8, checkpoint=tmp_path).step() == expected


def test_resuming_reads_and_packs_one_buffer_again(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    stream = stream_of(numbers(tmp_path / "data", 50, 50, 50, 50), 1, shuffle_buffer=10)
    training = Training(stream, 5)
    for _ in range(27):
        training.step()
    training.save(tmp_path)
    packed, opened = [], []
    encode, read_shard = PackedBlocks.encode, stream_module.read_shard

    def counted(self, documents):
        for document in encode(self, documents):
            packed.append(document)
            yield document

    monkeypatch.setattr(PackedBlocks, "encode", counted)
    monkeypatch.setattr(stream_module, "read_shard", lambda *args: opened.append(args[2:]) or read_shard(*args))
    Training(stream, 5, checkpoint=tmp_path).step()
    # 135 documents were trained on, five of them since the last buffer began in the third file.
    assert len(packed) == 10 and len(opened) == 1 and opened[0][1] == 30


def test_marks_do_not_pile_up(tmp_path):
    training = Training(stream_of(numbers(tmp_path, 40), 2, shuffle_buffer=1), 4)
    for _ in range(50):
        training.step(ahead=2)
    assert all(len(marks) < 10 for marks in training.ranks[0].marks.values())


def test_stream_that_is_another_is_not_resumed(tmp_path):
    (tmp_path / "data").mkdir()
    data = numbers(tmp_path / "data", 20, 20)
    Training(stream_of(data, 4), 4).save(tmp_path)
    for changes in ({"lanes": 2}, {"seed": 1}, {"shuffle_buffer": 4}):
        with pytest.raises(UserError, match="with another order .*seed=0.*seed="):
            Training(stream_of(data, **{"lanes": 4, **changes}), 4, checkpoint=tmp_path)
    (tmp_path / "data" / "02.jsonl").write_text('{"ids": [1]}\n')
    with pytest.raises(UserError, match="files=2 .*files=3"):
        Training(stream_of(numbers(tmp_path / "data", 20, 20), 4), 4, checkpoint=tmp_path)
    with pytest.raises(UserError, match="stream_state_0.json is missing"):
        Training(stream_of(data, 4), 4, checkpoint=tmp_path / "data")


# Refusals


def test_processes_that_cannot_share_the_lanes(tmp_path):
    with pytest.raises(UserError, match="`stream_lanes` is 4, which 3 processes .* multiple of 3"):
        Training(stream_of(numbers(tmp_path, 20), 4), 4, processes=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_fewer_documents_than_lanes(tmp_path, workers):
    with pytest.raises(UserError, match="no document for lane 4 of `stream_lanes` = 6: .*lower"):
        Training(stream_of(numbers(tmp_path, 3), 6), 6, workers=workers).step()


def test_document_that_cannot_be_packed_is_named(tmp_path):
    data = numbers(tmp_path, 5, 5)
    (tmp_path / "01.jsonl").write_text('{"ids": [1]}\n{"ids": [10000]}\n')
    with pytest.raises(UserError, match="Document 1 of '.*01.jsonl' has the token id 10000"):
        Training(stream_of(data, 1), 6).step(2)


# Files that cannot be read


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, but breaks off the first `failures` answers that come to or past the middle of a file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.failures = {}, 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        content = self.server.files[self.path[1:]]
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if body:
            broken = self.server.failures and first <= len(content) // 2 <= last
            if broken:
                self.server.failures -= 1
            self.wfile.write(content[first : len(content) // 2 if broken else last + 1])
        self.close_connection = True


@pytest.fixture
def server():
    with Server() as server:
        yield server


def served(server, tmp_path, name, files=2):
    """Texts, and a stream of them from the server."""
    texts = documents(files * 600)
    for file in range(files):
        LAYOUTS[name](tmp_path / "file", texts[file * 600 : (file + 1) * 600])
        server.files[name.format(file)] = (tmp_path / "file").read_bytes()
    loader = "json" if "json" in name else "parquet"
    urls = [server.url(file) for file in server.files]
    return texts, load_dataset(loader, data_files=urls, split="train", streaming=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_whose_download_breaks_off_is_read_again_from_there(server, tmp_path, waits, caplog, name):
    texts, data = served(server, tmp_path, name)
    server.failures = 3
    assert list(values_of(data, "text")) == texts
    assert server.failures == 0 and waits and waits[0] == 2 and waits == [2 * 2**n for n in range(len(waits))]
    assert name.format(0) in caplog.text and f"retry 1 of {RETRIES} in 2 s" in caplog.text


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_that_cannot_be_downloaded_is_named(server, tmp_path, waits, name):
    _, data = served(server, tmp_path, name)
    server.failures = 10**9
    with pytest.raises(UserError) as error:
        list(values_of(data, "text"))
    assert waits == [2, 4, 8, 16, 32, 64]
    for words in (server.url(name.format(0)), "cannot be read", "after 6 retries", "--resume_from_checkpoint"):
        assert words in str(error.value)


def test_reading_goes_on_behind_the_rows_that_were_read(tmp_path, waits, monkeypatch):
    data, failures = numbers(tmp_path, 2000), iter([700, 700, 1500])
    read = datasets.IterableDataset.iter

    def broken(self, *args):
        fails, count = next(failures, None), self._ex_iterable.n
        for batch in read(self, *args):
            count += len(batch["ids"])
            if fails is not None and count > fails:
                raise ConnectionError("broken off")
            yield batch

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    assert list(values_of(data, "ids")) == [[n] for n in range(2000)]
    assert waits == [2, 4, 2]  # the third failure came after rows had been read


@pytest.mark.parametrize("workers", [0, 1])
def test_run_whose_data_cannot_be_read_on_says_so(room, capsys, waits, monkeypatch, workers):
    texts = documents(700)
    write_c4(room / "a.json.gz", texts)
    write_c4(room / "b.json.gz", texts)
    (room / "b.json.gz").write_bytes((room / "b.json.gz").read_bytes()[:-3000])
    options = ("--streaming", "--stream_lanes=2", f"--dataloader_num_workers={workers}", "--tokenizer_documents=9")
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--dataset=[ab].json.gz", "--output_dir=run", *options)
    assert "'b.json.gz' cannot be read as json after line" in line and "EOFError" in line and "worker" not in line
    assert waits == []  # half a file on the disk does not become whole


# Runs

RUN = (
    *(TEXT_RUN, "--output_dir=run", "--streaming", "--stream_lanes=4", "--shuffle_buffer=5"),
    *("--attention_dropout=0.2", "--max_steps=7", "--gradient_accumulation_steps=2"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A streamed run that was not interrupted, and what it was trained on: more than an epoch of the text."""
    room = tmp_path_factory.mktemp("streamed")
    write_room(room)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        steps = record_training(patch)
        call(causal_lm.main, *RUN, "--baseline=standard")
    return room / "run", steps


def test_both_models_of_a_streamed_run_see_the_same_batches(finished):
    dca, standard = ([step.input_ids for step in finished[1] if step.scheme == s] for s in ("dca", "standard"))
    assert dca == standard and len(set(map(str, dca))) == 14


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_run_is_resumed_to_the_same_weights(finished, room, monkeypatch, workers):
    options = (*RUN, f"--dataloader_num_workers={workers}")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        record_training(patch, interrupt=("dca", 6))
        call(causal_lm.main, *options)
    monkeypatch.setattr(task, "train_tokenizer", lambda *args: pytest.fail("There is a tokenizer."))
    with pytest.MonkeyPatch.context() as patch:
        steps = record_training(patch)
        call(causal_lm.main, *options, "--resume_from_checkpoint")
    assert steps == finished[1][-6:]
    assert_same_weights(room / "run", finished[0])
    resumed, whole = (
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (room / "run", finished[0])
    )
    assert [entry["epoch"] for entry in resumed] == pytest.approx([entry["epoch"] for entry in whole])
    assert [entry.get("loss") for entry in resumed] == [entry.get("loss") for entry in whole]


def test_streamed_run_that_was_complete_is_resumed_for_more_steps(finished, room):
    call(causal_lm.main, *RUN, "--max_steps=2")
    call(causal_lm.main, *RUN, "--resume_from_checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        steps = record_training(patch)
        call(causal_lm.main, *RUN, "--resume_from_checkpoint", "--max_steps=8")
    assert [step.number for step in steps] == [8, 8]
    seen = [step.input_ids for step in finished[1]]
    assert not [step for step in steps if step.input_ids in seen]


@pytest.mark.slow
def test_processes_train_on_a_stream_as_one_does_and_their_run_is_resumed_by_one(room):
    options = ["--attention_dropout=0", "--use_cpu"]
    for name, processes, batch, more in (
        ("one", 1, 4, []),
        ("two", 2, 2, ["--max_steps=4"]),
        ("two", 1, 4, ["--resume_from_checkpoint"]),
    ):
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"] if processes == 2 else []
        sizes = [f"--output_dir={name}", f"--per_device_train_batch_size={batch}"]
        line = [sys.executable, "-m", *launch, "training.causal_lm", *RUN, *options, *sizes, *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        completed = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert completed.returncode == 0, completed.stderr
    one, two = (json.loads((room / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two"))
    losses = [entry["loss"] for entry in one if "loss" in entry]
    assert len(losses) == 7
    assert [entry["loss"] for entry in two if "loss" in entry] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("option", ["--stream_lanes=0", "--shuffle_buffer=0"])
def test_fields_that_cannot_be(room, capsys, option):
    name, _, value = option[2:].partition("=")
    assert f"`{name}` is 0; it must be at least 1." in refusal(capsys, causal_lm.main, TEXT_RUN, option)
