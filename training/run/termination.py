"""Checkpoint and exit at SIGTERM."""

from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training.run.checkpoints import goes_on
from training.support.errors import Terminated, at_sigterm


class Termination(TrainerCallback):
    """
    Ends a training at SIGTERM with a checkpoint, after the step, evaluation or checkpoint in progress. Several processes end
    after the same step, even if the signal reaches some of them later, or only one.

    The processes agree through a collective on their hosts, whose result they wait for one step later. That waits for no
    device, and seldom for a host that runs ahead of its device. It fails when a process is gone, so that the others notice
    this, too, while their devices still wait. TPU processes have no such collective, and agree when they log or save.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.requested = self.agreed = False
        self.group = self.flag = self.work = None

    def __enter__(self):
        self.requested = self.agreed = False
        # (The workers of a data loader inherit it: a batch system may signal them, too, and they are still needed.)
        self.handler = at_sigterm(self._request)
        self.handler.__enter__()

    def __exit__(self, exception_type, exception, traceback):
        self.handler.__exit__(None, None, None)
        if self.requested and exception is None:
            raise Terminated("terminated when the training was complete")

    def _request(self, signal_number, frame):
        self.requested = True

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and distributed.is_initialized():
            self.group = distributed.new_group(backend="gloo")
            self._ask()

    def _ask(self):
        self.flag = torch.tensor(self.requested, dtype=torch.int32)
        self.work = distributed.all_reduce(self.flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)

    def _agree(self, control) -> bool:
        """Whether to end; the same in all processes."""
        if self.group is not None:
            self.work.wait()
            self.agreed = self.agreed or bool(self.flag)
            self._ask()
        elif self.trainer.args.world_size == 1:
            self.agreed = self.requested
        elif control.should_log or control.should_save:
            flag = torch.tensor([self.requested], dtype=torch.int32, device=self.trainer.args.device)
            self.agreed = self.agreed or bool(self.trainer.accelerator.gather(flag).any())
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        if self._agree(control):
            # Otherwise, the checkpoint would lack what is not yet logged.
            control.should_log = control.should_save = True

    def on_evaluate(self, args, state, control, **kwargs):
        if self.trainer.is_in_train and self._agree(control):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._agree(control):
            checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            raise Terminated(f"terminated; {checkpoint} was written: {goes_on(checkpoint)}.")
