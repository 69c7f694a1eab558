"""lm-evaluation-harness on tasks of held-out text: the scores that the model's own logits give, with the package and without."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.tools import ROOT, TEXT, WITHOUT_PACKAGE, python
from training.text.fields import TextDataArguments
from training.text.harness import HarnessArguments, write_tasks


pytest.importorskip("lm_eval")
ITEMS = 20


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "text.jsonl"
    file.write_text(json.dumps({"text": TEXT}) + "\n")
    data = TextDataArguments(dataset=str(file), eval_dataset=str(file))
    return write_tasks(data, HarnessArguments(output_dir=str(folder / "harness"), items=ITEMS))


@torch.no_grad()
def own_scores(checkpoint, tasks):
    """What the harness should find, by the model's logits alone."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )

    def log_likelihood(context, continuation):
        # As the harness: both are read together, and of what is too long the end is kept.
        start = len(tokenizer(context, verbose=False)["input_ids"])
        ids = torch.tensor(tokenizer(context + continuation, verbose=False)["input_ids"])
        asked = ids[start:]
        kept = ids[-model.config.max_position_embeddings - 1 : -1]
        logits = model(kept[None]).logits[0, -len(asked) :].log_softmax(-1)
        return logits.gather(1, asked[:, None]).sum().item(), bool((logits.argmax(-1) == asked).all())

    def read(name):
        return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]

    cloze = [log_likelihood(item["context"], item["word"]) for item in read("held_out_cloze")]
    right = 0
    for item in read("held_out_choice"):
        scores = [log_likelihood(item["context"], choice)[0] for choice in item["choices"]]
        right += scores.index(max(scores)) == item["label"]
    perplexity = torch.tensor([-score for score, _ in cloze]).mean().exp().item()
    return {
        "held_out_cloze": {"acc,none": sum(greedy for _, greedy in cloze) / ITEMS, "perplexity,none": perplexity},
        "held_out_choice": {"acc,none": right / ITEMS},
    }


def scores(way, checkpoint, tasks, folder):
    arguments = [
        *("run", "--model", "hf", "--device", "cpu", "--batch_size", "4", "--include_path", tasks),
        *("--tasks", "held_out_cloze,held_out_choice", "--output_path", folder / "results"),
    ]
    trust = ",trust_remote_code=True" if way == "without the package" else ""
    arguments += ["--model_args", f"pretrained={checkpoint},dtype=float32{trust}"]
    if way == "without the package":
        command = ("-c", WITHOUT_PACKAGE + "from lm_eval.__main__ import cli_evaluate; cli_evaluate()")
        python(*command, *arguments, folder=folder)
    else:
        python("-m", "modeling_dca", "lm-eval", *arguments, folder=folder, PYTHONPATH=str(ROOT))
    (file,) = (folder / "results").rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.parametrize(
    ("name", "way"), [("llama", "without the package"), ("dca", "without the package"), ("dca", "with the package")]
)
def test_the_harness_finds_what_the_logits_say(name, way, checkpoints, tasks, tmp_path):
    checkpoint = checkpoints[name]
    expected, found = own_scores(checkpoint, tasks), scores(way, checkpoint, tasks, tmp_path)
    for task, figures in expected.items():
        for name, value in figures.items():
            assert found[task][name] == pytest.approx(value, rel=1e-3), (task, name)
    assert found["held_out_choice"]["acc,none"] > 0.25  # more than chance
