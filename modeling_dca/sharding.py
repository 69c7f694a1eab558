"""Stacks that are sharded by batch or sequence (`DTensor`), and the plan for a model whose stack is."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .configuration_dca import DCAConfig


if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
else:
    DTensor = ()  # no tensor is one
    ParallelStyle = object


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a `DTensor`."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def on_shards(
    function: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]],
    stack: Sequence[Tensor],
    *parameters: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """
    The outputs and the stack of `function(stack, *parameters)`, which each process computes on its shards of the entries. A
    generalized residual treats tokens independently: shards of batch and sequence stay in place, and entries that are sharded
    otherwise are gathered first. Parameters are replicated; their gradients are summed over the processes.

    Raises:
        `TypeError`: some entries are `DTensor`s and others are not, so that their placement is unknown.
    """
    for i, entry in enumerate(stack):
        if not isinstance(entry, DTensor):
            raise TypeError(
                f"Entry {i} of `stack` is a {type(entry).__name__}, but others are DTensors: make it one, too "
                "(`DTensor.from_local`)."
            )
    first = stack[0]
    mesh, features = first.device_mesh, first.ndim - 1
    placements = [
        placement if placement.is_shard() and placement.dim % first.ndim != features else Replicate()
        for placement in first.placements
    ]
    of_parameters = [Partial() if placement.is_shard() else placement for placement in placements]
    replicated = [Replicate()] * len(placements)
    strides = torch.empty(first.shape, device="meta").stride()

    def part_of(parameter):
        if parameter is None:
            return None
        if not isinstance(parameter, DTensor):
            parameter = DTensor.from_local(parameter, mesh, replicated, run_check=False)
        return parameter.redistribute(placements=replicated).to_local(grad_placements=of_parameters)

    def whole(part):
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=first.shape, stride=strides)

    parts = [entry.redistribute(placements=placements).to_local() for entry in stack]
    outputs, later = function(parts, *map(part_of, parameters))
    return tuple(map(whole, outputs)), tuple(map(whole, later))


class Replicated(ParallelStyle):
    """Parameters that all processes have whole."""

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        return distribute_module(module, device_mesh)


class Gathered(ParallelStyle):
    """Inputs that all processes have whole, each gathered once."""

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        module.register_forward_pre_hook(self.gather)
        return module

    @staticmethod
    def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole = {id(each): each for each in inputs}
        whole = {key: each.redistribute(placements=[Replicate()]) for key, each in whole.items()}
        return tuple(whole[id(each)] for each in inputs)


def sequence_parallel_plan(config: DCAConfig) -> dict:
    """
    The plan of `torch.distributed.tensor.parallel` in which projections are sharded as with `tp_plan="auto"`, and the stack,
    residuals and norms by sequence, as in torchtitan's Llama; see [`shard_by_sequence`].

    Raises:
        `ValueError`: a field of `config` that the plan cannot do.
    """
    if config.qk_norm == "all_heads":
        raise ValueError(
            "`qk_norm` is 'all_heads', which needs all heads in each process: shard the model by `tp_plan`."
        )
    if config.position_embedding == "sincos":
        raise ValueError(
            "`position_embedding` is 'sincos', which this plan does not support: shard the model by `tp_plan`."
        )
    by_sequence = {"output_layouts": Shard(1), "use_local_output": False}
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **by_sequence),
        "model.layers.*.self_attn": Gathered(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(**by_sequence),
        "model.layers.*.mlp": Gathered(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(**by_sequence),
        "model.residual": Replicated(),
        "model.norm": Replicated(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if config.position_embedding == "learned":
        plan["model.embed_positions"] = RowwiseParallel(input_layouts=Replicate(), **by_sequence)
    if config.gated_mlp:
        plan["model.layers.*.mlp.gate_proj"] = ColwiseParallel()
    for name in ("q", "k", "v"):
        plan[f"model.layers.*.self_attn.{name}_proj"] = ColwiseParallel()
        if config.qk_norm and name != "v":
            # Each process has some of the heads.
            plan[f"model.layers.*.self_attn.{name}_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    names = ["residual", "input_layernorm", "post_attention_layernorm"]
    if config.residual_scheme == "dca":
        names += ["key_layernorm", "value_layernorm"]
    if config.norm_placement != "pre":
        names += ["attention_output_norm", "mlp_output_norm"]
    plan |= {f"model.layers.*.{name}": Replicated() for name in names}
    return plan


def shard_by_sequence(model: nn.Module, mesh) -> nn.Module:
    """
    Shards a `DCAForCausalLM` for training over the processes of a one-dimensional `DeviceMesh`, in place: the weights of
    projections and embeddings by feature, and the stack, residuals and norms by sequence, so that each process has
    `1 / size` of the work of the generalized residuals. All parameters become `DTensor`s; `input_ids`, labels and logits are
    whole in each process.

    Raises:
        `ValueError`: the model is another one, heads or features cannot be divided among the processes, or see
            [`sequence_parallel_plan`].
    """
    config, size = model.config, mesh.size()
    if getattr(model, "lm_head", None) is None:
        raise ValueError(f"{type(model).__name__} has no `lm_head`: only a `DCAForCausalLM` is sharded by sequence.")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(f"`{name}` is {getattr(config, name)}, which is not a multiple of the {size} processes.")
    parallelize_module(model, mesh, sequence_parallel_plan(config))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


__all__ = ["sequence_parallel_plan", "shard_by_sequence"]
