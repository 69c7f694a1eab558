"""What the training commands share: the folder of a run, its trainer, and its results."""

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub import create_repo
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES, nearest_name
from training.arguments import LAST, RECORD, Run, RunArguments
from training.card import DEPTH_WEIGHTS_DATA, read_json, write_card
from training.depth_weights import measure_depth_weights
from training.errors import UserError, hub_error, innermost_message
from training.initial import check_scheme, initial_model
from training.publish import publish


# How many held-out batches tell the mean gates.
DEPTH_WEIGHT_BATCHES = 16


def check_output_folder(arguments: RunArguments) -> None:
    """
    See that a run may use its folder, before anything is done for it.

    Raises:
        [`UserError`]: the folder holds another run and neither `overwrite` nor `resume_from_checkpoint` is set, it
        holds something else than a run, or there is nothing to resume.
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
            (Path(checkpoint) / "trainer_state.json").exists()
            and folder.resolve() in Path(checkpoint).resolve().parents
        ):
            raise UserError(
                f"`resume_from_checkpoint` is {checkpoint!r}, which is no checkpoint of the run in {folder}."
            )
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
        record.write_text(yaml.safe_dump(run.named, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or weights are no longer finite, before such weights are logged, evaluated or saved."""

    def __init__(self, trainer: "RunTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not (control.should_log or control.should_evaluate or control.should_save):
            return  # looking at a value on the device means waiting for it
        bad = next((entry for entry in self.trainer.take_losses() if not math.isfinite(entry[2])), None)
        if bad is None and control.should_save and not all(p.isfinite().all() for p in model.parameters()):
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
    """The trainer of a run: it stops at a loss that is not finite, and publishes the run as a whole."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []
        self.add_callback(NonFiniteGuard(self))

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # A run that had come to its end is resumed: the trainer would take one more step before it saw that.
        self.control.should_training_stop = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append((self.state.global_step + 1, self._get_learning_rate(), loss.detach()))
        return loss

    def take_losses(self) -> list[tuple[int, float, float]]:
        """Step, learning rate and loss of every batch since the last call."""
        steps, learning_rates, losses = zip(*self.losses)
        self.losses = []
        return list(zip(steps, learning_rates, torch.stack(losses).tolist()))

    def push_to_hub(self, *args, **kwargs):
        """Publish the folder of the run, model card and all, rather than what transformers would make of it."""
        if self.is_world_process_zero():
            publish(Path(self.args.output_dir), self.hub_model_id, bool(self.args.hub_private_repo))


def config_of_baseline(run: Run) -> DCAConfig | None:
    """The configuration of the baseline, or `None`: the run's, but for the residual scheme."""
    scheme = run.training.baseline
    if scheme is None:
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
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and Path(checkpoint).resolve().parent != folder.resolve():
        # None is named, or one of the other model of a comparison.
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    first_step = read_json(Path(checkpoint) / "trainer_state.json")["global_step"] if checkpoint else 0
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # for others, the trainer would publish a run that is not yet whole
    trainer.save_state()
    if result.global_step > first_step:
        # (The figures of a run that had already come to its end stay as they are.)
        trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics(config.residual_scheme, metrics)
    trainer.save_metrics("eval", metrics)
    return trainer
