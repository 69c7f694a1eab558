"""Local files of text: the column that is asked for, whatever else is in them, and the place of what cannot be read."""

import bz2
import codecs
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.tiny import TEXT_RUN, call, documents, failure, refusal, write_jsonl
from training import causal_lm
from training.data import reading
from training.data.files import READERS, ending, read_file
from training.support.errors import UserError
from training.text.documents import load_text
from training.text.fields import TextDataArguments


pytestmark = pytest.mark.usefixtures("offline")

HARD = [
    "größe 🙂",
    'two\nlines, "quoted"',
    " ",
    "NA",
    "007",
    "1.50",
    "true",
    "x" * 200_000,
    "",
    "a\r\nb\rc",
    "\u2028\x85",
    "null",
]
ROWS = [{"id": str(number), "text": text, "more": "z"} for number, text in enumerate(HARD)]


def in_csv(rows, end="\n"):
    def quoted(value):
        return '"' + value.replace('"', '""') + '"'

    return end.join([",".join(rows[0]), *(",".join(map(quoted, row.values())) for row in rows), ""]).encode()


WRITERS = {
    "lines.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
    "escaped.json": lambda rows: "\n\n".join(map(json.dumps, rows)).encode(),
    "windows.jsonl": lambda rows: codecs.BOM_UTF8 + "\r\n".join(map(json.dumps, rows)).encode(),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "a.csv": in_csv,
    "windows.csv": lambda rows: codecs.BOM_UTF8 + in_csv(rows, "\r\n"),
    "packed.JSONL.GZ": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "packed.csv.bz2": lambda rows: bz2.compress(in_csv(rows)),
    "packed.jsonl.xz": lambda rows: lzma.compress("\n".join(map(json.dumps, rows)).encode()),
}


def values(file, column="text"):
    return [value for _, value in read_file(str(file), column)]


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_read_as_they_stand_there(tmp_path, name):
    (tmp_path / name).write_bytes(WRITERS[name](ROWS))
    assert values(tmp_path / name) == HARD
    assert values(tmp_path / name, "id") == [row["id"] for row in ROWS]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz"])
def test_text_file_is_read_as_it_stands_there(tmp_path, name):
    content = codecs.BOM_UTF8 + "\r\ngröße\r\n\n\ufeff\rend".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name else content)
    assert values(tmp_path / name) == ["\r\ngröße\r\n\n\ufeff\rend"]


def test_parquet_of_any_text_type(tmp_path):
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"other": [1] * len(HARD), "text": pa.array(HARD).cast(kind)})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=5)
        assert values(tmp_path / f"{number}.parquet") == HARD
    pq.write_table(pa.table({"ids": [[1, 2], []]}), tmp_path / "ids.parquet")
    assert values(tmp_path / "ids.parquet", "ids") == [[1, 2], []]


def test_endings():
    assert [ending(name) for name in ("a.b.JSON.Gz", "x/a.txt", "a.gz", "train")] == [".json", ".txt", "", ""]
    assert ending("a.zip") not in READERS


LATIN = "größe".encode("latin-1")
WRONG = [
    ("a.txt", b"one\ntwo\n" + LATIN, ["Line 3 is not UTF-8", "0xf6"]),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "' + LATIN + b'"}\n', ["Line 3 is not UTF-8", "0xf6"]),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "' + LATIN + b'"}\n', mtime=0), ["Line 2 is not UTF-8", "0xf6"]),
    ("a.json", b'[\n{"text": "a"},\n{"text": "' + LATIN + b'"}]', ["Line 3 is not UTF-8"]),
    ("a.csv", b"text,b\na,b\n" + LATIN + b",b\n", ["Line 3 is not UTF-8", "0xf6"]),
    ("a.jsonl", "text".encode("utf-16"), ["Line 1 is not UTF-8"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["Line 2 is not JSON"]),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}\n', ["Line 2 has no column 'text'", "body, n"]),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', ["Line 2 is ['b']", "JSON object"]),
    ("a.json", b'{\n "text": "a"\n}\n', ["Line 1 is not JSON"]),
    ("a.json", b"[1]", ["Row 0 is 1", "JSON object"]),
    ("a.csv", b"text,b\na,b\nwith, comma,b\n", ["Line 3 has 3 fields"]),
    ("a.csv", b"text\nhello, world\n", ["Line 2 has 2 fields"]),
    ("a.csv", b"a,b\n1,2\n", ["no column 'text'", "a, b"]),
    ("a.csv", b"text,text\n1,2\n", ["several columns 'text'"]),
    ("a.csv", b'text\na\n"never closed\nb\n', ["cannot be read as csv after line 2"]),
    ("a.parquet", b"PAR1 no parquet PAR1", ["cannot be read as parquet"]),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:-20], ["cannot be read as jsonl", "EOFError"]),
    ("a.jsonl.gz", b"no gzip", ["cannot be read as jsonl", "gzip"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        values(tmp_path / name)
    missing = [word for word in (repr(str(tmp_path / name)), *words) if word not in str(error.value)]
    assert not missing, error.value


def test_file_that_cannot_be_opened_may_be_tried_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        values(tmp_path / "nowhere.txt")


# Whole runs


def write_two(folder, name):
    """Two files of one format, of which the second has another column of another type, and no row in common."""
    texts = documents(60)
    for number, other in enumerate(([1], [{"a": "b"}])):
        file, part = folder / f"{number}-{name}", texts[number::2]
        rows = [{**({} if number else {"first": 1}), "text": text, "other": other * len(text)} for text in part]
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif name.endswith(".csv"):
            file.write_bytes(in_csv([{key: str(value) for key, value in row.items()} for row in rows]))
        else:
            file.write_bytes(WRITERS[name](rows))
    return texts[0::2] + texts[1::2]


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_column_that_is_asked_for_is_read(room, name, streaming):
    (room / "data").mkdir()
    texts = write_two(room / "data", name)
    train, held_out = load_text(TextDataArguments("data", eval_dataset="data", streaming=streaming))
    assert [row["text"] for row in train] == held_out["text"][:] == texts
    assert set(next(iter(train))) == {"text"}


def test_run_streams_files_with_other_columns(room):
    (room / "data").mkdir()
    write_two(room / "data", "lines.jsonl")
    call(causal_lm.main, TEXT_RUN, "--dataset=data", "--streaming", "--stream_lanes=2", "--max_steps=8")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"body": "b"}\n', ["'data/2.jsonl'", "Line 1", "no column 'text'", "body"]),
        (b'\xff{"text": "b"}\n', ["'data/2.jsonl'", "Line 1 is not UTF-8"]),
    ],
)
def test_file_that_cannot_be_used_is_refused_before_the_training(room, capsys, content, words, streaming):
    (room / "data").mkdir()
    for number in range(2):
        write_jsonl(room / "data" / f"{number}.jsonl", documents(40, seed=number))
    (room / "data" / "2.jsonl").write_bytes(content)
    options = ["--streaming", "--stream_lanes=1"] if streaming else []
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--dataset=data", "--output_dir=run", *options)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"text": "gr\xf6\xdfe"}\n', ["Line 41 is not UTF-8"]),
        (b'{"text": "half \\ud83d"}\n', ["Line 41 of", "'\\ud83d' at position 5"]),
    ],
)
def test_bad_bytes_end_a_stream_at_once(room, capsys, monkeypatch, bad, words, workers):
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: pytest.fail("It was tried again."))
    write_jsonl(room / "bad.jsonl", documents(40))
    (room / "bad.jsonl").write_bytes((room / "bad.jsonl").read_bytes() + bad)
    options = ["--stream_lanes=1", "--shuffle_buffer=10", "--tokenizer_documents=9", "--max_steps=99"]
    line = failure(
        capsys, causal_lm.main, TEXT_RUN, "--dataset=bad.jsonl", "--streaming", *options,
        "--per_device_train_batch_size=9", f"--dataloader_num_workers={workers}"
    )  # fmt: skip
    assert not [word for word in ("bad.jsonl'", *words) if word not in line], line
