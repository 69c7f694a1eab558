"""DeepCrossAttention (DCA) models for transformers; importing this registers them with its Auto classes."""

from transformers import (
    AutoConfig,
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
from .modeling_dca_vision import DCAForImageClassification, DCAVisionModel


AutoConfig.register(DCAConfig.model_type, DCAConfig, exist_ok=True)
AutoConfig.register(DCAVisionConfig.model_type, DCAVisionConfig, exist_ok=True)
AutoModel.register(DCAConfig, DCAModel, exist_ok=True)
AutoModel.register(DCAVisionConfig, DCAVisionModel, exist_ok=True)
AutoModelForCausalLM.register(DCAConfig, DCAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(DCAConfig, DCAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DCAConfig, DCAForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(DCAConfig, DCAForQuestionAnswering, exist_ok=True)
AutoModelForImageClassification.register(DCAVisionConfig, DCAForImageClassification, exist_ok=True)


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
    "DCAVisionConfig",
    "DCAVisionModel",
    "GeneralizedResidual",
    "generalized_residual",
    "push",
]
