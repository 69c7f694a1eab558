"""Metrics as `evaluate` modules that need no network: those that `evaluate.load` fetches come from the Hub."""

from .accuracy import Accuracy
from .perplexity import Perplexity


__all__ = ["Accuracy", "Perplexity"]
