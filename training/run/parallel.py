"""
How the processes of a run share the work.

With tensor or context parallelism, several processes compute the same examples together. Batches, examples and lanes are
counted by such groups, and only this module knows their size.
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
except ImportError:  # an older release, which cannot save such an optimizer
    DistributedConfig = load_optimizer_distributed = save_optimizer_distributed = None


Result = TypeVar("Result")

# How many seconds a file from another machine may take to become visible on a network file system.
VISIBLE_WITHIN = 30.0


# How many there are


def uses_fsdp(arguments: TrainingArguments) -> bool:
    """Whether the launcher or the run shards the model with Accelerate's FSDP."""
    return arguments.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def launcher_sizes() -> dict[str, int]:
    """The sizes of the launcher's `parallelism_config`, by their names without `_size`; empty if it has none."""
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return {}
    config = ParallelismConfig()
    return {name: getattr(config, f"{name}_size", 1) for name in ("dp_replicate", "dp_shard", "cp", "sp", "tp")}


def processes_per_batch(tp_size: int) -> int:
    """How many processes compute the same examples together."""
    sizes = launcher_sizes()
    # (In both engines these have neighbouring ranks.)
    return tp_size * sizes.get("cp", 1) * sizes.get("sp", 1) * sizes.get("tp", 1)


def check_launcher(world_size: int, device: torch.device, fsdp: bool) -> None:
    """
    Raises:
        `ValueError`: the launcher's `parallelism_config` has a setting that would be ignored or computed wrongly.
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
            f"{named(sizes['cp'], 'cp')}, but torch divides attention by sequence on GPUs only: leave it out on a CPU."
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
            f"{named(1, 'dp_shard')}, which shards nothing: launch with ddp.yaml, or set it to 2 or more."
        )


# Together


def in_group() -> bool:
    """Whether there are several processes that can communicate. (Those of a TPU can only through their devices.)"""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def from_first(look: Callable[[], Result]) -> Result:
    """
    The result of `look` in the first process, returned in all processes.

    Raises:
        [`UserError`]: the first process has raised it; all processes do.
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
    """The values of all processes, in order, returned in all processes."""
    if not in_group():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def unseen(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` that do not become visible to this process within `VISIBLE_WITHIN` seconds."""
    end = time.monotonic() + VISIBLE_WITHIN
    paths = list(paths)
    while True:
        # (Listing a folder asks the server; that a single file is missing may be cached.)
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
        `ValueError`: the processes cannot divide a model by `tp_size`, `fsdp_size` and `dp_replicate_size`.
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
        raise ValueError(f"{named}, which needs a later release of transformers (5.24 was tested): leave it out.")
    if uses_fsdp(arguments) or launcher_sizes():
        raise ValueError(
            f"{named}, but the launcher or `fsdp` shards the model, too: launch with ddp.yaml or torchrun, and set `fsdp_size` "
            "to also shard the weights."
        )
    if arguments.device.type == "xla":
        raise ValueError(f"{named}, which is not for TPUs: leave it out.")
    if arguments.device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError(f"{named}, but the model would be placed on the available GPUs: leave `use_cpu` out.")
    if arguments.variant is not None:
        raise ValueError(f"{named}, but `variant` is {arguments.variant!r}, which does not support it: leave one out.")
    asked = size * others["dp_replicate_size"] * (others["fsdp_size"] or 1)
    if arguments.world_size % asked or (others["fsdp_size"] and asked != arguments.world_size):
        raise ValueError(
            f"{named}, with {others['fsdp_size']} as `fsdp_size` and {others['dp_replicate_size']} as `dp_replicate_size`, "
            f"but there are {arguments.world_size} processes, which must be the product. Leave `fsdp_size` out to use all that "
            "remain."
        )


def check_divided(config: PreTrainedConfig, tp_size: int, block_size: int | None = None) -> None:
    """
    Args:
        block_size: the number of tokens of an example, `None` for images.

    Raises:
        [`UserError`]: the heads of a model cannot be divided among `tp_size` processes, or its sequences among those of the
            launcher.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % tp_size:
            raise UserError(
                f"`tp_size` is {tp_size}, which does not divide `{name}` = {getattr(config, name)}: choose a divisor."
            )
    size = launcher_sizes().get("cp", 1)
    if size > 1 and (block_size is None or block_size % (2 * size)):
        what = "images are not sequences" if block_size is None else f"`block_size` is {block_size}"
        raise UserError(
            f"The launcher's `parallelism_config` has {size} as `parallelism_config_cp_size`, but {what}: leave it out, or "
            f"train on text with a multiple of {2 * size} as `block_size`."
        )


def divide(model: PreTrainedModel, arguments: Any) -> PreTrainedModel:
    """The part of a model that this process has, by `tp_size`, `fsdp_size` and `dp_replicate_size`."""
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
