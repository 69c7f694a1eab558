"""A task: a kind of models that runs train, and that are evaluated."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from training.data.splits import DataArguments
from training.results.page import Example
from training.run.fields import RunArguments


class Task(NamedTuple):
    """What a task needs to be trained and evaluated."""

    name: str  # as the Hub calls it
    model_class: type[PreTrainedModel]
    data_class: type[DataArguments]
    arguments_class: type[RunArguments]
    mapping: Any  # of transformers, from configurations to the classes of all models of this task
    train: Callable  # of a run
    evaluation: Callable[..., dict[str, Any]]  # of data, configuration and checkpoint: how a `Trainer` evaluates
    example: Callable[..., Example]  # of a text, or the file of an image, and the same three: what a page shows

    @property
    def fields(self) -> tuple[type, type, type]:
        """The classes that the sections `model`, `data` and `training` have their fields from."""
        return self.model_class, self.data_class, self.arguments_class
