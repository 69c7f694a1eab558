"""Entries for PEFT's tables of default modules by model type."""

import sys

import torch
from torch import nn


#: The norms that a block has in addition to Llama's.
MORE_NORMS = ["key_layernorm", "value_layernorm", "attention_output_norm", "mlp_output_norm"]


def name_in_peft(model_type: str) -> None:
    """Gives models of this type PEFT's defaults for Llama, if PEFT is imported. (It is not imported here, as that is slow.)"""
    if (constants := sys.modules.get("peft.utils.constants")) is not None:
        for name, table in vars(constants).items():
            if name.endswith("_MODULES_MAPPING") and model_type not in table and "llama" in table:
                more = MORE_NORMS if "LNTUNING" in name else []
                table[model_type] = [*table["llama"], *more]
    if (prompts := sys.modules.get("peft.tuners.adaption_prompt.config")) is not None:
        table = prompts.TRANSFORMERS_MODEL_CONFIG
        table.setdefault(model_type, table["llama"]._replace(compute_query_states=query_states))


def query_states(
    model: nn.Module,
    query_input: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs,
) -> torch.Tensor:
    """The queries `(batch, heads, sequence, head_dim)` of the attention `model`, for PEFT's adaption prompts."""
    from .modeling_dca import rotate  # (which imports the configurations, and these import this module)

    hidden_shape = (*query_input.shape[:-1], -1, model.head_dim)
    states = model.q_proj(query_input)
    if model.norms_all_heads:
        states = model.q_norm(states).view(hidden_shape).transpose(1, 2)
    else:
        states = model.q_norm(states.view(hidden_shape)).transpose(1, 2)
    if position_embeddings is None or not model.use_rope:
        return states
    rotated, _ = rotate(states, states, *position_embeddings)
    return rotated


__all__ = ["name_in_peft"]
