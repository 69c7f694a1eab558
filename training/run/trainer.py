"""The trainer of a run: a Trainer of transformers with atomic checkpoints, streams, throughput and checks of the loss."""

import contextlib
import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import DistributedType, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from accelerate.utils.memory import should_reduce_batch_size
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, RandomSampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_torch_xla_available

from training.results.hub import publish
from training.results.record import DIVERGED
from training.run.checkpoints import (
    OPTIMIZER_FOLDER,
    UNFINISHED,
    discard_unfinished,
    files_below,
    finish_checkpoint,
    move_finished,
    rotate_checkpoints,
    told_if_not_written,
)
from training.run.parallel import from_all, load_optimizer_distributed, save_optimizer_distributed, uses_fsdp
from training.run.termination import Termination
from training.run.throughput import SpeedProgress, Throughput
from training.support.errors import UserError, innermost_message
from training.support.files import read_json, write_whole
from training.variants.scheme import set_connection_groups


if is_torch_xla_available():
    import torch_xla


# The number of losses to keep on the device before they are checked.
LOSSES_KEPT = 1000


class XlaStep(TrainerCallback):
    """
    Ends the graph of an XLA device after each step, before any value is read: reading a value earlier would compile and run
    the graph up to it separately. The data loader would end the graph only in the next step, which would count compilation
    as waiting for data, and would make one graph of all batches whose gradients are accumulated.
    """

    def on_step_end(self, args, state, control, **kwargs):
        torch_xla.sync(wait=control.should_log or control.should_evaluate or control.should_save)

    on_substep_end = on_step_end


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or weights are no longer finite, before it logs, evaluates or saves them."""

    def __init__(self, trainer: "RunTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        saves = control.should_save or state.global_step >= state.max_steps
        if not (saves or control.should_log or control.should_evaluate or len(self.trainer.losses) >= LOSSES_KEPT):
            return  # reading a value waits for the device
        losses, what = self.trainer.take_losses(), "loss"
        learning_rates = {step: learning_rate for step, learning_rate, _ in losses}
        step = self._first([step for step, _, loss in losses if not math.isfinite(loss)])
        if step is None and saves:
            what, learning_rates = "weights", {state.global_step: self.trainer._get_learning_rate()}
            # (Of sharded weights, the part of this process.)
            own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
            step = self._first([] if get_total_norm(own).isfinite() else [state.global_step])
        if step is not None:
            last = get_last_checkpoint(args.output_dir)
            if args.should_save:
                found = {"step": step, "learning_rate": learning_rates[step], "what": what}
                with told_if_not_written("The report of the divergence", args.output_dir):
                    write_whole(Path(args.output_dir, DIVERGED), json.dumps(found))
            raise UserError(
                f"The {what} became NaN or infinite at step {step}, with a learning rate of {learning_rates[step]:.3g}: lower "
                "`learning_rate` or lengthen `warmup_steps`. "
                + (f"The last good checkpoint is {last}." if last else "There is no checkpoint yet.")
            )

    def _first(self, steps: list[int]) -> int | None:
        """The first of the steps that any process found, returned in all processes."""
        accelerator, never = self.trainer.accelerator, self.trainer.state.global_step + 1
        first = min(steps, default=never)
        if accelerator.num_processes > 1:
            first = accelerator.gather(torch.tensor([first], device=accelerator.device)).min().item()
        return None if first == never else first


class StreamBatches(Protocol):
    """The endless batches of one process. It knows the position of the training, however far it has read ahead."""

    def __iter__(self) -> Iterator[Any]: ...

    def trained(self) -> None:
        """Note that every process was trained on a batch."""

    def save(self, folder: str) -> None:
        """Write the position of the stream to a checkpoint."""

    def load(self, folder: str) -> None:
        """Continue at the position in a checkpoint, whatever the number of processes that wrote it."""


class Stream(Protocol):
    """Examples that are read during the training."""

    def batches(self, batch_size: int, collate: Callable, **options: int | None) -> StreamBatches:
        """
        The batches of one process.

        Args:
            options: `num_processes`, `process_index`, `num_workers` and `prefetch_factor`.
        """


class RunTrainer(Trainer):
    """
    The trainer of a run. It saves atomically, stops with a checkpoint at SIGTERM and without one if the loss is not finite,
    and publishes the run as a whole.

    Args:
        stream: the training data in place of `train_dataset`; it saves and restores its position.
    """

    def __init__(self, *args, stream: Stream | None = None, **kwargs):
        state = PartialState()
        arguments = kwargs["args"]
        if state.distributed_type is DistributedType.MULTI_CPU and (uses_fsdp(arguments) or arguments.tp_size > 1):
            # Accelerate passes no CPU processes on to FSDP: it would silently train with DDP.
            state.distributed_type = DistributedType.MULTI_GPU
        # The Trainer refuses to save the optimizer of a model that is divided, as it cannot load one.
        save_only_model, arguments.save_only_model = (
            arguments.save_only_model,
            arguments.save_only_model or arguments.tp_size > 1,
        )
        super().__init__(*args, train_dataset=kwargs.pop("train_dataset", None) or stream, **kwargs)
        self.args.save_only_model = save_only_model
        self.losses = []
        self.initial_weights = None
        self.stream, self.stream_batches = stream, None
        if stream is not None:
            self.args.ignore_data_skip = True  # it continues at its position, and is not read again from the start
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
        self.add_callback(self.termination)  # before the guard, which checks what is about to be saved
        self.add_callback(NonFiniteGuard(self))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = plugin and plugin.mixed_precision_policy
        if policy is not None:
            # By default, Accelerate reduces gradients and rounds losses in 16 bits.
            whole = {"reduce_dtype": torch.float32}
            if plugin.fsdp_version == 2:
                whole["output_dtype"] = None  # unchanged: losses in 32 bits, and layer outputs in 16
            plugin.mixed_precision_policy = dataclasses.replace(policy, **whole)

    def train(self, *args, **kwargs):
        if self.args.should_save:
            discard_unfinished(self.folder)
        with self.termination, self._told_if_out_of_memory("per_device_train_batch_size"):
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self._told_if_out_of_memory("per_device_eval_batch_size"):
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _told_if_out_of_memory(self, field: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error) and "No executable batch size" not in str(error):
                raise
            message = textwrap.shorten(innermost_message(error), 200, placeholder=" ...")
            raise UserError(
                f"The device is out of memory with {getattr(self.args, field)} as `{field}`: lower it, or make the model "
                f"smaller ({message})."
            ) from error

    def _inner_training_loop(self, batch_size=None, args=None, **kwargs):
        if args.auto_find_batch_size:
            if self.initial_weights is None:
                self.initial_weights = {
                    name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()
                }
            else:  # the attempt that ran out of memory may have trained for some steps
                self.model.load_state_dict(self.initial_weights)
                self.optimizer, self.losses = None, []
                self.throughput.__init__()
                set_seed(args.seed)
            if args.global_batch_size is not None:
                share = args.global_batch_size // args.data_parallel_size
                batch_size = max(size for size in range(1, batch_size + 1) if share % size == 0)
                args.gradient_accumulation_steps = share // batch_size
            args.per_device_train_batch_size = batch_size
        return super()._inner_training_loop(batch_size=batch_size, args=args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            set_connection_groups(optimizer, self.model)
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        sampler, batch = super()._get_train_sampler(train_dataset), self.args.global_batch_size
        if batch is None or sampler is None:
            return sampler
        # By default, the last batch of an epoch is smaller with one process, and filled up with several.
        whole = -(-len(sampler) // batch) * batch
        if isinstance(sampler, RandomSampler):
            return RandomSampler(sampler.data_source, num_samples=whole)
        return [index % len(sampler) for index in range(whole)]

    def get_train_dataloader(self):
        if self.stream is None:
            return super().get_train_dataloader()
        self.stream_batches = self.stream.batches(
            self._train_batch_size,
            self.data_collator,
            num_processes=self.args.data_parallel_size,
            process_index=self.args.data_parallel_index,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        loader = DataLoader(
            self.stream_batches,
            batch_size=None,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )
        # Each process reads its own part, of which accelerate must not take a part again.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_eval_dataloader(self, eval_dataset=None):
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # it is for training only
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last
        # Accelerate's loader for XLA reads ahead in a thread, and reaches the end before the last batch is evaluated. Then
        # the examples that fill that batch up would count in the loss.
        return loader.dataloader if self.args.device.type == "xla" else loader

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            if self.stream_batches is not None and kwargs["resume_from_checkpoint"] is not None:
                self.stream_batches.load(kwargs["resume_from_checkpoint"])
                # (The Trainer, which skips nothing, would count the epoch from 0.)
                kwargs["epoch"] = kwargs["epochs_trained"] = self.state.global_step / self.state.max_steps
            return super()._run_epoch(*args, **kwargs)
        # The resumed run is at its end already: the Trainer would take one more step.
        self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = super().get_batch_samples(self.throughput.waiting.over(epoch_iterator), num_batches, device)
        if self.args.device.type == "xla" and len(batches[0]) < num_batches:
            # An error in the thread that reads ahead ends the data, and only its traceback shows it.
            raise UserError(
                f"Reading the data failed after step {self.state.global_step}, for the reason above. When that is fixed, run "
                "the same command with --resume_from_checkpoint to continue from the last checkpoint."
            )
        return batches

    def log(self, logs, start_time=None):
        # For logged steps and for the whole training; evaluations have their own speed.
        if "loss" in logs:
            logs.update(self.throughput.measured(self.args.world_size, since_last_log=True))
        elif "train_loss" in logs:
            total = self.throughput.measured(self.args.world_size, since_last_log=False)
            logs.update({f"train_{name}": value for name, value in total.items()})
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.throughput.count(self.model, inputs, self.args.data_parallel_size)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append((self.state.global_step + 1, self._get_learning_rate(), loss.detach()))
        if self.stream_batches is not None:
            self.stream_batches.trained()
        return loss

    def compute_loss(self, model, *args, **kwargs):
        if model.training:
            return super().compute_loss(model, *args, **kwargs)
        # The held-out loss is the model's own, which can be compared, without what modifies the training loss.
        smoother, loss_func = self.label_smoother, self.compute_loss_func
        self.label_smoother = self.compute_loss_func = None
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            self.label_smoother, self.compute_loss_func = smoother, loss_func

    def floating_point_ops(self, inputs):
        # The Trainer sums those of all processes.
        return super().floating_point_ops(inputs) * self.args.data_parallel_size // self.args.world_size

    def _track_num_input_tokens(self, inputs):
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen * self.args.data_parallel_size // self.args.world_size

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
            # (The processes of one machine see the same files.)
            written = from_all(files_below(unfinished) if self.args.local_process_index == 0 else [])
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))  # with the final name of the best one
                finish_checkpoint(unfinished, self.folder, written)
                limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate_checkpoints(self.folder, self.state.global_step, limit, best)
            self.accelerator.wait_for_everyone()

    # The optimizer of a model that is divided is saved by `torch.distributed.checkpoint`, so that any number of processes can
    # load it; the weights are saved whole.

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.tp_size == 1:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self.optimizer.optimizer, f"{output_dir}/{OPTIMIZER_FOLDER}")
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), f"{output_dir}/{SCHEDULER_NAME}")

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not Path(checkpoint, OPTIMIZER_FOLDER).exists():
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_distributed(self.model, self.optimizer.optimizer, f"{checkpoint}/{OPTIMIZER_FOLDER}")
        schedule = torch.load(f"{checkpoint}/{SCHEDULER_NAME}", weights_only=True)
        # It has one learning rate per parameter group, all equal; the number of groups depends on the processes.
        groups = len(self.optimizer.param_groups)
        schedule.update({name: value[:1] * groups for name, value in schedule.items() if isinstance(value, list)})
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.args.tp_size == 1:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = {}
        if self.is_world_process_zero():
            weights = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype).state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)

    def _load_best_model(self):
        if self.args.tp_size == 1:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.stream_batches is not None and self.args.is_first_of_batch:
            self.stream_batches.save(output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        if output_dir is not None:
            with self._plain_arguments():
                return super().save_model(output_dir, _internal_call)
        unfinished = self.folder / UNFINISHED / "model"
        with told_if_not_written("The trained model", self.folder), self.whole_weights():
            # (The Trainer would publish a run that is not complete.)
            with self._plain_arguments():
                super().save_model(str(unfinished), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_finished(unfinished, self.folder)
            self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _plain_arguments(self) -> Iterator[None]:
        """
        Saves the arguments as transformers' `TrainingArguments`, with all fields, so that they load without this project.
        """
        own = self.args
        self.args = object.__new__(TrainingArguments)
        vars(self.args).update(vars(own))
        try:
            yield
        finally:
            self.args = own

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Saves weights that FSDP has sharded as those of one model, not as the shards of the processes."""
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

    def evaluation_loop(self, *args, **kwargs):
        if self.args.data_parallel_size < self.args.world_size:
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, values):
        """Gathers for metrics as the accelerator does, but takes what several processes have computed together only once."""
        size, world_size = self.args.data_parallel_size, self.args.world_size
        state = self.accelerator.gradient_state
        end = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def once(gathered: torch.Tensor) -> torch.Tensor:
            # The processes of a batch are neighbours.
            return gathered.unflatten(0, (size, world_size // size, -1))[:, 0].flatten(0, 1)[:end]

        return recursively_apply(once, self.accelerator.gather(values))

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            # The last batches of the processes are filled up with examples that were evaluated before. The loss, which the
            # Trainer weighs by the number of the other examples, must be that of those only.
            own = min(max(state.remainder - self.args.data_parallel_index * size, 1), size)
            inputs = self._prepare_inputs({name: values[:own] for name, values in inputs.items()})
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs).detach()
        return loss, logits, labels

    def save_metrics(self, split, metrics, combined=True):
        """As in the Trainer, but files are replaced atomically: a resumed run reads `all_results.json` again."""
        if self.is_world_process_zero():
            together = self.folder / "all_results.json"
            before = read_json(together) if together.exists() else {}
            for file, values in ((together, {**before, **metrics}), (self.folder / f"{split}_results.json", metrics)):
                write_whole(file, json.dumps(values, indent=4, sort_keys=True))

    def init_hf_repo(self, *args, **kwargs):
        """Nothing to do: `check_hub` has created the repository."""

    def push_to_hub(self, *args, **kwargs):
        """Publish the folder of the run, with its own model card, in place of what transformers would push."""
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
                    f"The run in {self.folder} is complete, but not published; when this is fixed, publish it with `python -m "
                    f"training.publish {self.folder} {repo_id}{options}`: "
                    + str(error).replace("the same command", "that command")
                ) from error
