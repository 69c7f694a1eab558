"""The text of a run: read from every kind of source, split, packed into blocks, and refused where it does not fit."""

import gzip
import itertools
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import training.data.files
import training.data.splits
import training.text.blocks
from tests.training.tiny import TEXT_RUN, call, documents, refusal, write_jsonl
from training import causal_lm
from training.data.splits import is_on_the_hub
from training.support.errors import UserError
from training.text.blocks import TOKENIZER_BATCH, PackedBlocks
from training.text.documents import load_text
from training.text.fields import TextDataArguments
from training.text.tokenizer import END_OF_TEXT, PADDING, train_tokenizer


pytestmark = pytest.mark.usefixtures("offline")


# More than two of the batches in which documents are read.
TEXTS = documents(2 * TOKENIZER_BATCH + 100)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 300, 64)


def load(dataset, **options):
    return load_text(TextDataArguments(dataset=str(dataset), **options))


def blocks_of(data, tokenizer, column="text", block_size=16):
    return [block["input_ids"].tolist() for block in PackedBlocks(data, column, tokenizer, block_size, 300)]


def write_as(file, texts):
    """Write texts in the format that the name of the file says."""
    if file.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), file)
    elif file.name.endswith(".csv"):
        Dataset.from_dict({"text": texts}).to_csv(file)
    elif file.name.endswith(".gz"):
        file.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    else:
        write_jsonl(file, texts)


# Packing


@pytest.mark.parametrize("block_size", [2, 16, 4000])
def test_packing_loses_nothing_but_the_end(tokenizer, block_size):
    tokens = [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    blocks = blocks_of(Dataset.from_dict({"text": TEXTS}), tokenizer, block_size=block_size)
    assert {len(block) for block in blocks} == {block_size}
    assert list(itertools.chain.from_iterable(blocks)) == tokens[: len(tokens) // block_size * block_size]


def test_packing_marks_the_end_of_each_document_even_of_an_empty_one(tokenizer):
    data = Dataset.from_dict({"text": ["a", "", "b"]})
    end = tokenizer.eos_token_id
    assert blocks_of(data, tokenizer, block_size=5) == [
        [*tokenizer("a")["input_ids"], end, end, *tokenizer("b")["input_ids"], end]
    ]


def test_blocks_on_disk_and_of_a_stream_are_the_same(tmp_path, tokenizer):
    write_jsonl(tmp_path / "text.jsonl", TEXTS)
    write_jsonl(tmp_path / "held_out.jsonl", TEXTS[:3])
    options = {"eval_dataset": str(tmp_path / "held_out.jsonl")}
    whole, _ = load(tmp_path / "text.jsonl", **options)
    stream, _ = load(tmp_path / "text.jsonl", streaming=True, **options)
    assert isinstance(stream, datasets.IterableDataset) and not isinstance(whole, datasets.IterableDataset)
    on_disk = PackedBlocks(whole, "text", tokenizer, 16, 300).materialize()
    assert len(on_disk) > 100
    assert on_disk["input_ids"][:] == blocks_of(stream, tokenizer) == blocks_of(whole, tokenizer)


def test_token_ids_are_taken_as_they_are(tokenizer):
    data = Dataset.from_dict({"ids": [[5, 6, 7], [], [299, 0]]})
    end = tokenizer.eos_token_id
    assert blocks_of(data, tokenizer, "ids", block_size=4) == [[5, 6, 7, end], [end, 299, 0, end]]


def test_tokens_per_byte(tokenizer):
    texts = ["größe 🙂", "a b"]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    blocks = PackedBlocks(Dataset.from_dict({"text": texts}), "text", tokenizer, 2, 300)
    assert blocks.tokens_per_byte() == tokens / (len("größe 🙂".encode()) + 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_special_tokens_that_are_written_out_are_text(tmp_path, tokenizer, streaming):
    texts = [f"a{END_OF_TEXT}b", END_OF_TEXT, f"{PADDING} c {END_OF_TEXT}{END_OF_TEXT}"]
    write_jsonl(tmp_path / "text.jsonl", texts)
    train, held_out = load(tmp_path / "text.jsonl", eval_dataset=str(tmp_path / "text.jsonl"), streaming=streaming)
    for data in (train, held_out):
        blocks = PackedBlocks(data, "text", tokenizer, 2, 300)
        tokens = list(blocks.tokens_of_documents())
        assert [tokenizer.decode(ids[:-1]) for ids in tokens] == texts
        assert [ids.count(tokenizer.eos_token_id) for ids in tokens] == [1, 1, 1] and 1 not in itertools.chain(*tokens)
        flat = list(itertools.chain(*tokens))
        assert list(itertools.chain(*(block["input_ids"] for block in blocks))) == flat[: len(flat) // 2 * 2]


def test_bytes_are_those_of_the_text_whatever_the_tokenizer_loses():
    words = Tokenizer(models.WordLevel({"?": 0, "deep": 1, "</s>": 2}, unk_token="?"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?")
    texts = ["Deep   Größe unknown", "DEEP"]
    blocks = PackedBlocks(Dataset.from_dict({"text": texts}), "text", tokenizer, 2, 3)
    assert blocks.tokens_per_byte() == (4 + 2) / (len(texts[0].encode()) + 4)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([[1, 2], [3, 300]], ["Document 1", "300", "`vocab_size` = 300", "0 to 299"]),
        ([[1, 2], [-1]], ["Document 1", "-1", "0 to 299"]),
        ([["a", "b"]], ["Document 0", "'text'", "['a', 'b']", "token ids"]),
        (["text" * 99, None], ["Document 1", "'text'", "None"]),
        ([{"a": 1}], ["Document 0", "{'a': 1}", "token ids"]),
        (["short"], ["tokens", "`block_size` = 16", "more text"]),
    ],
)
@pytest.mark.parametrize("place", ["first", "late"])
def test_documents_that_cannot_be_packed(tokenizer, documents, words, place):
    if place == "late" and len(documents) == 2:
        # In a later batch, and so not met before the first blocks have been written.
        documents = [documents[0]] * TOKENIZER_BATCH + documents
        words = [word.replace("Document 1", f"Document {TOKENIZER_BATCH + 1}") for word in words]
    data = Dataset.from_list([{"text": document} for document in documents])
    with pytest.raises(UserError) as error:
        PackedBlocks(data, "text", tokenizer, 16, 300).materialize()
    assert not [word for word in words if word not in str(error.value)], str(error.value)


# Sources


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv", "a.v2.jsonl"])
def test_formats(tmp_path, name):
    texts = ["größe 🙂", 'two\nlines, "quoted"', " ", "NA", "x" * 5000] * 3
    write_as(tmp_path / name, texts)
    train, held_out = load(tmp_path / name, eval_dataset=str(tmp_path / name))
    assert train["text"][:] == held_out["text"][:] == texts


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("größe\n\nmore lines\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    train, _ = load(tmp_path / "a.txt", eval_dataset=str(tmp_path / "b.txt.gz"))
    assert train["text"][:] == ["größe\n\nmore lines\n"]


def test_folder_and_pattern(tmp_path, monkeypatch):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/c.txt"):
        (tmp_path / "corpus" / name).write_text(name)
    (tmp_path / "corpus" / "notes.doc").write_text("no text")
    folder, pattern = load(tmp_path / "corpus", eval_dataset=str(tmp_path / "corpus" / "deep" / "*.txt"))
    assert sorted(folder["text"]) == ["a.txt", "deep/b.txt", "deep/c.txt"]
    assert sorted(pattern["text"]) == ["deep/b.txt", "deep/c.txt"]
    deep, _ = load(tmp_path / "corpus" / "**" / "*.txt", eval_dataset=str(tmp_path / "corpus"))
    assert len(deep) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    home, _ = load("~/corpus", eval_dataset="~/corpus/a.txt")
    assert len(home) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_on_the_hub_is_asked_for_by_its_id(monkeypatch, streaming):
    asked = []
    options = {"dataset_config": "en", "text_column": "body", "train_split": "train[:9]", "eval_split": "validation"}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        data = Dataset.from_dict({"body": ["a", "b"]})
        return data.to_iterable_dataset() if kwargs["streaming"] else data

    monkeypatch.setattr(training.data.splits, "load_dataset", load_dataset)
    load("user/corpus", streaming=streaming, dataset_revision="refs/convert/parquet", **options)
    assert asked == [
        (("user/corpus", "en"), {"split": "train[:9]", "revision": "refs/convert/parquet", "streaming": streaming}),
        (("user/corpus", "en"), {"split": "validation", "revision": "refs/convert/parquet", "streaming": False}),
    ]
    assert is_on_the_hub("user/corpus")


def test_what_is_not_on_the_hub(room):
    for name in ("stdlib", "digits", "text.jsonl", "*.jsonl", ".", str(room)):
        assert not is_on_the_hub(name)


# Splits


def test_share_of_the_examples_is_held_out(tmp_path):
    texts = [f"document {number}" for number in range(400)]
    write_jsonl(tmp_path / "text.jsonl", texts)
    train, held_out = load(tmp_path / "text.jsonl", eval_fraction=0.1)
    assert len(held_out) == 40
    assert sorted([*train["text"], *held_out["text"]]) == sorted(texts)
    assert load(tmp_path / "text.jsonl", eval_fraction=0.1)[1]["text"][:] == held_out["text"][:]
    assert load(tmp_path / "text.jsonl", eval_fraction=0.1, split_seed=1)[1]["text"][:] != held_out["text"][:]
    assert load(tmp_path / "text.jsonl", eval_fraction=0.1, max_eval_documents=3)[1]["text"][:] == held_out["text"][:3]


@pytest.mark.parametrize("ids", [False, True])
def test_near_copies_are_not_held_out(tmp_path, ids):
    numbers = [list(range(start, start + 40)) for start in (0, 100, 200)]
    # Of 40 words, with 28 runs of 13: all are in the training text, or 8 from word 20 on, or none; and a text with none.
    held_out = [numbers[0], [*range(300, 320), *numbers[1][:20]], [*range(400, 440)], [1, 2, 3]]

    def as_documents(lists):
        return lists if ids else [" ".join(map(str, each)) for each in lists]

    write_jsonl(tmp_path / "train.jsonl", as_documents(numbers))
    write_jsonl(tmp_path / "held_out.jsonl", as_documents(held_out))

    def kept(share):
        options = {"eval_dataset": str(tmp_path / "held_out.jsonl"), "max_eval_overlap": share}
        return load(tmp_path / "train.jsonl", **options)[1]["text"][:]

    documents = as_documents(held_out)
    assert kept(None) == documents
    assert kept(0.99) == kept(8 / 28) == documents[1:]
    assert kept(0.28) == kept(0) == documents[2:]
    write_jsonl(tmp_path / "held_out.jsonl", as_documents(numbers))
    with pytest.raises(UserError, match="`max_eval_overlap` is 0.5, but all held-out documents have more"):
        kept(0.5)
    with pytest.raises(UserError, match="needs all training documents in advance: leave it out, or `streaming`"):
        load(tmp_path / "train.jsonl", max_eval_overlap=0.5, streaming=True)


def test_near_copies_are_left_out_where_only_held_out_text_is_asked_for(tmp_path):
    text = " ".join(map(str, range(40)))
    write_jsonl(tmp_path / "train.jsonl", [text])
    write_jsonl(tmp_path / "held_out.jsonl", [text, "another one"])
    options = {"dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "held_out.jsonl")}
    train, held_out = load_text(TextDataArguments(**options, max_eval_overlap=0.5), held_out_only=True)
    assert train is None and held_out["text"][:] == ["another one"]


WORDS = ("train", "freight_train", "test-3", "val 2", "dev", "2.eval", "__valid__", "training")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_files_whatever_words_are_in_their_names(tmp_path, suffix, streaming):
    texts = dict(zip(WORDS, TEXTS))
    root = tmp_path / "my test [1]" / "train*"
    for number, word in enumerate(WORDS):
        folder = root / ("some_train", "dev.2", "")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        if suffix == ".txt":
            (folder / f"{word}.txt").write_text(texts[word])
        else:
            write_as(folder / f"{word}{suffix}", [texts[word]])
    train, _ = load(root, eval_dataset=str(root), streaming=streaming)
    assert sorted(row["text"] for row in train) == sorted(texts.values())
    one = root / "some_train" / f"train{suffix}"
    assert load(one, eval_dataset=str(one))[1]["text"][:] == [texts["train"]]


def test_folders_that_are_called_as_splits_are_splits(tmp_path):
    for folder, text in (("train", "a"), ("train/deep", "b"), ("Val", "c"), ("test", "d")):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / folder / "test.txt").write_text(text)
    data = tmp_path / "data"
    for streaming in (False, True):
        train, held_out = load(data, eval_split="validation", streaming=streaming)
        assert [[row["text"] for row in part] for part in (train, held_out)] == [["b", "a"], ["c"]]
    assert load(data, train_split="train+test", eval_split="validation")[0]["text"][:] == ["b", "a", "d"]
    with pytest.raises(UserError, match='Unknown split "val". Should be one of .*validation'):
        load(data, eval_split="val")
    with pytest.raises(UserError, match="has the splits .*: give the folder of one of them"):
        load(data / "test" / "test.txt", eval_dataset=str(data))
    # With any other folder or file next to them, they are not.
    (data / "notes").mkdir()
    (data / "notes" / "e.txt").write_text("e")
    assert sorted(load(data, eval_dataset=str(data))[0]["text"]) == ["a", "b", "c", "d", "e"]


def test_hidden_files_are_left_out_and_links_to_folders_followed(tmp_path):
    (tmp_path / "data" / ".checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("data/a.TXT", "data/._a.txt", "data/.checkpoints/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path / "data", eval_dataset=str(tmp_path / "data"))[0]["text"][:] == [
        "data/a.TXT",
        "elsewhere/b.txt",
    ]
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.txt' cannot be read: No such file"):
        load(tmp_path / "data", eval_dataset=str(tmp_path / "data"))


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("split", ["test", "test[:3]", "train+test"])
def test_split_of_the_hub_is_loaded_alone(monkeypatch, split, offline):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    asked = []
    rows = {"text": TEXTS[:5], "other": [1] * 5}

    def load_dataset(*args, split, streaming, **kwargs):
        asked.append((split, streaming))
        return Dataset.from_dict(rows).to_iterable_dataset() if streaming else Dataset.from_dict(rows)

    monkeypatch.setattr(training.data.splits, "load_dataset", load_dataset)
    arguments = TextDataArguments("user/corpus", eval_split=split, max_eval_documents=4)
    train, held_out = load_text(arguments, held_out_only=True)
    # (A stream is of whole splits, and not from the cache.)
    assert train is None and asked == [(split, "[" not in split and not offline)]
    assert held_out["text"][:] == TEXTS[:4]


def test_files_that_are_trained_on_and_held_out_are_told_of(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    load(tmp_path / "[ab].txt", eval_dataset=str(tmp_path / "c.txt"))
    assert "warning" not in capsys.readouterr().err
    load(tmp_path, eval_dataset=str(tmp_path / "b.txt"))
    line = capsys.readouterr().err
    assert "warning: 1 files of `eval_dataset` are trained on, too" in line and "b.txt" in line


def test_what_is_held_out_is_named_once(tmp_path):
    with pytest.raises(UserError, match="`eval_split` is 'test' and `eval_dataset` is 'x.txt', but"):
        load(tmp_path, eval_split="test", eval_dataset="x.txt")


def test_split_has_a_seed_of_its_own(room, capsys):
    (room / TEXT_RUN).write_text((room / TEXT_RUN).read_text().replace("  eval_dataset: held_out.jsonl\n", ""))
    options = (TEXT_RUN, "--output_dir=run", "--eval_fraction=0.2")
    call(causal_lm.main, *options, "--max_steps=2")
    record = (room / "run" / "run.yaml").read_text()
    assert "  split_seed: 42\n" in record
    # It is another run with another one, but not with another seed.
    line = refusal(capsys, causal_lm.main, *options, "--resume_from_checkpoint", "--split_seed=1")
    assert "other `data` fields" in line
    call(causal_lm.main, *options, "--resume_from_checkpoint", "--max_steps=3", "--seed=7")
    # A run from before there was one had its own seed for it.
    old = record.replace("  split_seed: 42\n", "").replace("  seed: 1\n", "  seed: 5\n")
    (room / "run" / "run.yaml").write_text(old)
    assert "other `data` fields" in refusal(capsys, causal_lm.main, *options, "--resume_from_checkpoint")
    call(causal_lm.main, *options, "--resume_from_checkpoint", "--max_steps=4", "--split_seed=5")


def test_seed_of_the_split_is_recorded_where_it_decides(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=1")
    assert "split_seed" not in (room / "run" / "run.yaml").read_text()
    with pytest.raises(UserError, match="`split_seed` is -1; it must lie between 0 and 4294967295"):
        load("text.jsonl", split_seed=-1)


def test_splits_of_a_local_file(tmp_path):
    write_jsonl(tmp_path / "text.jsonl", TEXTS[:10])
    train, held_out = load(tmp_path / "text.jsonl", train_split="train[:7]", eval_split="train[7:]")
    assert train["text"][:] == TEXTS[:7] and held_out["text"][:] == TEXTS[7:10]
    with pytest.raises(UserError, match="split 'validation' of the data .* Unknown split"):
        load(tmp_path / "text.jsonl", eval_split="validation")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 300 files and some odd ones."""
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    for number in range(300):
        (root / "package" / f"module_{number}.py").write_text(f"NUMBER = {number}\n")
    (root / "package" / "copy.py").write_text("NUMBER = 7\n")
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# Größe\n".encode("latin-1"))
    (root / "wrong.py").write_bytes(b"# Gr\xf6\xdfe, but said to be UTF-8\n")
    (root / "nothing.py").write_text("")
    (root / "data.txt").write_text("no source")
    for folder in ("site-packages", "dist-packages"):
        (root / folder).mkdir()
        (root / folder / "other.py").write_text("OTHER = True\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_standard_library_is_split_by_file(library):
    train, held_out = load("stdlib")
    rows = [*train, *held_out]
    assert len({row["path"] for row in rows}) == len({row["text"] for row in rows}) == len(rows) == 301
    assert {row["path"]: row["text"] for row in rows}["latin.py"] == "# -*- coding: latin-1 -*-\n# Größe\n"
    assert sum(row["text"] == "NUMBER = 7\n" for row in rows) == 1
    assert not {"wrong.py", "nothing.py", "data.txt", "site-packages/other.py", "dist-packages/other.py"} & {
        row["path"] for row in rows
    }
    assert 5 <= len(held_out) <= 30  # about a twentieth


def test_standard_library_is_split_the_same_way_always(library):
    train, held_out = load("stdlib", split_seed=0)
    assert load("stdlib", split_seed=1)[1].to_list() == held_out.to_list()
    # Not by the place of a file among the others, which is another in each release of Python.
    for path in ("package/module_0.py", "latin.py", "package/module_31.py"):
        (library / path).unlink()
    (library / "aaa.py").write_text("NEW = True\n")
    train_after, held_out_after = load("stdlib", split_seed=2)
    assert not set(train["path"]) & set(held_out_after["path"])
    assert not set(held_out["path"]) & set(train_after["path"])
    # A larger share holds out the same files, and more.
    assert set(held_out_after["path"]) < set(load("stdlib", eval_fraction=0.5)[1]["path"])


def test_standard_library_of_this_python():
    train, held_out = load("stdlib")
    assert len(train) > 1000 and len(held_out) > 30
    assert not set(train["path"]) & set(held_out["path"]) and not set(train["text"]) & set(held_out["text"])
    assert "ast.py" in {*train["path"], *held_out["path"]}
    assert not [path for path in (*train["path"], *held_out["path"]) if "site-packages" in path]


# Refusals


def bytes_of(file, content):
    file.write_bytes(content)


WRONG_TEXTS = [
    (lambda file: None, "nowhere.txt", [], ["'nowhere.txt' does not exist"]),
    (lambda file: None, "nowhere/*.txt", [], ["'nowhere/*.txt' does not exist"]),
    (lambda file: None, "nowhere", [], ["'nowhere'", "Hub"]),
    (lambda file: None, "text.yaml", [], ["'text.yaml'", ".jsonl", ".parquet"]),
    (lambda file: bytes_of(file, b""), "empty.txt", [], ["'empty.txt' is empty"]),
    (lambda file: bytes_of(file, b"\n\n"), "lines.jsonl", [], ["'lines.jsonl'"]),
    (lambda file: bytes_of(file, b"this is no json\nat all\n"), "wrong.jsonl", [], ["'wrong.jsonl'", "json"]),
    (lambda file: bytes_of(file, b"[1, 2]\n[3]\n"), "list.jsonl", [], ["'list.jsonl'", "json"]),
    (lambda file: bytes_of(file, b"this is no parquet\n"), "wrong.parquet", [], ["'wrong.parquet'", "parquet"]),
    (lambda file: bytes_of(file, b"this is no gzip\n"), "wrong.jsonl.gz", [], ["'wrong.jsonl.gz'", "gzip"]),
    (lambda file: bytes_of(file, bytes(range(256))), "wrong.txt", [], ["'wrong.txt'", "utf-8"]),
    (lambda file: bytes_of(file, b"\xff\xfea\x00,\x00"), "wrong.csv", [], ["'wrong.csv'", "utf-8"]),
    (lambda file: pq.write_table(pa.table({"text": pa.array([], pa.string())}), file), "no.parquet", [], ["no.parquet"]),
    (lambda file: file.mkdir(), "folder", [], ["'folder'", ".txt", ".jsonl"]),
    (lambda file: write_jsonl(file, TEXTS[:9], "body"), "body.jsonl", [], ["'body.jsonl'", "'text'", "it has body"]),
    (lambda file: write_jsonl(file, TEXTS[:1]), "one.jsonl", [], ["1 examples of 'one.jsonl'", "`eval_dataset`"]),
    (lambda file: bytes_of(file, b"short"), "a.txt", ["--eval_dataset=a.txt"], ["`block_size` = 16", "more text"]),
    (lambda file: bytes_of(file, b"short"), "a.txt", ["--streaming"], ["`block_size` = 16", "more text"]),
    (lambda file: write_jsonl(file, [[1, 2]] * 90), "ids.jsonl", [], ["'text'", "[1, 2]", "`tokenizer`"]),
    (lambda file: write_jsonl(file, [*TEXTS[:90], None]), "null.jsonl", [], ["'text'", "None"]),
    (lambda file: write_jsonl(file, [1.5] * 90), "numbers.jsonl", [], ["'text'", "1.5"]),
    (lambda file: write_jsonl(file, [*TEXTS[:9], [1]]), "mixed.jsonl", ["--tokenizer_documents=1"], ["'text'", "token ids"]),
    (lambda file: write_jsonl(file, [""] * 90), "blank.jsonl", [], ["held-out documents", "empty"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "name", "options", "words"), WRONG_TEXTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_text_that_cannot_be_used_is_refused(room, capsys, write, name, options, words):
    write(room / name)
    if not [option for option in options if "eval_dataset" in option]:
        options = [*options, "--eval_dataset=held_out.jsonl" if "--streaming" in options else "--eval_fraction=0.25"]
    record = (room / TEXT_RUN).read_text().replace("  eval_dataset: held_out.jsonl\n", "")
    (room / TEXT_RUN).write_text(record)
    line = refusal(capsys, causal_lm.main, TEXT_RUN, f"--dataset={name}", *options)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--eval_dataset=nowhere.txt"], ["'nowhere.txt' does not exist"]),
        (["--eval_dataset=text.yaml"], ["'text.yaml'"]),
        (["--text_column=body"], ["'body'", "it has text"]),
        (["--train_split=training"], ["'training'", "Should be one of ['train']"]),
        (["--dataset=stdlib"], ["`eval_dataset` is 'held_out.jsonl'", "'stdlib'", "leave it out"]),
        (["--tokenizer=nowhere"], ["`tokenizer` is 'nowhere'"]),
        (["--tokenizer=text.jsonl"], ["`tokenizer` is 'text.jsonl'"]),
    ],
)
def test_data_that_does_not_fit_the_run_is_refused(room, capsys, options, words):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *options)
    assert not [word for word in words if word not in line], line


def test_stream_cannot_be_split(room, capsys):
    (room / TEXT_RUN).write_text((room / TEXT_RUN).read_text().replace("  eval_dataset: held_out.jsonl\n", ""))
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--streaming")
    assert "`streaming`" in line and "`eval_split`" in line and "`eval_dataset`" in line


# What is kept on disk


@pytest.fixture
def packed(tmp_path):
    """What a tokenizer makes of a text, packed for a test of its own, and whether it was packed anew."""
    write_jsonl(tmp_path / "text.jsonl", TEXTS[:40])
    data = load(tmp_path / "text.jsonl", eval_dataset=str(tmp_path / "text.jsonl"))[0]

    def pack(tokenizer, block_size=16, kind=PackedBlocks):
        blocks = kind(data, "text", tokenizer, block_size, 300)
        before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
        ids = blocks.materialize()["input_ids"][:]
        return ids, set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) != before

    return pack


def test_packed_text_is_taken_from_the_disk_where_nothing_changed(packed, tokenizer, tmp_path):
    ids, _ = packed(tokenizer)
    assert packed(tokenizer) == (ids, False)
    tokenizer("a call of it", truncation=True, max_length=2, split_special_tokens=False)
    assert packed(tokenizer) == (ids, False)
    # So it is in another process.
    script = (
        "import sys, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[1]\n"
        "from tests.training.data.test_data import *; t = train_tokenizer(iter(TEXTS), 300, 64)\n"
        "data = load(sys.argv[2], eval_dataset=sys.argv[2])[0]\n"
        "print(PackedBlocks(data, 'text', t, 16, 300).materialize().cache_files[0]['filename'])"
    )
    line = [sys.executable, "-c", script, str(datasets.config.HF_DATASETS_CACHE), str(tmp_path / "text.jsonl")]
    before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))
    completed = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert Path(completed.stdout.split()[-1]) in before


def test_packed_text_is_made_anew_when_the_code_changed(packed, tokenizer, monkeypatch):
    ids, _ = packed(tokenizer)
    encode = PackedBlocks.encode

    def reversed_encode(self, documents):
        for tokens in encode(self, documents):
            yield tokens[::-1]

    monkeypatch.setattr(PackedBlocks, "encode", reversed_encode)
    changed, anew = packed(tokenizer)
    assert anew and changed != ids
    monkeypatch.undo()
    monkeypatch.setattr(
        training.text.blocks, "plain_tokens", lambda tokenizer, texts: [[7] * len(text) for text in texts]
    )
    changed, anew = packed(tokenizer)
    assert anew and set(itertools.chain(*changed)) == {7, tokenizer.eos_token_id}
    monkeypatch.undo()
    assert packed(tokenizer) == (ids, False)


def test_packed_text_is_made_anew_when_the_tokenizer_or_an_option_changed(packed, tokenizer, tmp_path):
    ids, _ = packed(tokenizer)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    same = packed(AutoTokenizer.from_pretrained(folder))[0]
    assert same == ids
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert packed(AutoTokenizer.from_pretrained(folder))[1]
    assert packed(tokenizer, block_size=8)[1]


def test_documents_are_read_anew_when_the_code_changed(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "text.jsonl", TEXTS[:9])
    assert load(tmp_path / "text.jsonl", eval_dataset=str(tmp_path / "text.jsonl"))[0]["text"][:] == TEXTS[:9]
    monkeypatch.setattr(training.data.files, "_parsed", lambda text, position: {"text": "changed"})
    changed = load(tmp_path / "text.jsonl", eval_dataset=str(tmp_path / "text.jsonl"))[0]["text"][:]
    assert changed == ["changed"] * 9


def test_data_is_read_again_after_it_changed(room, tokenizer):
    write_jsonl(room / "text.jsonl", ["first"] * 20)
    first = PackedBlocks(load("text.jsonl")[0], "text", tokenizer, 4, 300).materialize()
    shutil.copy("held_out.jsonl", "text.jsonl")
    second = PackedBlocks(load("text.jsonl")[0], "text", tokenizer, 4, 300).materialize()
    assert first["input_ids"][:] != second["input_ids"][:]
