"""Runs that start from a trained checkpoint instead of random weights: a DCA model, or one that is converted to DCA."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from modeling_dca import DCABaseConfig
from modeling_dca.conversion_dca import HEADS, LABEL_HEADS, OVERRIDES, convert_config
from training.support.errors import UserError, told


# Fields that can be chosen for a residual model, but not for a trained DCA model.
SCHEME = ("residual_scheme", "last_k")


def is_trained_dca(config: DCABaseConfig) -> bool:
    return isinstance(config, DCABaseConfig) and config.residual_scheme != "standard"


def initial_config(model_class: type[PreTrainedModel], checkpoint: str, fields: dict[str, Any]) -> DCABaseConfig:
    """
    The configuration of a run that starts from a checkpoint.

    Args:
        checkpoint: path or Hub id of a DCA model, or of a residual model of a family that can become DCA.
        fields: the fields that the run sets itself.

    Raises:
        [`UserError`]: there is no such checkpoint, it cannot become DCA, or a field conflicts with it.
    """
    with told(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint)
        if not is_trained_dca(config):
            return convert_config(model_class, config, fields)
    if config.model_type != model_class.config_class.model_type:
        raise UserError(
            f"`initial_checkpoint` is {checkpoint!r}, a {config.model_type!r} model; this command trains "
            f"{model_class.config_class.model_type!r} models."
        )
    for name, value in fields.items():
        if (name not in OVERRIDES or name in SCHEME) and value != getattr(config, name):
            raise UserError(
                f"`{name}` is {value!r}, but `initial_checkpoint` ({checkpoint!r}) has {getattr(config, name)!r}: leave "
                f"`{name}` out."
            )
        setattr(config, name, value)
    return config


def check_scheme(config: DCABaseConfig, checkpoint: str | None) -> None:
    """
    Raises:
        [`UserError`]: the checkpoint is a DCA model of another scheme than `config`.
    """
    if checkpoint is None:
        return
    with told(checkpoint):
        trained = AutoConfig.from_pretrained(checkpoint)
    if is_trained_dca(trained) and any(getattr(trained, name) != getattr(config, name) for name in SCHEME):
        raise UserError(
            f"`initial_checkpoint` is {checkpoint!r}, which has the `residual_scheme` {trained.residual_scheme!r}: "
            f"{config.residual_scheme!r} cannot start from it; choose a residual model."
        )


def initial_model(
    model_class: type[PreTrainedModel], config: DCABaseConfig, checkpoint: str | None
) -> PreTrainedModel:
    """
    The model to train, in float32: with random weights, or with those of a checkpoint, see [`initial_config`]. A classifier
    gets a new head if the checkpoint has none, or one for another number of classes.

    Raises:
        [`UserError`]: the checkpoint cannot be read, or lacks weights.
    """
    if checkpoint is None:
        return model_class(config)
    options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    with told(checkpoint):
        if is_trained_dca(AutoConfig.from_pretrained(checkpoint)):
            model, report = model_class.from_pretrained(checkpoint, output_loading_info=True, **options)
            head = HEADS[model_class._auto_class] if model_class._auto_class in LABEL_HEADS else None
            if missing := sorted(name for name in report["missing_keys"] if name.split(".")[0] != head):
                raise UserError(
                    f"`initial_checkpoint` is {checkpoint!r}, which lacks {len(missing)} weights, for example {missing[0]}: "
                    "choose a complete checkpoint. (After a run with `lora_rank`, that is the run's folder.)"
                )
            return model
        fields = {name: getattr(config, name) for name in SCHEME}
        if model_class._auto_class in LABEL_HEADS:
            fields["num_labels"] = config.num_labels  # with it, a checkpoint without a head gets one
        weights = model_class.from_residual(checkpoint, dtype=torch.float32, **fields).state_dict()
        return model_class.from_pretrained(None, state_dict=weights, **options)


# The field of the section `model` that is not a field of the configuration.
INITIAL_CHECKPOINT = "initial_checkpoint"
