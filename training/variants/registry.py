"""
The variants by name. Studies train them to measure the effect of a part of DCA; they are not for use.

A variant modifies the model that a run would train, or has callbacks for its trainer. Some are other residual schemes, on the
backbone of the standard transformer: these have settings, the `variant_fields` of a run. To add a variant, add an entry here.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainerCallback

from training.variants.attention_residuals import AttentionResiduals, BlockAttentionResiduals
from training.variants.decay import DecayOfB
from training.variants.denseformer import DenseFormer
from training.variants.entries import choose_entries
from training.variants.gates import bias_inside_gate, dead_gate, no_gate, random_gate, raw_gate, three_norms
from training.variants.hyper_connections import DynamicHyperConnections, HyperConnections, ManifoldHyperConnections
from training.variants.laurel import LaurelLR, LaurelPA, LaurelRW
from training.variants.mudd import MUDD
from training.variants.resformer import ResFormer
from training.variants.scheme import Scheme, read_settings, set_scheme
from training.variants.two_scalar_skip import TwoScalarSkip


Model = type[PreTrainedModel]


class Variant(NamedTuple):
    """What differs from a run without a variant."""

    model: Callable[[Model], Model] = lambda model_class: model_class
    callbacks: tuple[TrainerCallback, ...] = ()
    scheme: type[Scheme] | None = None  # another residual scheme, on the standard transformer

    def settings(self, fields: dict[str, Any]) -> dict[str, Any]:
        """
        All settings of the variant: those that a run names, and defaults.

        Raises:
            `ValueError`: a setting is unknown, or has an invalid value.
        """
        if self.scheme is not None:
            return vars(read_settings(self.scheme, fields))
        if fields:
            raise ValueError(f"`variant_fields` is {fields!r}, but this variant has no fields: leave it out.")
        return {}


@functools.cache
def altered(name: str, alter: Callable[[PreTrainedModel], None], model_class: Model) -> Model:
    """A model class whose models are altered when they are built, and saved without their code."""

    def __init__(self, config):
        model_class.__init__(self, config)
        alter(self)

    name += model_class.__name__.removeprefix("DCA")
    own = {"__init__": __init__, "__module__": __name__, "__qualname__": name, "_auto_class": None, "_auto_map": {}}
    return type(name, (model_class,), own)


def scheme(scheme_class: type[Scheme]) -> Variant:
    """A variant that is another residual scheme."""
    return Variant(partial(altered, scheme_class.__name__, partial(set_scheme, scheme_class)), scheme=scheme_class)


#: The variants, by their names in a run.
VARIANTS = {
    "dead_gate": Variant(partial(altered, "DeadGate", dead_gate)),
    "raw_gate": Variant(partial(altered, "RawGate", raw_gate)),
    "bias_inside_gate": Variant(partial(altered, "BiasInsideGate", bias_inside_gate)),
    "random_gate": Variant(partial(altered, "RandomGate", random_gate)),
    "no_gate": Variant(partial(altered, "NoGate", no_gate)),
    "three_norms": Variant(partial(altered, "ThreeNorms", three_norms)),
    "last_4": Variant(partial(altered, "LastFour", partial(choose_entries, 0, 4))),
    "input_and_last_3": Variant(partial(altered, "InputAndLastThree", partial(choose_entries, 1, 3))),
    "decay_b_to_0": Variant(callbacks=(DecayOfB(to_zero=True),)),
    "no_decay_of_b": Variant(callbacks=(DecayOfB(to_zero=False),)),
    "denseformer": scheme(DenseFormer),
    "laurel_rw": scheme(LaurelRW),
    "laurel_lr": scheme(LaurelLR),
    "laurel_pa": scheme(LaurelPA),
    "hyper_connections": scheme(HyperConnections),
    "dynamic_hyper_connections": scheme(DynamicHyperConnections),
    "mhc": scheme(ManifoldHyperConnections),
    "attention_residuals": scheme(AttentionResiduals),
    "block_attention_residuals": scheme(BlockAttentionResiduals),
    "mudd": scheme(MUDD),
    "resformer": scheme(ResFormer),
    "two_scalar_skip": scheme(TwoScalarSkip),
}
