"""The metrics against what a hand computes; the figures of a whole run are in `test_run.py`."""

import json
import math
import socket
from pathlib import Path

import evaluate
import pytest

from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, failure, need_image_processors, refusal, write_images
from training import causal_lm, image_classification
from training import evaluate as evaluate_command
from training.results.metrics import Accuracy, Perplexity


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("The network was asked.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_perplexity():
    # Three tokens of probability 1/2, 1/4, 1/8 in a block, and one of 1/4 in another: 8 bits in 4 tokens.
    losses = [math.log(2) + math.log(4) + math.log(8), math.log(4)]
    metrics = Perplexity().compute(predictions=losses, references=[3, 1], tokens_per_byte=0.25)
    assert metrics == {"perplexity": pytest.approx(4), "bits_per_byte": pytest.approx(0.5)}


def test_perplexity_counts_tokens_and_not_blocks():
    metrics = Perplexity().compute(predictions=[0.0, 9.0], references=[8, 1], tokens_per_byte=1.0)
    assert metrics["perplexity"] == pytest.approx(math.e)
    assert metrics["bits_per_byte"] == pytest.approx(1 / math.log(2))


def test_perplexity_of_many_blocks():
    metrics = Perplexity().compute(predictions=[15 * 0.1] * 20_000, references=[15] * 20_000, tokens_per_byte=2.0)
    assert metrics["perplexity"] == pytest.approx(math.exp(0.1), rel=1e-9)


def test_perplexity_that_no_float_can_hold():
    assert Perplexity().compute(predictions=[1e6], references=[10], tokens_per_byte=1.0)["perplexity"] == math.inf
    assert math.isnan(Perplexity().compute(predictions=[math.nan], references=[1], tokens_per_byte=1.0)["perplexity"])


@pytest.mark.parametrize(("predictions", "accuracy"), [([1, 2, 3, 4], 1.0), ([1, 2, 0, 0], 0.5), ([0, 0, 0, 0], 0.0)])
def test_accuracy(predictions, accuracy):
    assert Accuracy().compute(predictions=predictions, references=[1, 2, 3, 4]) == {"accuracy": accuracy}


def test_metrics_are_modules_of_evaluate():
    for metric in (Accuracy(), Perplexity()):
        assert isinstance(metric, evaluate.Metric) and metric.description
    accuracy = Accuracy()
    accuracy.add_batch(predictions=[1, 2], references=[1, 0])
    accuracy.add(prediction=3, reference=3)
    assert accuracy.compute() == {"accuracy": pytest.approx(2 / 3)}


# Metrics that a user names

MODULE = """
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{name: datasets.Value("int64") for name in ("predictions", "references")}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {returned}
"""


def write_metric(returned: str, name: str = "mine") -> str:
    Path(name).mkdir()
    Path(name, f"{name}.py").write_text(MODULE.format(returned=returned))
    return f"--metrics=./{name}"


def results(folder: str) -> dict:
    return json.loads(Path(folder, "all_results.json").read_text())


@pytest.fixture
def in_room(room):
    """The room, with images, too."""
    write_images(room / "images")
    return room


RUNS = {"text": (causal_lm.main, TEXT_RUN), "images": (image_classification.main, IMAGE_RUN)}


@pytest.mark.parametrize("kind", RUNS)
def test_metric_that_is_named_is_measured_beside_the_others(in_room, capsys, kind):
    main, file = RUNS[kind]
    named = write_metric(
        '{"mean": sum(p == r for p, r in zip(predictions, references)) / len(predictions), "n": len(predictions)}'
    )
    call(main, file, "--output_dir=plain")
    call(
        main,
        file,
        "--output_dir=run",
        named,
        "--metric_for_best_model=mean",
        "--eval_strategy=steps",
        "--eval_steps=2",
        *(["--document_losses"] if kind == "text" else []),  # which go the same way
    )
    plain, found = results("plain"), results("run")
    own = [key for key in plain if key in ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy")]
    assert {key: found[key] for key in own} == {key: plain[key] for key in own}
    if kind == "images":
        assert found["eval_mean"] == found["eval_accuracy"] and found["eval_n"] == 4
    else:
        # The next tokens, of blocks of 16; the share of them that the model has right.
        assert found["eval_n"] % 15 == 0 and 0 < found["eval_mean"] < 1
    state = json.loads(Path("run", "trainer_state.json").read_text())
    assert state["best_metric"] == max(entry["eval_mean"] for entry in state["log_history"] if "eval_mean" in entry)

    if kind == "images":
        need_image_processors()
    # The run is evaluated with what it had, and any other model with what is named.
    call(evaluate_command.main, "run", "--output=figures.json")
    again = json.loads(Path("figures.json").read_text())
    assert {key: again[key] for key in (*own, "eval_mean", "eval_n")} == {
        key: found[key] for key in (*own, "eval_mean", "eval_n")
    }
    capsys.readouterr()
    call(evaluate_command.main, "plain", named, "--output=other.json")
    assert json.loads(Path("other.json").read_text())["eval_mean"] == found["eval_mean"]
    assert f"{found['eval_mean']:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ('{"curve": [0.5, 0.6]}', ["'curve'", "not a number"]),
        ("0.5", ["gives 0.5"]),
        ('{"perplexity": 1.0, "accuracy": 1.0}', ["as does the run itself", "leave it out"]),
        ('{"loss": 1.0}', ["'loss'", "as does the run itself"]),
        ("1 / 0", ["fails for", "ZeroDivisionError"]),
    ],
)
@pytest.mark.parametrize("kind", RUNS)
def test_metric_that_would_fail_when_all_is_trained_is_refused(in_room, capsys, kind, returned, words):
    line = refusal(capsys, *RUNS[kind], "--output_dir=run", write_metric(returned))
    assert not [word for word in ("`metrics` names './mine'", *words) if word not in line], line


def test_metric_that_is_not_there_is_refused(in_room, capsys):
    for name in ("./none", "./none.py", "/none"):
        assert f"`metrics` names '{name}', which does not exist" in refusal(capsys, *RUNS["text"], f"--metrics={name}")
    write_metric('{"a": 1}', "one"), write_metric('{"a": 2}', "two")
    assert "'a', as does './one'" in refusal(capsys, *RUNS["text"], "--metrics", "./one", "./two")
    call(*RUNS["text"], "--output_dir=run")
    assert "`metrics` names './none.py'" in failure(capsys, evaluate_command.main, "run", "--metrics=./none.py")


def test_best_model_is_found_by_what_is_measured(in_room, capsys):
    named = write_metric('{"a": 1}')
    line = refusal(capsys, *RUNS["text"], named, "--metric_for_best_model=b", "--eval_strategy=steps")
    assert "`metric_for_best_model` is 'b'" in line and "Known: loss, perplexity, bits_per_byte, a." in line
