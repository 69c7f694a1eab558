"""What the training commands share: the folder of a run, its trainer, and its results."""

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import parse_flag_from_env
from huggingface_hub import create_repo
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_torch_xla_available

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES, nearest_name
from training.arguments import LAST, RECORD, Run, RunArguments
from training.card import DEPTH_WEIGHTS_DATA, read_json, write_card
from training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    Termination,
    check_checkpoint,
    check_sharding,
    checkpoint_to_resume,
    discard_unfinished,
    finish_checkpoint,
    move_finished,
    rotate_checkpoints,
    told_if_not_written,
    write_whole,
)
from training.depth_weights import measure_depth_weights
from training.errors import UserError, hub_error, innermost_message
from training.initial import check_scheme, initial_model
from training.publish import publish
from training.stream import StreamBatches, TextStream
from training.throughput import SpeedProgress, Throughput


if is_torch_xla_available():
    import torch_xla


# How many held-out batches tell the mean gates.
DEPTH_WEIGHT_BATCHES = 16


def uses_fsdp(arguments: RunArguments) -> bool:
    """Whether the processes share out one model, as the launcher or the run says."""
    return arguments.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_output_folder(arguments: RunArguments) -> None:
    """
    See that a run may use its folder, before anything is done for it.

    Raises:
        [`UserError`]: the folder holds another run and neither `overwrite` nor `resume_from_checkpoint` is set, it
        holds something else than a run, there is nothing to resume, or the checkpoint is damaged or of another way to
        share out the model.
    """
    folder, checkpoint = Path(arguments.output_dir), arguments.resume_from_checkpoint
    named = f"`output_dir` is {str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{named}, which is a file: name a folder.")
    holds_run = (folder / RECORD).exists()
    if checkpoint is not None:
        if arguments.overwrite:
            raise UserError("Both `overwrite` and `resume_from_checkpoint` are set: leave one of them out.")
        if not holds_run:
            raise UserError(f"{named}, which holds no run to resume: leave `resume_from_checkpoint` out.")
        if checkpoint != LAST and not (
            any((Path(checkpoint) / file).exists() for file in ("trainer_state.json", MANIFEST))
            and folder.resolve() in Path(checkpoint).resolve().parents
        ):
            raise UserError(
                f"`resume_from_checkpoint` is {checkpoint!r}, which is no checkpoint of the run in {folder}."
            )
        for model_folder in filter(None, (folder, arguments.baseline and folder / arguments.baseline)):
            resumed = checkpoint_to_resume(model_folder, checkpoint)
            if resumed is not None:
                check_sharding(resumed, uses_fsdp(arguments))
                if arguments.should_save:  # one process reads all of it
                    check_checkpoint(resumed)
    elif folder.exists() and any(folder.iterdir()):
        if not holds_run:
            raise UserError(f"{named}, which holds files that are not of a run: name another folder.")
        if not arguments.overwrite:
            raise UserError(
                f"{named}, which holds another run: name another folder, or pass --overwrite to delete it or "
                "--resume_from_checkpoint to go on with it."
            )
        # (`runs/demo` of one configuration can hold `runs/demo/text` of another.)
        other = next((record.parent for record in folder.rglob(RECORD) if record.parent != folder), None)
        if other is not None:
            raise UserError(f"{named}, which also holds the run {str(other)!r}: move that, or name another folder.")


def check_model(model_class: type[PreTrainedModel], config: DCAConfig) -> None:
    """
    See that a model can be built, without the memory for its weights.

    Raises:
        [`UserError`]: it cannot: with an unknown implementation, say, or rotary positions that lack a parameter.
    """
    try:
        with torch.device("meta"):
            model_class(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The model cannot be built: {type(error).__name__}: {innermost_message(error)}") from error


def check_hub(arguments: RunArguments) -> None:
    """
    Create the repository that a run is to be published in, before anything else is done for the run.

    Raises:
        [`UserError`]: the Hub cannot be reached, or refuses it.
    """
    if arguments.push_to_hub and arguments.should_save:
        repo_id = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        try:
            create_repo(repo_id, private=arguments.hub_private_repo, exist_ok=True)
        except Exception as error:
            raise hub_error(error) from error


def make_output_folder(run: Run) -> None:
    """Make the folder of a run, which `check_output_folder` has seen, with a record of what was asked for."""
    folder = Path(run.training.output_dir)
    record = folder / RECORD
    if run.training.resume_from_checkpoint is not None:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))
        for section in ("model", "data"):
            if before[section] != run.named[section]:
                raise UserError(
                    f"The run in {folder} was started with other `{section}` fields ({record}): resume it with those, or "
                    "name another `output_dir`."
                )
    try:
        if run.training.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, yaml.safe_dump(run.named, sort_keys=False))
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error


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

    def push_to_hub(self, *args, **kwargs):
        """Publish the folder of the run, model card and all, rather than what transformers would make of it."""
        if self.is_world_process_zero():
            publish(Path(self.args.output_dir), self.hub_model_id, bool(self.args.hub_private_repo))


def config_of_baseline(run: Run) -> DCAConfig | None:
    """The configuration of the baseline, or `None`: the run's, but for the residual scheme."""
    scheme = run.training.baseline
    if scheme in (None, "none"):
        return None
    if scheme not in RESIDUAL_SCHEMES:
        raise UserError(f"`baseline` is {scheme!r}; {nearest_name(scheme, RESIDUAL_SCHEMES)}")
    if scheme == run.config.residual_scheme:
        raise UserError(f"`baseline` is {scheme!r}, which is the run's own `residual_scheme`: name another.")
    config = copy.deepcopy(run.config)
    config.residual_scheme = scheme
    if scheme == "standard":
        config.last_k = None
    check_scheme(config, run.initial_checkpoint)
    return config


def run_models(
    run: Run, model_class: type[PreTrainedModel], baseline: DCAConfig | None, note: dict, **trainer_options
) -> None:
    """
    Train the model of a run, and before it its baseline on the same batches, and leave the folder of the run complete:
    weights, configuration, code, processor, results, logs, model card and its pictures.

    Args:
        note: what the model card says of task and data, see `write_card`.
        trainer_options: datasets, collator, processor and metrics, as [`~transformers.Trainer`] takes them.
    """
    folder = Path(run.training.output_dir)
    note = {**note, "baseline": None}
    if baseline is not None:
        arguments = copy.copy(run.training)
        arguments.output_dir, arguments.push_to_hub = str(folder / baseline.residual_scheme), False
        train(model_class, baseline, arguments, run.initial_checkpoint, **trainer_options)
        note["baseline"] = Path(arguments.output_dir)

    trainer = train(model_class, run.config, run.training, run.initial_checkpoint, **trainer_options)
    if trainer.is_world_process_zero():
        # From the saved weights, which are whole however the trainer had spread the model.
        model = model_class.from_pretrained(folder).to(run.training.device)
        weights = measure_depth_weights(model, held_out_batches(trainer))
        (folder / DEPTH_WEIGHTS_DATA).write_text(json.dumps(weights, indent=1), encoding="utf-8")
        write_card(folder, run, note)
    if run.training.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"\nThe run is complete: {folder} (model card: {folder / 'README.md'})")


def held_out_batches(trainer: RunTrainer) -> Iterator[dict[str, torch.Tensor]]:
    """The first held-out batches, whole, on the process that asks."""
    size = trainer.args.per_device_eval_batch_size
    examples = trainer.eval_dataset.select(range(min(size * DEPTH_WEIGHT_BATCHES, len(trainer.eval_dataset))))
    for batch in DataLoader(examples, batch_size=size, collate_fn=trainer.data_collator):
        yield {name: values.to(trainer.args.device) for name, values in batch.items()}
        if trainer.args.device.type == "xla":
            torch_xla.sync()  # rather than a graph of all batches


def mean_logged_loss(log_history: list[dict]) -> float:
    """The mean over all steps, of which each entry holds the mean since the one before."""
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log_history if "loss" in entry))
    return sum((step - before) * loss for before, step, loss in zip((0, *steps), steps, losses)) / steps[-1]


def train(
    model_class: type[PreTrainedModel],
    config: DCAConfig,
    arguments: RunArguments,
    initial_checkpoint: str | None = None,
    **trainer_options,
) -> RunTrainer:
    """Train one model, from where it was left if `resume_from_checkpoint` is set, and save and evaluate it."""
    folder = Path(arguments.output_dir)
    set_seed(arguments.seed)
    model = initial_model(model_class, config, initial_checkpoint)
    try:
        trainer = RunTrainer(model=model, args=arguments, **trainer_options)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(innermost_message(error)) from error
    checkpoint = checkpoint_to_resume(folder, arguments.resume_from_checkpoint)
    first_step = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    with told_if_not_written("What was logged or found", folder, only_if_full=True):
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if result.global_step > first_step:
            trainer.save_metrics("train", result.metrics)
        elif not (folder / "train_results.json").exists():
            # It ended between its last checkpoint and its figures. (Those that there are stay as they are.)
            trainer.save_metrics("train", {"train_loss": mean_logged_loss(trainer.state.log_history)})
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate()
        trainer.log_metrics(config.residual_scheme, metrics)
        trainer.save_metrics("eval", metrics)
    return trainer
