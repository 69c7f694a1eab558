"""Tasks for lm-evaluation-harness, made of held-out text: what comes next, as a word (cloze) and out of four (choice)."""

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


#: In words: what is given of a text, and what of its continuation is chosen.
CONTEXT, CONTINUATION = 32, 8
CHOICES = 4
#: A word with the space before it.
WORD = re.compile(r"\s*\S+")
#: The task files, without the data: accuracy, and for words their perplexity, as the harness has them for LAMBADA and HellaSwag.
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
    """Which tasks are written."""

    output_dir: str = dataclasses.field(
        default="data/harness", metadata={"help": "The folder for the tasks, which is made."}
    )
    items: int = dataclasses.field(default=300, metadata={"help": "The items of each task."})
    seed: int = dataclasses.field(default=0, metadata={"help": "What places in the text are drawn with."})
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace the tasks that `output_dir` holds."})

    def __post_init__(self):
        if self.items < 1:
            raise UserError(f"`items` is {self.items}; it must be at least 1.")


def passages(documents: list[str]) -> list[tuple[str, str]]:
    """All places of the text, which do not overlap: the words before, and those after."""
    found, length = [], CONTEXT + CONTINUATION
    for document in documents:
        words = WORD.findall(document)
        for start in range(0, len(words) - length + 1, length):
            middle, end = start + CONTEXT, start + length
            found.append(("".join(words[start:middle]), "".join(words[middle:end])))
    return found


def items_of(documents: list[str], count: int, seed: int) -> dict[str, list[dict]]:
    """
    The items of both tasks. A word to fill in stands in the context, too, so that it can be told from that; the other
    continuations of a choice are those of other places.

    Raises:
        [`UserError`]: the text has not so many places.
    """
    draw = random.Random(seed)
    found = passages(documents)
    draw.shuffle(found)
    continuations = sorted({after for _, after in found})
    tasks = {"held_out_cloze": [], "held_out_choice": []}
    for before, after in found:
        words = WORD.findall(after)
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
                f"`items` is {count}, but the held-out text has {len(items)} places for {name!r}: give no more than that, or "
                "more text as `eval_dataset`."
            )
    return {name: items[:count] for name, items in tasks.items()}


def write_tasks(data: TextDataArguments, arguments: HarnessArguments) -> Path:
    """
    Writes the tasks to a folder, which `lm-eval` takes as `--include_path`; returns it.

    Raises:
        [`UserError`]: the folder holds tasks, cannot be written, or the text is too short.
    """
    folder = Path(arguments.output_dir).resolve()
    there = sorted(name for task in TASKS for name in (f"{task}.yaml", f"{task}.jsonl") if (folder / name).exists())
    if there and not arguments.overwrite:
        raise UserError(
            f"`output_dir` is {arguments.output_dir!r}, which holds {there[0]}: name another, or pass --overwrite."
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
