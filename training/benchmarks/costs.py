"""
What a run of a language model costs, counted from its configuration. The formulas, with their derivation, are in
[costs.md](costs.md).
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from modeling_dca import DCAConfig, DCAForCausalLM, GeneralizedResidual
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES
from modeling_dca.norm import NORMS
from modeling_dca.pipeline import share_of_blocks


#: Bytes of a parameter: its master copy and its gradient in float32, and the two moments of AdamW.
WEIGHT, GRADIENT, OPTIMIZER = 4, 4, 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    The parallelism of a run.

    Args:
        batch: sequences per micro-batch on each device.
        seq: tokens per sequence.
        sharding: devices that shard weights, gradients and optimizer (FSDP2).
        replicas: replicas of these groups (HSDP), or of the model (DDP).
        tensor: devices that share each projection.
        by_sequence: whether the stack, residuals and norms are also sharded by sequence over these devices.
        pipeline: pipeline stages.
        micro_batches: micro-batches per step of a pipeline (1F1B).
        checkpointing: whether blocks are computed again in the backward pass.
        element: bytes per element of an activation; 2 in bfloat16.
    """

    batch: int
    seq: int
    sharding: int = 1
    replicas: int = 1
    tensor: int = 1
    by_sequence: bool = False
    pipeline: int = 1
    micro_batches: int = 1
    checkpointing: bool = False
    element: int = 2

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.batch * self.seq


def num_entries(config: DCAConfig, blocks: int) -> int:
    """The number of entries of the stack after `blocks` blocks: `min(blocks + 1, k + 2)`."""
    return min(blocks + 1, config.max_stack_entries or blocks + 1)


def num_outputs(config: DCAConfig) -> int:
    """The number of inputs that a block's residual forms."""
    scheme = RESIDUAL_SCHEMES[config.residual_scheme]
    return 1 if scheme is None else scheme.outputs


def _kind(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if name == "lm_head":
        return "head"
    if isinstance(module, GeneralizedResidual):
        return "residuals"
    return "norms" if isinstance(module, tuple(NORMS.values())) else "projections"


def count_parameters(config: DCAConfig) -> dict[str, int]:
    """The number of parameters by kind. (A tied head has none.)"""
    return _sum_by_kind(_stages_parameters(config, 1)[0].values())


def _sum_by_kind(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts = dict.fromkeys(("embeddings", "projections", "norms", "residuals", "head"), 0)
    for kind, number in parts:
        counts[kind] += number
    return counts


def _stages_parameters(config: DCAConfig, stages: int) -> list[dict[int, tuple[str, int]]]:
    with torch.device("meta"):
        model = DCAForCausalLM(config)
    parts = []
    for index in range(stages):
        part = model.pipeline_stage(index, stages)
        parts.append(
            {
                id(parameter): (_kind(name, module), parameter.numel())
                for name, module in part.named_modules()
                for parameter in module.parameters(recurse=False)
            }
        )
    return parts


def kept_by_block(config: DCAConfig, layout: Layout) -> float:
    """The bytes per token that a block keeps for the backward pass, without the entries of the stack."""
    d, t = config.hidden_size, layout.tensor
    stack = t if layout.by_sequence else 1  # what the stack, the residuals and the norms are divided by
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    outputs = num_outputs(config)
    norms_before, norms_after = config.norm_placement != "post_module", config.norm_placement != "pre"
    own = outputs * d * norms_before  # the inputs after their norms
    if config.residual_scheme != "standard":  # whose residual stream is the stack's entry
        own += outputs * d  # and before
    own += d * norms_before  # the feed-forward module's input after its norm
    if not config.parallel_blocks:
        own += d  # and before
    own += 2 * d * norms_after  # what norms after the modules take
    own += d  # what the block adds, an entry of all later ones
    shared = 2 * queries + 2 * keys  # queries, keys, values, and what the attention makes of them
    shared += (4 if config.gated_mlp else 2) * config.intermediate_size
    gathered = (outputs + 1) * d if layout.by_sequence and t > 1 else 0  # the inputs of projections are whole again
    softmax = 4 * config.num_attention_heads / t  # its logarithms of sums, in float32
    return layout.element * (own / stack + shared / t + gathered) + softmax


def checkpointed_tensors(config: DCAConfig, blocks: int | None = None) -> int:
    """
    What is kept with activation checkpointing, in tensors of tokens x width: the model's input and all outputs, of which
    what k-DCA merges is made again, and the output's residual.
    """
    blocks = config.num_hidden_layers if blocks is None else blocks
    return blocks + 1 + (config.residual_scheme != "standard")


def kept_bytes(config: DCAConfig, layout: Layout, index: int = 0) -> float:
    """The bytes that stage `index` keeps of a micro-batch until its backward pass."""
    d, element, last = config.hidden_size, layout.element, layout.pipeline - 1
    stack = layout.tensor if layout.by_sequence else 1
    blocks = share_of_blocks(config.num_hidden_layers, index, layout.pipeline)
    received = num_entries(config, blocks.start)
    if layout.checkpointing:
        kept = element * d * (received + len(blocks)) / stack
    else:
        kept = element * d * received / stack + len(blocks) * kept_by_block(config, layout)
    if index == 0:
        kept += 8  # the token's number
    if index == last:
        kept += element * d / stack  # the norm's output
        kept += element * d / stack * (config.residual_scheme != "standard")  # and its input
        kept += 4 * config.vocab_size + 8  # probabilities in float32, and the label
    return layout.tokens * kept


def memory(config: DCAConfig, layout: Layout) -> dict[str, float]:
    """The bytes that the fullest device of a run takes, by kind."""
    stages = _stages_parameters(config, layout.pipeline)
    fullest = {}
    for index, parts in enumerate(stages):
        counts = _sum_by_kind(parts.values())
        shared = counts["embeddings"] + counts["projections"] + counts["head"]
        parameters = (shared / layout.tensor + counts["norms"] + counts["residuals"]) / layout.sharding
        in_flight = min(layout.pipeline - index, max(layout.micro_batches, 1))
        kept = in_flight * kept_bytes(config, layout, index)
        if layout.checkpointing:
            kept += layout.tokens * kept_by_block(config, layout)  # of the block that is computed again
        own = {
            "weights": WEIGHT * parameters,
            "gradients": GRADIENT * parameters,
            "optimizer": OPTIMIZER * parameters,
            "activations": kept,
            "at work": _at_work(config, layout, index, counts["projections"]),
        }
        if sum(own.values()) > sum(fullest.values()):
            fullest = own
    return fullest


def _at_work(config: DCAConfig, layout: Layout, index: int, projections: int) -> float:
    """Temporary memory: two gathered blocks in 16 bits, or the logits, their copy in float32 and its gradient."""
    blocks = len(share_of_blocks(config.num_hidden_layers, index, layout.pipeline))
    gathered = 2 * 2 * projections / blocks / layout.tensor if layout.sharding > 1 else 0.0
    logits = layout.tokens * config.vocab_size * (layout.element + 8) if index == layout.pipeline - 1 else 0
    return max(gathered, logits)


def residual_bytes(config: DCAConfig, element: int = 2) -> tuple[float, float]:
    """
    The bytes that the generalized residuals of a model read and write, a token, forward and backward: of a block with
    `n` entries and `o` outputs `d (n + o)` and `d (3 n + o)` elements. The output's residual counts as one of one output.
    """
    d, blocks, outputs = config.hidden_size, config.num_hidden_layers, num_outputs(config)
    if config.residual_scheme == "standard":
        return 0.0, 0.0  # the sum is written with the block's output
    taken = [(num_entries(config, block), outputs) for block in range(blocks)]
    forward = sum(n + o for n, o in taken)
    backward = sum(3 * n + o for n, o in taken)
    return float(element * d * forward), float(element * d * backward)


def residual_flops(config: DCAConfig) -> float:
    """The floating-point operations per token of the generalized residuals, forward and backward."""
    scheme = RESIDUAL_SCHEMES[config.residual_scheme]
    if scheme is None:
        return 0.0
    d, outputs = config.hidden_size, num_outputs(config)
    entries = sum(num_entries(config, block) for block in range(config.num_hidden_layers))
    # b * f is summed up: 2 a feature. A gate is a product (2), and its factor (2); the norm of an entry 2 for all outputs.
    forward = entries * d * (2 * outputs + (4 * outputs + 2 if scheme.gated else 0))
    return 3.0 * forward


def block_flops(config: DCAConfig, seq: int) -> dict[str, float]:
    """The floating-point operations per token of blocks and head, forward and backward: 6 for each weight of a product."""
    counts = count_parameters(config)
    head = config.hidden_size * config.vocab_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq
    return {"projections": 6.0 * counts["projections"], "attention": float(attention), "head": 6.0 * head}


def cut_bytes(config: DCAConfig, layout: Layout) -> list[int]:
    """The bytes per micro-batch over each cut of the pipeline in one direction; gradients are as many in the other."""
    return [
        num_entries(config, share_of_blocks(config.num_hidden_layers, index, layout.pipeline).stop)
        * layout.tokens
        * config.hidden_size
        * layout.element
        for index in range(layout.pipeline - 1)
    ]


def link_bytes(config: DCAConfig, layout: Layout) -> dict[str, float]:
    """The bytes that a device sends in a step of one micro-batch, by purpose; in rings each device sends `(n - 1) / n`."""
    counts = count_parameters(config)
    shared = counts["embeddings"] + counts["projections"] + counts["head"]
    parameters = (shared / layout.tensor + counts["norms"] + counts["residuals"]) / layout.pipeline
    ring = {name: 1 - 1 / getattr(layout, name) for name in ("sharding", "replicas", "tensor")}
    blocks = config.num_hidden_layers / layout.pipeline
    if layout.by_sequence:
        # Gathered before and scattered after the modules, and the other way round in the backward pass.
        passes = 2 * (num_outputs(config) + 1 + 2)
    else:
        # An all-reduce is both: of two outputs, and of the gradient of each projection's input.
        passes = 2 * (2 + 3 + (2 if config.gated_mlp else 1))
    return {
        # Weights are gathered in 16 bits for both passes; gradients are scattered in float32.
        "sharding": ring["sharding"] * parameters * (2 + 2 + GRADIENT),
        "replicas": ring["replicas"] * 2 * GRADIENT * parameters / layout.sharding,
        "tensor": ring["tensor"] * blocks * passes * layout.tokens * config.hidden_size * layout.element,
        "pipeline": 2.0 * max(cut_bytes(config, layout), default=0),
    }


def slowdown(config: DCAConfig, layout: Layout, flops: float, bandwidth: float) -> float:
    """
    How much longer than that of the plain transformer a step takes, as a share of it, on a device of `flops` a second in products
    and `bandwidth` bytes a second from memory, if nothing of the residuals is hidden behind products.
    """
    plain = sum(block_flops(config, layout.seq).values()) / layout.tensor / flops
    stack = layout.tensor if layout.by_sequence else 1
    return sum(residual_bytes(config, layout.element)) / stack / bandwidth / plain
