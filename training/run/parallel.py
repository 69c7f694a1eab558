"""
How the processes of a run share the work.

Some have examples of their own; others compute the same examples together, as tensor and context parallelism have it. What counts
batches, examples or lanes counts the first, which is found out here alone.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from torch import distributed
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from training.support.errors import UserError, innermost_message


try:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
except ImportError:  # of an older release, which cannot write such an optimizer
    DistributedConfig = load_optimizer_distributed = save_optimizer_distributed = None


Result = TypeVar("Result")

# How many seconds a file that another machine wrote may take to be seen: those of a network's file system are known late.
VISIBLE_WITHIN = 30.0


# How many there are


def uses_fsdp(arguments: TrainingArguments) -> bool:
    """Whether the processes share out one model with Accelerate's FSDP, as the launcher or the run says."""
    return arguments.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def launcher_sizes() -> dict[str, int]:
    """The sizes of the launcher's `parallelism_config`, by their names without `_size`; none if it has no such thing."""
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return {}
    config = ParallelismConfig()
    return {name: getattr(config, f"{name}_size", 1) for name in ("dp_replicate", "dp_shard", "cp", "sp", "tp")}


def processes_per_batch(tp_size: int) -> int:
    """How many processes compute the same examples together."""
    sizes = launcher_sizes()
    # (The ranks of both engines are numbered so that these are neighbours.)
    return tp_size * sizes.get("cp", 1) * sizes.get("sp", 1) * sizes.get("tp", 1)


def check_launcher(world_size: int, device: torch.device, fsdp: bool) -> None:
    """
    Raises:
        `ValueError`: the launcher's `parallelism_config` asks for what would not be done, or not be done right.
    """
    sizes = launcher_sizes()
    if not sizes:
        return
    if not hasattr(ParallelismConfig, "sp_size"):
        raise ValueError(
            "The launcher has a `parallelism_config`, which needs accelerate 1.12 or later: leave it out."
        )
    named = "The launcher's `parallelism_config` has {!r} as `parallelism_config_{}_size`".format
    total = 1
    for size in sizes.values():
        total *= size
    if sizes["tp"] > 1:
        raise ValueError(
            f"{named(sizes['tp'], 'tp')}, which does not divide the model: leave it out, launch with ddp.yaml, and set the "
            "run's `tp_size`."
        )
    if sizes["sp"] > 1:
        raise ValueError(f"{named(sizes['sp'], 'sp')}, which is for DeepSpeed alone: leave it out.")
    if sizes["cp"] > 1 and device.type == "cpu":
        raise ValueError(
            f"{named(sizes['cp'], 'cp')}, but torch divides the attention of GPUs alone by sequence: leave it out on a CPU."
        )
    if not fsdp:
        raise ValueError(
            "The launcher has a `parallelism_config`, which is for FSDP2: launch with hsdp.yaml, or leave it out."
        )
    if total != world_size:
        raise ValueError(
            f"The launcher's `parallelism_config` is for {total} processes, "
            + " x ".join(f"{size} ({name})" for name, size in sizes.items() if size > 1)
            + f", but there are {world_size}: set `--parallelism_config_dp_replicate_size` and "
            "`--parallelism_config_dp_shard_size` so that their product is `--num_processes`."
        )
    if sizes["dp_shard"] * sizes["cp"] == 1:
        raise ValueError(
            f"{named(1, 'dp_shard')}, which shares nothing out: launch with ddp.yaml, or give it 2 or more."
        )


# Together


def in_group() -> bool:
    """Whether there are several processes that can talk to each other. (Those of a TPU can through their devices alone.)"""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_first(look: Callable[[], Result]) -> Result:
    """
    What the first process finds, in all of them.

    Raises:
        [`UserError`]: it is what the first has found; all raise it.
    """
    if not in_group():
        return look()
    found = [None]
    if distributed.get_rank() == 0:
        try:
            found = [look()]
        except UserError as error:
            found = [error]
    distributed.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def from_all(value: Result) -> list[Result]:
    """The values of all processes, in their order, in all of them."""
    if not in_group():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def unseen(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` that this process does not come to see, though it waits for them."""
    end = time.monotonic() + VISIBLE_WITHIN
    paths = list(paths)
    while True:
        # (A folder that is listed is asked for anew; that a file is missing may be remembered.)
        for folder in {path.parent for path in paths}:
            names = set(os.listdir(folder)) if folder.is_dir() else set()
            paths = [path for path in paths if path.parent != folder or path.name not in names]
        if not paths or time.monotonic() > end:
            return sorted(paths)
        time.sleep(0.1)


# Tensor parallelism


def check_tensor_parallelism(arguments: Any) -> None:
    """
    Raises:
        `ValueError`: a model cannot be divided among the processes as `tp_size`, `fsdp_size` and `dp_replicate_size` say.
    """
    size, named = arguments.tp_size, f"`tp_size` is {arguments.tp_size}"
    others = {name: getattr(arguments, name) for name in ("fsdp_size", "dp_replicate_size")}
    if size == 1:
        for name, value in others.items():
            if value not in (None, 1):
                raise ValueError(
                    f"`{name}` is {value}, but `tp_size` is 1: set that, too, or launch with fsdp2.yaml or hsdp.yaml."
                )
        return
    if DistributedConfig is None:
        raise ValueError(f"{named}, which needs a later release of transformers (5.24 was tried): leave it out.")
    if uses_fsdp(arguments) or launcher_sizes():
        raise ValueError(
            f"{named}, but the launcher or `fsdp` shares out the model, too: launch with ddp.yaml or torchrun, and set "
            "`fsdp_size` if the weights are to be shared out besides."
        )
    if arguments.device.type == "xla":
        raise ValueError(f"{named}, which is not for TPUs: leave it out.")
    if arguments.device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError(f"{named}, but the model would be on the GPUs that there are: leave `use_cpu` out.")
    if arguments.variant is not None:
        raise ValueError(f"{named}, but `variant` is {arguments.variant!r}, which is trained without: leave one out.")
    asked = size * others["dp_replicate_size"] * (others["fsdp_size"] or 1)
    if arguments.world_size % asked or (others["fsdp_size"] and asked != arguments.world_size):
        raise ValueError(
            f"{named}, with {others['fsdp_size']} as `fsdp_size` and {others['dp_replicate_size']} as `dp_replicate_size`, "
            f"but there are {arguments.world_size} processes: that must be their product. Left out, `fsdp_size` is what "
            "remains."
        )


def check_divided(config: PreTrainedConfig, tp_size: int, block_size: int | None = None) -> None:
    """
    Args:
        block_size: the tokens of an example, if it has any.

    Raises:
        [`UserError`]: the heads of a model cannot be divided among `tp_size` processes, or its sequences among those of the
            launcher.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % tp_size:
            raise UserError(
                f"`tp_size` is {tp_size}, which does not divide `{name}` = {getattr(config, name)}: give one that does."
            )
    size = launcher_sizes().get("cp", 1)
    if size > 1 and (block_size is None or block_size % (2 * size)):
        what = "images are no sequences" if block_size is None else f"`block_size` is {block_size}"
        raise UserError(
            f"The launcher's `parallelism_config` has {size} as `parallelism_config_cp_size`, but {what}: leave it out, or "
            f"train on text with a multiple of {2 * size} as `block_size`."
        )


def divide(model: PreTrainedModel, arguments: Any) -> PreTrainedModel:
    """A model as one of which each process has its part, as `tp_size`, `fsdp_size` and `dp_replicate_size` say."""
    if arguments.tp_size == 1:
        return model
    sizes = DistributedConfig(
        tp_size=arguments.tp_size,
        dp_replicate_size=arguments.dp_replicate_size,
        fsdp_size=arguments.world_size // arguments.tp_size // arguments.dp_replicate_size,
    )
    options = {"config": model.config, "state_dict": model.state_dict(), "dtype": model.dtype}
    try:
        return type(model).from_pretrained(None, distributed_config=sizes, **options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"The model cannot be divided by `tp_size`: {innermost_message(error)}") from error
