"""What of a trained model a run goes on to train: all of it, what DCA added to it, or adapters (LoRA) beside its weights."""

import importlib.util

from transformers import PreTrainedModel

from training.run.fields import Run, RunArguments
from training.run.parallel import uses_fsdp
from training.support.errors import UserError


#: The fields that leave a part of the model as it was.
FIELDS = ("freeze_backbone", "lora_rank")
#: The linear maps of a block that adapters stand beside: all of them.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What is trained in any case: the head of a classifier, which may be of other classes than it was trained on.
HEAD = "classifier"


def check_tuning(run: Run) -> None:
    """
    Raises:
        [`UserError`]: a part of the model is to be trained alone, but there is no such part, what is left was never trained,
            or it is shared out in a way that is not tested here.
    """
    training, named = run.training, [name for name in FIELDS if getattr(run.training, name)]
    if not named:
        return
    if len(named) > 1:
        raise UserError(
            "`freeze_backbone` and `lora_rank` are both set, and each says what is trained: leave one out."
        )
    (name,) = named
    if run.initial_checkpoint is None:
        raise UserError(
            f"`{name}` is {getattr(training, name)!r}, but the rest of the model would stay random: name an "
            "`initial_checkpoint`, or leave it out."
        )
    if name == "freeze_backbone" and "standard" in (run.config.residual_scheme, training.baseline):
        field = "residual_scheme" if run.config.residual_scheme == "standard" else "baseline"
        raise UserError(
            f"`freeze_backbone` is set, but `{field}` is 'standard', which has nothing else to train: choose another one, or "
            "leave `freeze_backbone` out."
        )
    if uses_fsdp(training) or training.tp_size > 1:
        raise UserError(
            f"`{name}` is not for models that are shared out (FSDP, `tp_size`): start the run with "
            "configuration/accelerate/ddp.yaml."
        )
    if name == "lora_rank" and importlib.util.find_spec("peft") is None:
        raise UserError("`lora_rank` needs the package peft, which is not installed: `pip install peft`.")


def tune(model: PreTrainedModel, arguments: RunArguments):
    """
    Has only that of a model trained which the run asks for.

    Returns:
        The adapters, a [`~peft.LoraModel`], or `None`. Checkpoints hold them beside the weights;
        `adapters.merge_and_unload()` adds them to these, and the model is as it was built.
    """
    adapters = None
    if arguments.lora_rank is not None:
        from peft import LoraConfig, LoraModel  # (which nothing else here needs)

        # As many times as the rank is what they add divided by: a learning rate is for all ranks.
        config = LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_rank, target_modules=list(ADAPTED))
        adapters = LoraModel(model, config, "default")
    elif arguments.freeze_backbone:
        model.freeze_backbone()
    else:
        return None
    if (head := getattr(model, HEAD, None)) is not None:
        head.requires_grad_(True)
    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # without which the reentrant way would find nothing to train
    if arguments.should_log:
        sizes = dict.fromkeys((True, False), 0)
        for parameter in model.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        print(f"{sizes[True]:,} parameters are trained, beside {sizes[False]:,} that stay as they are.")
    return adapters
