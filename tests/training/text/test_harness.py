"""Tasks for lm-evaluation-harness: of the held-out text, each place once, the same every time."""

import json

import pytest
import yaml

from tests.training.tiny import TEXT_RUN, call, documents, failure, refusal, write_jsonl
from training import causal_lm, harness_tasks
from training.text.harness import CHOICES, TASKS, items_of, passages


ARGUMENTS = ("--items=20", "--output_dir=tasks")


@pytest.fixture
def run(room):
    """A run whose held-out text is long enough."""
    write_jsonl(room / "held_out.jsonl", [" ".join(documents(40, seed=seed)) for seed in range(1, 4)])
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2")
    return room


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_tasks_are_of_the_text_that_a_run_held_out(run, capsys):
    call(harness_tasks.main, "run", *ARGUMENTS)
    held_out = [json.loads(line)["text"] for line in (run / "held_out.jsonl").read_text().splitlines()]
    cloze, choice = (read(run / "tasks", name) for name in TASKS)
    assert len(cloze) == len(choice) == 20
    for item in cloze:
        assert any(item["context"] + item["word"] in document for document in held_out)
        assert item["word"].strip() in item["context"].split()
    for item in choice:
        assert len(set(item["choices"])) == CHOICES
        assert any(item["context"] + item["choices"][item["label"]] in document for document in held_out)
    assert {item["label"] for item in choice} == set(range(CHOICES))
    for name in TASKS:
        task = yaml.safe_load((run / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name and task["target_delimiter"] == ""
        assert task["dataset_kwargs"]["data_files"]["test"] == str((run / "tasks" / f"{name}.jsonl").resolve())
    # They are not replaced unless one says so, and come out the same.
    assert "--overwrite" in failure(capsys, harness_tasks.main, "run", *ARGUMENTS)
    before = (run / "tasks" / "held_out_choice.jsonl").read_bytes()
    call(harness_tasks.main, "run", *ARGUMENTS, "--overwrite")
    assert (run / "tasks" / "held_out_choice.jsonl").read_bytes() == before
    call(harness_tasks.main, "run", *ARGUMENTS, "--overwrite", "--seed=1")
    assert (run / "tasks" / "held_out_choice.jsonl").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--items=100000"], "`items` is 100000, but the held-out text has"),
        (["--items=0"], "`items` is 0; it must be at least 1"),
        (["--items=20", "--output_dir=run.yaml/tasks"], "`output_dir` is 'run.yaml/tasks', which cannot be written"),
        (["--itms=3"], "--itms"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(run, capsys, arguments, words):
    (run / "run.yaml").write_text("")
    assert words in refusal(capsys, harness_tasks.main, "run", *arguments)


def test_places_do_not_overlap():
    document = " ".join(map(str, range(200)))
    found = passages([document, "too short"])
    assert len(found) == 5 and document.startswith("".join(before + after for before, after in found))
    with pytest.raises(Exception, match="has only 0 passages"):
        items_of(["too short"], 1, 0)


def test_a_word_to_fill_in_can_be_told_from_its_context():
    words = [f"word{index}" for index in range(400)]
    for start in range(0, 400, 40):
        words[start + 5] = words[start + 35] = "known"
    items = items_of([" ".join(words)], 10, 0)["held_out_cloze"]
    # The first word of the continuation is new, and so are the next two.
    assert {item["word"] for item in items} == {" known"}
    assert {item["context"] for item in items} == {
        ("" if start == 0 else " ") + " ".join(words[start : start + 35]) for start in range(0, 400, 40)
    }


def test_no_two_items_are_the_same_text_in_all():
    """The harness takes what it has computed for one such item for the other, though they are split at different places."""
    words = [f"word{index}" for index in range(400)]
    for start in range(0, 400, 40):
        words[start + 5] = words[start + (39 if start % 80 else 35)] = (
            "known"  # the last word of half of the continuations
        )
    items = items_of([" ".join(words)], 5, 0)
    texts = [item["context"] + item["word"] for item in items["held_out_cloze"]]
    texts += [item["context"] + choice for item in items["held_out_choice"] for choice in item["choices"]]
    assert len(set(texts)) == len(texts) == 5 + 5 * CHOICES
