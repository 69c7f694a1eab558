"""A task: a kind of model that runs train and that can be evaluated."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from training.data.splits import DataArguments
from training.results.page import Example
from training.run.fields import RunArguments


class Task(NamedTuple):
    """How the models of a task are trained and evaluated."""

    name: str  # on the Hub
    model_class: type[PreTrainedModel]
    data_class: type[DataArguments]
    arguments_class: type[RunArguments]
    mapping: Any  # of transformers, from configurations to the classes of all models of this task
    train: Callable  # takes a run
    # Takes data, configuration, checkpoint and metrics, and returns the arguments of a `Trainer` for the evaluation.
    evaluation: Callable[..., dict[str, Any]]
    # Takes a text, or the file of an image, data, configuration and checkpoint, and returns what a page shows.
    example: Callable[..., Example]

    @property
    def fields(self) -> tuple[type, type, type]:
        """The classes that define the fields of the sections `model`, `data` and `training`."""
        return self.model_class, self.data_class, self.arguments_class
