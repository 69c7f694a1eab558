"""The metrics against what a hand computes; the figures of a whole run are in `test_run.py`."""

import math
import socket

import evaluate
import pytest

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
