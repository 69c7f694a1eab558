"""Perplexity and bits per byte of a language model, as an `evaluate` module."""

import math

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """
    `compute(predictions=..., references=..., tokens_per_byte=...)` gives `perplexity` and `bits_per_byte`.

    `predictions` are the negative log-likelihoods of blocks of text, in nats and summed over the tokens of each,
    `references` the numbers of those tokens, and `tokens_per_byte` the tokens per byte of the text in UTF-8. Bits per byte
    compare models with different tokenizers.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per token, and bits per byte of text.",
            citation="",
            inputs_description="predictions: summed negative log-likelihoods in nats; references: numbers of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, tokens_per_byte: float) -> dict[str, float]:
        nats_per_token = float(np.sum(predictions) / np.sum(references))
        return {
            # Above e^700 a float is infinite: a perplexity that means nothing any more.
            "perplexity": math.inf if nats_per_token > 700 else math.exp(nats_per_token),
            "bits_per_byte": nats_per_token / math.log(2) * tokens_per_byte,
        }
