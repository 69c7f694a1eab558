"""One run from start to end: its models, their training, and its output."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_utils import speed_metrics
from transformers.utils import is_torch_xla_available

from modeling_dca import DCABaseConfig
from training.results.card import DEPTH_WEIGHTS_DATA, scheme_name, write_card
from training.results.depth_weights import measure_depth_weights
from training.results.record import DIVERGED
from training.results.summary import summarize_run
from training.run.checkpoints import checkpoint_to_resume, told_if_not_written
from training.run.checks import check_model, check_optimizer, check_trainer, check_variant, config_of_baseline
from training.run.fields import Run, RunArguments
from training.run.folder import check_output_folder
from training.run.initial import initial_model
from training.run.parallel import check_divided, divide
from training.run.trainer import RunTrainer
from training.run.tuning import check_tuning, tune
from training.support.errors import UserError, innermost_message
from training.support.files import read_json
from training.variants.registry import VARIANTS


if is_torch_xla_available():
    import torch_xla

# The number of held-out batches to average the gates over.
DEPTH_WEIGHT_BATCHES = 16


def run_models(
    run: Run,
    model_class: type[PreTrainedModel],
    baseline: DCABaseConfig | None,
    note: dict,
    sample: Callable[[type[PreTrainedModel], Path], str] | None = None,
    **trainer_options,
) -> None:
    """
    Train the baseline of a run, if any, and its model on the same batches, and complete the folder of the run: weights,
    configuration, code, processor, results, logs, and the model card with its pictures.

    Args:
        note: what the model card says about task and data, see `write_card`.
        sample: generates the text that is printed at the end, from the class of a model and its folder.
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
        # From the saved weights, which are whole even if the trainer has sharded the model.
        model = model_class.from_pretrained(folder).to(run.training.device)
        weights = measure_depth_weights(model, held_out_batches(trainer))
        (folder / DEPTH_WEIGHTS_DATA).write_text(json.dumps(weights, indent=1), encoding="utf-8")
        write_card(folder, run, note)
        models = {scheme_name(each): each for each in filter(None, (folder, note["baseline"]))}
        samples = {name: sample(model_class, each) for name, each in models.items()} if sample else {}
    if run.training.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"\n{summarize_run(models, note['task'], note.get('prompt'), samples)}")


def check_before_data(
    run: Run, model_class: type[PreTrainedModel], block_size: int | None = None
) -> tuple[DCABaseConfig | None, type[PreTrainedModel], list[TrainerCallback]]:
    """
    Check all of a run that does not depend on its data, before anything is done for it.

    Args:
        block_size: the number of tokens of an example, `None` for images.

    Returns:
        The configuration of the baseline, or `None`; the class of the model to train; and the callbacks of its variant.
    """
    baseline = config_of_baseline(run)
    check_variant(run)
    check_tuning(run)
    model_class, callbacks = model_and_callbacks(run, model_class)
    check_model(model_class, run.config, run.training.device)
    check_divided(run.config, run.training.tp_size, block_size)
    check_optimizer(run.training)
    check_trainer(run.training)
    check_output_folder(run.training)
    return baseline, model_class, callbacks


def model_and_callbacks(
    run: Run, model_class: type[PreTrainedModel]
) -> tuple[type[PreTrainedModel], list[TrainerCallback]]:
    """The class of the model that a run trains, and the callbacks of its variant, if any."""
    if run.training.variant is None:
        return model_class, []
    variant = VARIANTS[run.training.variant]
    return variant.model(model_class), list(variant.callbacks)


def held_out_batches(trainer: RunTrainer) -> Iterator[dict[str, torch.Tensor]]:
    """The first held-out batches, whole, on the calling process."""
    size = trainer.args.per_device_eval_batch_size
    examples = trainer.eval_dataset.select(range(min(size * DEPTH_WEIGHT_BATCHES, len(trainer.eval_dataset))))
    for batch in DataLoader(examples, batch_size=size, collate_fn=trainer.data_collator):
        yield {name: values.to(trainer.args.device) for name, values in batch.items()}
        if trainer.args.device.type == "xla":
            torch_xla.sync()  # instead of one graph of all batches


def mean_logged_loss(log_history: list[dict]) -> float:
    """The mean over all steps. Each entry of the log holds the mean since the previous one."""
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log_history if "loss" in entry))
    return sum((step - before) * loss for before, step, loss in zip((0, *steps), steps, losses)) / steps[-1]


def figures_of_the_past(trainer: RunTrainer) -> dict[str, float]:
    """The results of a training that had ended before this process started, from its logs and counts."""
    steps = trainer.state.global_step
    figures = {"train_loss": mean_logged_loss(trainer.state.log_history)}
    measured = trainer.throughput.measured(trainer.args.world_size, since_last_log=False)
    if measured:
        examples = steps * trainer.get_total_train_batch_size(trainer.args)
        figures |= speed_metrics("train", time.time() - trainer.throughput.seconds, examples, steps)
        figures |= {f"train_{name}": value for name, value in measured.items()}
    return figures


def train(
    model_class: type[PreTrainedModel],
    config: DCABaseConfig,
    arguments: RunArguments,
    initial_checkpoint: str | None = None,
    **trainer_options,
) -> RunTrainer:
    """Train one model, from its checkpoint if `resume_from_checkpoint` is set, and save and evaluate it."""
    folder = Path(arguments.output_dir)
    set_seed(arguments.seed)
    model = divide(initial_model(model_class, config, initial_checkpoint), arguments)
    adapters = tune(model, arguments)
    try:
        trainer = RunTrainer(model=model, args=arguments, **trainer_options)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(innermost_message(error)) from error
    checkpoint = checkpoint_to_resume(folder, arguments.resume_from_checkpoint)
    first_step = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    with told_if_not_written("The logs or results", folder, only_if_full=True):
        if arguments.should_save:
            (folder / DIVERGED).unlink(missing_ok=True)
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if result.global_step > first_step:
            trainer.save_metrics("train", result.metrics)
        elif not (folder / "train_results.json").exists():
            # It ended between its last checkpoint and its results. (Existing results are kept.)
            trainer.save_metrics("train", figures_of_the_past(trainer))
        if adapters is not None:
            adapters.merge_and_unload()
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate()
        trainer.log_metrics(config.residual_scheme, metrics)
        trainer.save_metrics("eval", metrics)
    return trainer
