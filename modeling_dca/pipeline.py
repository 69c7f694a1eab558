"""Stages of a language model for `torch.distributed.pipelining`."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from .modeling_dca import DCAForCausalLM, scale_logits


def share_of_blocks(num_blocks: int, index: int, count: int) -> range:
    """The blocks of stage `index` of `count`: as many in each, or one more in the first, as the last one has the head."""
    return range(-(-num_blocks * index // count), -(-num_blocks * (index + 1) // count))


class DCAPipelineStage(nn.Module):
    """
    A part of a `DCAForCausalLM`, `model.pipeline_stage(index, count)`, that computes and trains as the model does. It holds
    its share of the blocks; the first one holds the embeddings, too, and the last one the output's residual, the norm and
    the head. Its modules are the model's own, under the model's names: the `state_dict` of all stages together is that of
    the model, and `torch.distributed.checkpoint` makes one checkpoint of what each has saved.

    The first stage takes `input_ids`, and the last one returns logits `(batch, sequence, vocabulary)`. What passes between
    them is the stack, as positional tensors `(batch, sequence, hidden_size)`, the newest last: after `t` blocks
    `min(t + 1, k + 2)` of them, with all outputs kept `t + 1`, and one with the scheme `"standard"`.

    Tied embeddings live on two stages. Both start from the same weights (of a checkpoint or a seed), and stay equal if
    [`sum_tied_gradients`] is called between the backward passes and each step of the optimizer.

    Args:
        model (`DCAForCausalLM`): the whole model.
        index (`int`): which stage, from 0.
        count (`int`): how many there are.

    Raises:
        `ValueError`: there are fewer blocks than stages, or no stage `index`.

    Example:

    ```python
    >>> from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    >>> stage = model.pipeline_stage(rank, world_size)
    >>> optimizer = torch.optim.AdamW(stage.parameters())
    >>> schedule = Schedule1F1B(
    ...     PipelineStage(stage, rank, world_size, device),
    ...     n_microbatches=8,
    ...     loss_fn=lambda logits, labels: model.loss_function(logits, labels, model.config.vocab_size),
    ... )
    >>> schedule.step(*([input_ids] if rank == 0 else []), target=input_ids if rank == world_size - 1 else None)
    >>> stage.sum_tied_gradients()
    >>> optimizer.step()
    ```
    """

    def __init__(self, model: DCAForCausalLM, index: int, count: int):
        super().__init__()
        num_blocks = model.config.num_hidden_layers
        if not 1 <= count <= num_blocks:
            raise ValueError(
                f"`count` is {count}; a model of {num_blocks} blocks can have from 1 to {num_blocks} stages."
            )
        if not 0 <= index < count:
            raise ValueError(f"`index` is {index}; with {count} stages it must be from 0 to {count - 1}.")
        self.config, self.index, self.count = model.config, index, count
        self.is_first, self.is_last = index == 0, index == count - 1
        blocks = share_of_blocks(num_blocks, index, count)
        decoder = copy.copy(model.model)
        decoder._modules = dict(decoder._modules)  # the model keeps what the stage drops
        decoder.layers = nn.ModuleDict({str(block): model.model.layers[block] for block in blocks})
        if not self.is_first:
            decoder.embed_tokens = decoder.embed_positions = None
        if not self.is_last:
            decoder.residual = decoder.norm = None
        self.model = decoder
        self.lm_head = model.lm_head if self.is_last else None
        self._changed_alone = None  # the version of a tied weight that has gradients of this stage alone
        tied = self._tied_weight()
        if tied is not None:
            tied.register_post_accumulate_grad_hook(self._note_gradient)
        self.train(model.training)

    def forward(
        self,
        *inputs: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """
        Args:
            inputs: `input_ids` `(batch, sequence)` in the first stage, in the others the stack.
            attention_mask, position_ids: as in [`~transformers.LlamaModel`]. All stages need them, so every rank gives them
                to `schedule.step`.

        Returns:
            The stack, or in the last stage logits.

        Raises:
            `RuntimeError`: a tied weight was changed by gradients of this stage alone.
        """
        decoder = self.model
        tied = self._tied_weight()
        if tied is not None and self._changed_alone not in (None, tied._version):
            raise RuntimeError(
                "The tied embeddings were updated with the gradients of only one of their two stages: call "
                "`stage.sum_tied_gradients()` before the optimizer's step."
            )
        hidden_states = decoder.embed_tokens(*inputs) if self.is_first else inputs[0]
        position_ids, masks = decoder._positions_and_masks(hidden_states, attention_mask, position_ids, None, None, {})
        stack = (decoder._add_positions(hidden_states, position_ids),) if self.is_first else inputs
        position_embeddings = decoder._rotate(hidden_states, position_ids)
        for block, layer in decoder.layers.items():
            layer_type = self.config.layer_types[int(block)]
            stack = layer(
                *stack,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings.get(layer_type),
                position_ids=position_ids,
            )
            stack = (stack,) if isinstance(stack, torch.Tensor) else stack
        if not self.is_last:
            return stack if len(stack) > 1 else stack[0]
        hidden_states, _ = decoder.residual(*stack)
        return scale_logits(self.lm_head(decoder.norm(hidden_states)), self.config)

    def sum_tied_gradients(self, group: dist.ProcessGroup | None = None) -> None:
        """
        Gives the first and the last stage the sum of their gradients of the tied embeddings; with others, and where nothing
        is tied, it does nothing. Call it on every rank, once a step, before gradients are clipped.

        Args:
            group (*optional*): that of the pipeline, in which stage `i` is on rank `i % size`; all processes by default.
        """
        tied = self._tied_weight()
        if tied is None:
            return
        self._changed_alone = None
        # (A process that has both stages has one weight.)
        size = dist.get_world_size(group) if dist.is_initialized() else 1
        peer = (self.count - 1 if self.is_first else 0) % size
        if peer == (dist.get_rank(group) if size > 1 else 0):
            return
        if tied.grad is None:
            tied.grad = torch.zeros_like(tied)
        grad = tied.grad.to_local() if hasattr(tied.grad, "to_local") else tied.grad
        other = torch.empty_like(grad, memory_format=torch.contiguous_format)
        peer = peer if group is None else dist.get_global_rank(group, peer)
        send, receive = (
            dist.P2POp(dist.isend, grad.contiguous(), peer, group),
            dist.P2POp(dist.irecv, other, peer, group),
        )
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        grad.add_(other)

    def _tied_weight(self) -> nn.Parameter | None:
        """The embeddings' weight, if it is trained, tied to a head on another stage, and this stage has one of the two."""
        if not self.config.tie_word_embeddings or self.count == 1 or not (self.is_first or self.is_last):
            return None
        weight = self.model.embed_tokens.weight if self.is_first else self.lm_head.weight
        return weight if weight.requires_grad else None

    def _note_gradient(self, weight: nn.Parameter) -> None:
        self._changed_alone = weight._version

    def extra_repr(self) -> str:
        return f"{self.index} of {self.count}"


__all__ = ["DCAPipelineStage"]
