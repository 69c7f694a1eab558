"""
The metrics of runs and evaluations: modules of `evaluate`, those that a user names among them. Here are those that it lacks
where there is no network: `evaluate.load` fetches its own from the Hub.
"""

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path

import evaluate

from training.support.errors import UserError, innermost_message

from .accuracy import Accuracy
from .perplexity import Perplexity


__all__ = ["Accuracy", "Perplexity", "load_metrics", "plain"]

# What the Trainer calls so, in each evaluation.
TAKEN = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def load_metrics(
    names: Sequence[str], own: Iterable[str], num_classes: int
) -> tuple[list[evaluate.EvaluationModule], list[str]]:
    """
    Load the metrics that a user names, and compute each once to see that it works. Their `predictions` and `references`
    are classes, or tokens.

    Args:
        names: those of modules on the Hub, or paths of local ones.
        own: what there is to be measured besides.
        num_classes: how many classes there are.

    Returns:
        The metrics, and the names of the figures that they compute.

    Raises:
        [`UserError`]: one of them cannot be loaded or computed, or what it gives is no number, or is there already.
    """
    modules, before = [], (*own, *TAKEN)
    given = dict.fromkeys(before, "the run itself")
    classes = list(range(min(max(2, num_classes), 3)))  # what can tell three apart can tell more
    for name in names:
        named = f"`metrics` names {name!r}"
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise UserError(f"{named}, which does not exist: name a folder, its file, or a metric on the Hub.")
        try:
            module = evaluate.load(name, keep_in_memory=True)
            found = module.compute(predictions=classes, references=classes)
        except Exception as error:  # (a module is code of its own, and raises what it likes)
            reason = f"{type(error).__name__}: {innermost_message(error)}"
            raise UserError(f"{named}, which cannot be had for {len(classes)} classes ({reason}).") from error
        if not isinstance(found, dict):
            raise UserError(f"{named}, which gives {found!r:.40}, no figures by their names.")
        for key, value in found.items():
            if not isinstance(value, numbers.Real):
                raise UserError(f"{named}, whose {key!r} is {value!r:.40}, no number: name another.")
            if key in given:
                raise UserError(f"{named}, which gives {key!r}, as does {given[key]}: leave it out.")
            given[key] = repr(name)
        modules.append(module)
    return modules, [name for name in given if name not in before]


def plain(figures: dict[str, numbers.Real]) -> dict[str, float]:
    """Figures as numbers of Python, which JSON knows."""
    return {name: float(value) for name, value in figures.items()}
