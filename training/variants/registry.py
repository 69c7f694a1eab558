"""
The variants by name: what studies train to learn what a part of DCA is good for. They are not for models to be used.

A variant is a model, which is made of the one that a run would train, and callbacks of its trainer. Another residual scheme is
one more entry.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedModel, TrainerCallback

from training.variants.decay import DecayOfB
from training.variants.entries import choose_entries
from training.variants.gates import bias_inside_gate, dead_gate, random_gate, raw_gate


Model = type[PreTrainedModel]


class Variant(NamedTuple):
    """What of a run is another."""

    model: Callable[[Model], Model] = lambda model_class: model_class
    callbacks: tuple[TrainerCallback, ...] = ()


@functools.cache
def altered(name: str, alter: Callable[[PreTrainedModel], None], model_class: Model) -> Model:
    """A class of models that are altered when they are built, and whose code is not saved with them."""

    def __init__(self, config):
        model_class.__init__(self, config)
        alter(self)

    name += model_class.__name__.removeprefix("DCA")
    own = {"__init__": __init__, "__module__": __name__, "__qualname__": name, "_auto_class": None, "_auto_map": {}}
    return type(name, (model_class,), own)


#: By the names that runs give them.
VARIANTS = {
    "dead_gate": Variant(partial(altered, "DeadGate", dead_gate)),
    "raw_gate": Variant(partial(altered, "RawGate", raw_gate)),
    "bias_inside_gate": Variant(partial(altered, "BiasInsideGate", bias_inside_gate)),
    "random_gate": Variant(partial(altered, "RandomGate", random_gate)),
    "last_4": Variant(partial(altered, "LastFour", partial(choose_entries, 0, 4))),
    "input_and_last_3": Variant(partial(altered, "InputAndLastThree", partial(choose_entries, 1, 3))),
    "decay_b_to_0": Variant(callbacks=(DecayOfB(to_zero=True),)),
    "no_decay_of_b": Variant(callbacks=(DecayOfB(to_zero=False),)),
}
