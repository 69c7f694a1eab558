"""Which part of a trained model a run trains: all of it, what DCA added, or LoRA adapters."""

import importlib.util

from transformers import PreTrainedModel

from training.run.fields import Run, RunArguments
from training.run.parallel import uses_fsdp
from training.support.errors import UserError


#: The fields that freeze a part of the model.
FIELDS = ("freeze_backbone", "lora_rank")
#: The projections that get adapters: all of a block.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What is always trained: the head of a classifier, which may have new classes.
HEAD = "classifier"


def check_tuning(run: Run) -> None:
    """
    Raises:
        [`UserError`]: only a part of the model is to be trained, but there is no such part, the rest was never trained, or
            the model is sharded in a way that is not tested here.
    """
    training, named = run.training, [name for name in FIELDS if getattr(run.training, name)]
    if not named:
        return
    if len(named) > 1:
        raise UserError(
            "`freeze_backbone` and `lora_rank` are both set, but only one can choose what is trained: leave one out."
        )
    (name,) = named
    if run.initial_checkpoint is None:
        raise UserError(
            f"`{name}` is {getattr(training, name)!r}, but the rest of the model would stay random: set "
            "`initial_checkpoint`, or leave it out."
        )
    if name == "freeze_backbone" and "standard" in (run.config.residual_scheme, training.baseline):
        field = "residual_scheme" if run.config.residual_scheme == "standard" else "baseline"
        raise UserError(
            f"`freeze_backbone` is set, but `{field}` is 'standard', which adds nothing to train: choose another scheme, or "
            "leave `freeze_backbone` out."
        )
    if uses_fsdp(training) or training.tp_size > 1:
        raise UserError(
            f"`{name}` does not support sharded models (FSDP, `tp_size`): launch the run with "
            "configuration/accelerate/ddp.yaml."
        )
    if name == "lora_rank" and importlib.util.find_spec("peft") is None:
        raise UserError("`lora_rank` needs the package peft, which is not installed: `pip install peft`.")


def tune(model: PreTrainedModel, arguments: RunArguments):
    """
    Freezes all of a model that the run does not train.

    Returns:
        The adapters, a [`~peft.LoraModel`], or `None`. Checkpoints hold them beside the weights;
        `adapters.merge_and_unload()` merges them into the weights and restores the model's structure.
    """
    adapters = None
    if arguments.lora_rank is not None:
        from peft import LoraConfig, LoraModel  # (nothing else here needs it)

        # With alpha = rank, the scale is 1, and a learning rate suits all ranks.
        config = LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_rank, target_modules=list(ADAPTED))
        adapters = LoraModel(model, config, "default")
    elif arguments.freeze_backbone:
        model.freeze_backbone()
    else:
        return None
    if (head := getattr(model, HEAD, None)) is not None:
        head.requires_grad_(True)
    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # reentrant checkpointing needs it
    if arguments.should_log:
        sizes = dict.fromkeys((True, False), 0)
        for parameter in model.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        print(f"{sizes[True]:,} parameters are trained, and {sizes[False]:,} are frozen.")
    return adapters
