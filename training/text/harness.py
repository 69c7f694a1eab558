"""Tasks for lm-evaluation-harness from held-out text: predict the next word (cloze), or choose one of four continuations."""

import dataclasses
import json
import random
import re
from pathlib import Path

import yaml

from training.support.errors import UserError
from training.support.files import write_whole
from training.text.documents import load_text, texts
from training.text.fields import TextDataArguments


#: The lengths of a context and of its continuation, in words.
CONTEXT, CONTINUATION = 32, 8
CHOICES = 4
#: A word with the space before it.
WORD = re.compile(r"\s*\S+")
#: The task files, without the data. The metrics are those of LAMBADA and HellaSwag in the harness.
TASKS = {
    "held_out_cloze": {
        "output_type": "loglikelihood",
        "doc_to_target": "word",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "held_out_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


@dataclasses.dataclass
class HarnessArguments:
    """The tasks to write."""

    output_dir: str = dataclasses.field(default="data/harness", metadata={"help": "The folder for the tasks."})
    items: int = dataclasses.field(default=300, metadata={"help": "The number of items per task."})
    seed: int = dataclasses.field(default=0, metadata={"help": "The seed that draws passages of the text."})
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace earlier tasks in `output_dir`."})

    def __post_init__(self):
        if self.items < 1:
            raise UserError(f"`items` is {self.items}; it must be at least 1.")


def passages(documents: list[str]) -> list[tuple[str, str]]:
    """All passages of the text, without overlap: the context and the continuation of each."""
    found, length = [], CONTEXT + CONTINUATION
    for document in documents:
        words = WORD.findall(document)
        for start in range(0, len(words) - length + 1, length):
            middle, end = start + CONTEXT, start + length
            found.append(("".join(words[start:middle]), "".join(words[middle:end])))
    return found


def items_of(documents: list[str], count: int, seed: int) -> dict[str, list[dict]]:
    """
    The items of both tasks. The word to predict also occurs in the context, from which it can be inferred; the other
    continuations of a choice come from other passages.

    Raises:
        [`UserError`]: the text has too few passages.
    """
    draw = random.Random(seed)
    found = passages(documents)
    draw.shuffle(found)
    continuations = sorted({after for _, after in found})
    tasks = {"held_out_cloze": [], "held_out_choice": []}
    for before, after in found:
        # Not the last word: of a cloze and a choice with the same text in all, the harness scores one with the split of the other.
        words = WORD.findall(after)[:-1]
        for index, word in enumerate(words):
            context = before + "".join(words[:index])
            if len(word.strip()) > 2 and word.strip() in context.split():
                tasks["held_out_cloze"].append({"context": context, "word": word})
                break
        if len(continuations) >= CHOICES:
            others = [other for other in draw.sample(continuations, CHOICES) if other != after]
            choices = [after, *others[: CHOICES - 1]]
            draw.shuffle(choices)
            tasks["held_out_choice"].append({"context": before, "choices": choices, "label": choices.index(after)})
    for name, items in tasks.items():
        if len(items) < count:
            raise UserError(
                f"`items` is {count}, but the held-out text has only {len(items)} passages for {name!r}: lower it, or give more "
                "text as `eval_dataset`."
            )
    return {name: items[:count] for name, items in tasks.items()}


def write_tasks(data: TextDataArguments, arguments: HarnessArguments) -> Path:
    """
    Writes the tasks to a folder, which is the `--include_path` of `lm-eval`, and returns it.

    Raises:
        [`UserError`]: the folder holds tasks or cannot be written, or the text is too short.
    """
    folder = Path(arguments.output_dir).resolve()
    there = sorted(name for task in TASKS for name in (f"{task}.yaml", f"{task}.jsonl") if (folder / name).exists())
    if there and not arguments.overwrite:
        raise UserError(
            f"`output_dir` is {arguments.output_dir!r}, which holds {there[0]}: choose another, or pass --overwrite."
        )
    _, documents = load_text(data, held_out_only=True)
    items = items_of(list(texts(documents, data.text_column)), arguments.items, arguments.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, task in TASKS.items():
            file = folder / f"{name}.jsonl"
            write_whole(file, "".join(json.dumps(item) + "\n" for item in items[name]))
            fields = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file)}},
                "test_split": "test",
                "doc_to_text": "context",
                "target_delimiter": "",
                **task,
            }
            write_whole(folder / f"{name}.yaml", yaml.safe_dump(fields, sort_keys=False))
    except OSError as error:
        raise UserError(
            f"`output_dir` is {arguments.output_dir!r}, which cannot be written: {error.strerror}."
        ) from error
    return folder
