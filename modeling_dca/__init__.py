"""DeepCrossAttention (DCA) models for transformers. Importing this package registers them with the Auto classes."""

import contextlib
import sys

import transformers
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_dca import DCABaseConfig, DCAConfig, DCAVisionConfig
from .grn import ALL_GRN_FUNCTIONS, GeneralizedResidual, generalized_residual, push
from .modeling_dca import (
    DCAForCausalLM,
    DCAForQuestionAnswering,
    DCAForSequenceClassification,
    DCAForTokenClassification,
    DCAModel,
    DCAPreTrainedModel,
)
from .modeling_dca_vision import DCAForImageClassification, DCAVisionBackbone, DCAVisionModel
from .peft_dca import name_in_peft


def register() -> None:
    """Registers the models with transformers, vLLM and PEFT. Importing this package calls it; it may be called again."""
    AutoConfig.register(DCAConfig.model_type, DCAConfig, exist_ok=True)
    AutoConfig.register(DCAVisionConfig.model_type, DCAVisionConfig, exist_ok=True)
    AutoModel.register(DCAConfig, DCAModel, exist_ok=True)
    AutoModel.register(DCAVisionConfig, DCAVisionModel, exist_ok=True)
    AutoModelForCausalLM.register(DCAConfig, DCAForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(DCAConfig, DCAForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(DCAConfig, DCAForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(DCAConfig, DCAForQuestionAnswering, exist_ok=True)
    AutoModelForImageClassification.register(DCAVisionConfig, DCAForImageClassification, exist_ok=True)
    AutoBackbone.register(DCAVisionConfig, DCAVisionBackbone, exist_ok=True)
    with contextlib.suppress(ImportError):  # without Pillow; with transformers 5.17 also without torchvision
        from .image_processing_dca import DCAImageProcessor

        backends = dict.fromkeys(("pil", "torchvision"), DCAImageProcessor)
        AutoImageProcessor.register(DCAVisionConfig, image_processor_classes=backends, exist_ok=True)
    for each in (
        DCAForCausalLM,
        DCAForImageClassification,
        DCAForQuestionAnswering,
        DCAForSequenceClassification,
        DCAForTokenClassification,
        DCAModel,
        DCAVisionBackbone,
        DCAVisionModel,
    ):
        # transformers' server, vLLM and TRL look a checkpoint's class up there, by its name. (What is imported as
        # `transformers` first is replaced while it is imported: programs hold the one or the other.)
        for module in (transformers, sys.modules["transformers"]):
            setattr(module, each.__name__, each)
    for each in (DCAConfig, DCAVisionConfig):
        name_in_peft(each.model_type)


register()


__all__ = [
    "ALL_GRN_FUNCTIONS",
    "DCABaseConfig",
    "DCAConfig",
    "DCAForCausalLM",
    "DCAForImageClassification",
    "DCAForQuestionAnswering",
    "DCAForSequenceClassification",
    "DCAForTokenClassification",
    "DCAModel",
    "DCAPreTrainedModel",
    "DCAVisionBackbone",
    "DCAVisionConfig",
    "DCAVisionModel",
    "GeneralizedResidual",
    "generalized_residual",
    "push",
    "register",
]
