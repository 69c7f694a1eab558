"""
The metrics of runs and evaluations: modules of `evaluate`, including those that a user names. This package defines those
that work without a network: `evaluate.load` downloads its own from the Hub.
"""

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path

import evaluate

from training.support.errors import UserError, innermost_message

from .accuracy import Accuracy
from .perplexity import Perplexity


__all__ = ["Accuracy", "Perplexity", "load_metrics", "plain"]

# Names that the Trainer uses in each evaluation.
TAKEN = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def load_metrics(
    names: Sequence[str], own: Iterable[str], num_classes: int
) -> tuple[list[evaluate.EvaluationModule], list[str]]:
    """
    Load the metrics that a user names, and compute each once to check that it works. Their `predictions` and `references`
    are classes, or tokens.

    Args:
        names: the names of modules on the Hub, or paths of local ones.
        own: the names of the metrics that a run has anyway.
        num_classes: the number of classes.

    Returns:
        The metrics, and the names of the values that they compute.

    Raises:
        [`UserError`]: a metric cannot be loaded or computed, or gives something else than numbers, or a name that exists.
    """
    modules, before = [], (*own, *TAKEN)
    given = dict.fromkeys(before, "the run itself")
    classes = list(range(min(max(2, num_classes), 3)))  # a metric that works for three classes works for more
    for name in names:
        named = f"`metrics` names {name!r}"
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise UserError(f"{named}, which does not exist: give a folder, its file, or a metric on the Hub.")
        try:
            module = evaluate.load(name, keep_in_memory=True)
            found = module.compute(predictions=classes, references=classes)
        except Exception as error:  # (a module is arbitrary code)
            reason = f"{type(error).__name__}: {innermost_message(error)}"
            raise UserError(f"{named}, which fails for {len(classes)} classes ({reason}): choose another.") from error
        if not isinstance(found, dict):
            raise UserError(f"{named}, which gives {found!r:.40}, not a dictionary of numbers: choose another.")
        for key, value in found.items():
            if not isinstance(value, numbers.Real):
                raise UserError(f"{named}, whose {key!r} is {value!r:.40}, not a number: choose another.")
            if key in given:
                raise UserError(f"{named}, which gives {key!r}, as does {given[key]}: leave it out.")
            given[key] = repr(name)
        modules.append(module)
    return modules, [name for name in given if name not in before]


def plain(figures: dict[str, numbers.Real]) -> dict[str, float]:
    """The values as Python floats, for JSON."""
    return {name: float(value) for name, value in figures.items()}
