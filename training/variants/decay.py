"""Other forms of weight decay on `b`."""

import torch
from transformers import TrainerCallback


class DecayOfB(TrainerCallback):
    """
    Replaces AdamW's weight decay on `b = 1 + delta`, which pulls it to 1 by `lr * weight_decay * delta` per step, with one
    that pulls it to 0, by `lr * weight_decay * b`, or with none.
    """

    def __init__(self, to_zero: bool):
        self.to_zero = to_zero

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        deltas = (parameter for name, parameter in model.named_parameters() if name.endswith("residual.delta"))
        self.before = [(delta, delta.clone()) for delta in deltas]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        pull = optimizer.param_groups[0]["lr"] * args.weight_decay
        for delta, before in self.before:
            delta.add_(pull * before)
            if self.to_zero:
                delta.sub_(pull * (1 + before))
