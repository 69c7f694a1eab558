"""What the training commands share: the folder of a run, its trainer, and its results."""

import contextlib
import copy
import itertools
import json
import shutil
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import get_last_checkpoint

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES, nearest_name
from training.arguments import LAST, Run, RunArguments
from training.card import DEPTH_WEIGHTS_DATA, write_card
from training.depth_weights import measure_depth_weights
from training.errors import UserError, hub_error, innermost_message


RECORD = "run.yaml"
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
        if checkpoint != LAST and not (Path(checkpoint) / "trainer_state.json").exists():
            raise UserError(f"`resume_from_checkpoint` is {checkpoint!r}, which is no checkpoint of a run.")
    elif folder.exists() and any(folder.iterdir()):
        if not holds_run:
            raise UserError(f"{named}, which holds files that are not of a run: name another folder.")
        if not arguments.overwrite:
            raise UserError(
                f"{named}, which holds another run: name another folder, or pass --overwrite to delete it or "
                "--resume_from_checkpoint to go on with it."
            )


def make_output_folder(run: Run) -> None:
    """Make the folder of a run, which `check_output_folder` has seen, with a record of what was asked for."""
    folder = Path(run.training.output_dir)
    if run.training.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(yaml.safe_dump(record(run), sort_keys=False), encoding="utf-8")


def record(run: Run) -> dict:
    """What a run was asked for, with all fields, as its YAML file could say it."""
    model = {
        name: value
        for name, value in run.config.to_diff_dict().items()
        if name not in ("model_type", "transformers_version")
    }
    training = {name: value for name, value in run.training.to_dict().items() if not name.endswith("token")}
    return json.loads(json.dumps({"model": model, "data": vars(run.data), "training": training}, default=str))


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or weights are no longer finite, before such weights are logged, evaluated or saved."""

    def __init__(self, trainer: "RunTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not (control.should_log or control.should_evaluate or control.should_save):
            return  # looking at a value on the device means waiting for it
        step, learning_rate = (value.item() for value in self.trainer.first_non_finite)
        if step < 0 and control.should_save and not all(p.isfinite().all() for p in model.parameters()):
            step, learning_rate = state.global_step, self.trainer._get_learning_rate()
        if step >= 0:
            last = get_last_checkpoint(args.output_dir)
            raise UserError(
                f"The loss became NaN or infinite at step {int(step)}, with a learning rate of {learning_rate:.3g}: lower "
                f"`learning_rate` or lengthen `warmup_steps`. "
                + (f"The last good checkpoint is {last}." if last else "No checkpoint had been saved.")
            )


class RunTrainer(Trainer):
    """The trainer of a run: stops at a loss that is not finite, and writes the project's own model card."""

    def __init__(self, *args, card=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.card = card
        # Step and learning rate of the first loss that was not finite, kept on the device until someone looks.
        self.first_non_finite = torch.tensor(
            [-1.0, 0.0],
            device=self.args.device,
            dtype=torch.float64 if self.args.device.type == "cpu" else torch.float32,
        )
        self.add_callback(NonFiniteGuard(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        now = self.first_non_finite.new_tensor([self.state.global_step + 1, self._get_learning_rate()])
        is_first = ~loss.detach().isfinite().all() & (self.first_non_finite[0] < 0)
        self.first_non_finite = torch.where(is_first, now, self.first_non_finite)
        return loss

    def create_model_card(self, **kwargs):
        """Called by `push_to_hub`, where transformers would write a card of its own."""
        if self.card is not None:
            self.card()


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
    note = {**note, "run": record(run), "baseline": None}
    if baseline is not None:
        arguments = copy.copy(run.training)
        arguments.output_dir, arguments.push_to_hub = str(folder / baseline.residual_scheme), False
        train(model_class, baseline, arguments, **trainer_options)
        note["baseline"] = Path(arguments.output_dir)

    trainer = train(model_class, run.config, run.training, card=lambda: write_card(folder, note), **trainer_options)
    if trainer.is_world_process_zero():
        batches = itertools.islice(trainer.get_eval_dataloader(), DEPTH_WEIGHT_BATCHES)
        weights = measure_depth_weights(
            trainer.accelerator.unwrap_model(trainer.model), (trainer._prepare_inputs(batch) for batch in batches)
        )
        (folder / DEPTH_WEIGHTS_DATA).write_text(json.dumps(weights, indent=1), encoding="utf-8")
        write_card(folder, note)
    if run.training.push_to_hub:
        with hub_errors():
            trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"\nThe run is complete: {folder} (model card: {folder / 'README.md'})")


def train(
    model_class: type[PreTrainedModel], config: DCAConfig, arguments: RunArguments, card=None, **trainer_options
) -> RunTrainer:
    """Train one model, from where it was left if `resume_from_checkpoint` is set, and save and evaluate it."""
    folder = Path(arguments.output_dir)
    set_seed(arguments.seed)
    model = model_class(config)
    try:
        with hub_errors() if arguments.push_to_hub else contextlib.nullcontext():
            trainer = RunTrainer(model=model, args=arguments, card=card, **trainer_options)
    except (ValueError, ImportError) as error:
        raise UserError(innermost_message(error)) from error
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint == LAST:
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if trainer.args.should_save:
        # There from the start, so that what is pushed while training can be loaded, too.
        folder.mkdir(parents=True, exist_ok=True)
        custom_object_save(model, folder)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = {**result.metrics, **trainer.evaluate()}
    trainer.log_metrics(config.residual_scheme, metrics)
    trainer.save_metrics("all", metrics, combined=False)
    return trainer


@contextlib.contextmanager
def hub_errors():
    """What goes wrong in a push becomes a sentence for the user."""
    try:
        yield
    except (HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OSError, RuntimeError) as error:
        raise hub_error(error) from error
