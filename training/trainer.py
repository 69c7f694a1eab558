"""The trainer of a run: what the Trainer of transformers does not do by itself, or does otherwise."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import parse_flag_from_env
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, RandomSampler
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_torch_xla_available

from training.arguments import DIVERGED, RunArguments
from training.card import read_json
from training.checkpoints import (
    UNFINISHED,
    Termination,
    discard_unfinished,
    finish_checkpoint,
    move_finished,
    rotate_checkpoints,
    told_if_not_written,
    write_whole,
)
from training.errors import UserError
from training.publish import publish
from training.stream import StreamBatches, TextStream
from training.throughput import SpeedProgress, Throughput


if is_torch_xla_available():
    import torch_xla


def uses_fsdp(arguments: RunArguments) -> bool:
    """Whether the processes share out one model, as the launcher or the run says."""
    return arguments.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


class XlaStep(TrainerCallback):
    """
    Ends the graph of an XLA device with the step, before anything looks at a value of it: a value that is asked for earlier
    has all that leads to it compiled, and computed, for itself. The data loader, which would end it, is part of the next
    step, which would then be said to wait for data while it compiles; and of batches whose gradients are accumulated it
    would make a single graph.
    """

    def on_step_end(self, args, state, control, **kwargs):
        torch_xla.sync(wait=control.should_log or control.should_evaluate or control.should_save)

    on_substep_end = on_step_end


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or weights are no longer finite, before such weights are logged, evaluated or saved."""

    def __init__(self, trainer: "RunTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not (control.should_log or control.should_evaluate or control.should_save):
            return  # looking at a value on the device means waiting for it
        bad = next((entry for entry in self.trainer.take_losses() if not math.isfinite(entry[2])), None)
        if bad is None and control.should_save and not get_total_norm(model.parameters()).isfinite():
            bad = (state.global_step, self.trainer._get_learning_rate(), None)
        if bad is not None:
            step, learning_rate, loss = bad
            last = get_last_checkpoint(args.output_dir)
            if args.should_save:
                found = {"step": step, "learning_rate": learning_rate, "what": "weights" if loss is None else "loss"}
                with told_if_not_written("What was found", args.output_dir):
                    write_whole(Path(args.output_dir, DIVERGED), json.dumps(found))
            raise UserError(
                f"The {'weights' if loss is None else 'loss'} became NaN or infinite at step {step}, with a learning rate "
                f"of {learning_rate:.3g}: lower `learning_rate` or lengthen `warmup_steps`. "
                + (f"The last good checkpoint is {last}." if last else "No checkpoint had been saved.")
            )


class RunTrainer(Trainer):
    """
    The trainer of a run: what it saves is whole or not there, it stops with a checkpoint at SIGTERM and without one at a
    loss that is not finite, and publishes the run as a whole.
    """

    def __init__(self, *args, **kwargs):
        state = PartialState()
        if state.distributed_type is DistributedType.MULTI_CPU and uses_fsdp(kwargs["args"]):
            # The processes of CPUs are all that accelerate does not pass on to FSDP: it would train with DDP, and not say so.
            state.distributed_type = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        self.losses = []
        self.stream = None
        if isinstance(self.train_dataset, TextStream):
            self.args.ignore_data_skip = True  # it goes on where it was, and is not read again from its start
        if self.args.device.type == "xla":
            self.add_callback(XlaStep)
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(SpeedProgress)
        self.folder = Path(self.args.output_dir)
        self.checkpoints_folder = None
        self.termination = Termination(self)
        self.add_callback(self.termination)  # before the guard, which looks at what is to be saved
        self.add_callback(NonFiniteGuard(self))

    def train(self, *args, **kwargs):
        if self.args.should_save:
            discard_unfinished(self.folder)
        with self.termination:
            return super().train(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        scale = self.args.gate_learning_rate_scale
        if is_new and scale != 1:
            parameters = (self.model if model is None else model).named_parameters()
            gates = {parameter for name, parameter in parameters if name.endswith("residual.gate")}
            for group in list(optimizer.param_groups):
                slow = [parameter for parameter in group["params"] if parameter in gates]
                if slow:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in gates]
                    optimizer.add_param_group({**group, "params": slow, "lr": group["lr"] * scale})
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        sampler, batch = super()._get_train_sampler(train_dataset), self.args.global_batch_size
        if batch is None or not isinstance(sampler, RandomSampler):
            return sampler
        # Left to itself, the last batch of an epoch is smaller on one process, and filled up for several.
        return RandomSampler(sampler.data_source, num_samples=-(-len(sampler) // batch) * batch)

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, TextStream):
            return super().get_train_dataloader()
        self.stream = StreamBatches(
            self.train_dataset,
            self._train_batch_size,
            self.data_collator,
            num_processes=self.args.world_size,
            process_index=self.args.process_index,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        loader = DataLoader(
            self.stream, batch_size=None, pin_memory=self.args.dataloader_pin_memory, generator=torch.Generator()
        )
        # Each process reads its own part: as one of several, accelerate would take a part of that, too.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_eval_dataloader(self, eval_dataset=None):
        loader = super().get_eval_dataloader(eval_dataset)
        # Accelerate's loader for XLA reads ahead in a thread. It has met the end before the last batch is evaluated, so
        # that nothing leaves out what fills that batch up: the loss would count it as a whole one.
        return loader.dataloader if self.args.device.type == "xla" else loader

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            if self.stream is not None and kwargs["resume_from_checkpoint"] is not None:
                self.stream.load(kwargs["resume_from_checkpoint"])
                # (The trainer, which skips nothing, would count the epoch from 0.)
                kwargs["epoch"] = kwargs["epochs_trained"] = self.state.global_step / self.state.max_steps
            return super()._run_epoch(*args, **kwargs)
        # A run that had come to its end is resumed: the trainer would take one more step before it saw that.
        self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = super().get_batch_samples(self.throughput.waiting.over(epoch_iterator), num_batches, device)
        if self.args.device.type == "xla" and len(batches[0]) < num_batches:
            # An error in the thread that reads ahead ends the data, and only its traceback tells of it.
            raise UserError(
                f"The data could not be read on after step {self.state.global_step}; why stands above. The same command "
                "with --resume_from_checkpoint goes on from the last checkpoint when this is mended."
            )
        return batches

    def log(self, logs, start_time=None):
        # What is said of a step and of the whole training; evaluations have speeds of their own.
        if "loss" in logs:
            logs.update(self.throughput.measured(self.args.world_size, since_last_log=True))
        elif "train_loss" in logs:
            total = self.throughput.measured(self.args.world_size, since_last_log=False)
            logs.update({f"train_{name}": value for name, value in total.items()})
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.throughput.count(self.model, inputs, self.args.world_size)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append((self.state.global_step + 1, self._get_learning_rate(), loss.detach()))
        if self.stream is not None:
            self.stream.trained()
        return loss

    def take_losses(self) -> list[tuple[int, float, float]]:
        """Step, learning rate and loss of every batch since the last call."""
        steps, learning_rates, losses = zip(*self.losses)
        self.losses = []
        return list(zip(steps, learning_rates, torch.stack(losses).tolist()))

    def _get_output_dir(self, trial):
        return self.checkpoints_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = self.folder / UNFINISHED / name
        with told_if_not_written(f"The checkpoint of step {self.state.global_step}", self.folder):
            self.checkpoints_folder = str(unfinished.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.checkpoints_folder = None
            if self.state.best_model_checkpoint == str(unfinished):
                self.state.best_model_checkpoint = str(self.folder / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))  # with the name of the best one
                finish_checkpoint(unfinished, self.folder)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(
                    self.folder, self.args.save_total_limit, keep={name, Path(best).name} if best else {name}
                )
            self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        if output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        unfinished = self.folder / UNFINISHED / "model"
        with told_if_not_written("The trained model", self.folder), self.whole_weights():
            # (The trainer would publish a run that is not yet whole.)
            super().save_model(str(unfinished), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_finished(unfinished, self.folder)
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Saves weights that FSDP has shared out as those of one model, not as the parts that the processes have."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(before)

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            # The last batches of the processes are filled up, with examples that were evaluated before. The loss, which the
            # trainer then takes as often as there are others, is to be that of those alone.
            own = min(max(state.remainder - self.args.process_index * size, 1), size)
            inputs = self._prepare_inputs({name: values[:own] for name, values in inputs.items()})
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs).detach()
        return loss, logits, labels

    def save_metrics(self, split, metrics, combined=True):
        """As the trainer does, but that a file is replaced as a whole: `all_results.json` is read again in a resumed run."""
        if self.is_world_process_zero():
            together = self.folder / "all_results.json"
            before = read_json(together) if together.exists() else {}
            for file, values in ((together, {**before, **metrics}), (self.folder / f"{split}_results.json", metrics)):
                write_whole(file, json.dumps(values, indent=4, sort_keys=True))

    def init_hf_repo(self, *args, **kwargs):
        """The repository is there: the commands have seen to it before anything else."""

    def push_to_hub(self, *args, **kwargs):
        """Publish the folder of the run, model card and all, rather than what transformers would make of it."""
        if self.is_world_process_zero():
            repo_id, revision = self.args.hub_model_id, self.args.hub_revision
            try:
                publish(self.folder, repo_id, self.args.hub_private_repo, revision)
                self.callback_handler.on_push_begin(self.args, self.state, self.control)  # a Space of the logs, say
            except UserError as error:
                options = "".join(
                    [f" --revision {revision}" if revision else "", " --private" if self.args.hub_private_repo else ""]
                )
                raise UserError(
                    f"The run in {self.folder} is complete, but not published; when this is mended, `python -m "
                    f"training.publish {self.folder} {repo_id}{options}` does it: "
                    + str(error).replace("the same command", "that command")
                ) from error
