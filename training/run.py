"""What the training commands share: the folder of a run, its trainer, and its results."""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.utils.checkpoint
import yaml
from accelerate.utils import TorchDynamoPlugin
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_scheduler, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import speed_metrics
from transformers.utils import is_torch_xla_available

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES, nearest_name
from modeling_dca.grn import find_implementation
from training.arguments import DIVERGED, LAST, RECORD, Run, RunArguments, check_one_gpu, read_record
from training.card import DEPTH_WEIGHTS_DATA, read_json, write_card
from training.checkpoints import (
    MANIFEST,
    check_checkpoint,
    check_sharding,
    check_state,
    checkpoint_to_resume,
    told_if_not_written,
    write_whole,
)
from training.depth_weights import measure_depth_weights
from training.errors import UserError, innermost_message
from training.initial import check_scheme, initial_model
from training.publish import check_target
from training.trainer import RunTrainer, uses_fsdp


if is_torch_xla_available():
    import torch_xla


# Fields that a run which is resumed has from its checkpoint, or, with others, cannot take from there.
OF_THE_OPTIMIZER = (
    *("learning_rate", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
)

# How many held-out batches tell the mean gates.
DEPTH_WEIGHT_BATCHES = 16


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
                if arguments.should_save:  # one process reads all of it
                    check_checkpoint(resumed)
                check_state(resumed)
                check_sharding(resumed, uses_fsdp(arguments))
                check_gates(resumed)
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


def check_gates(checkpoint: Path) -> None:
    """
    Raises:
        [`UserError`]: the checkpoint has gates of release 0.1, which would go on as another model.
    """
    file = checkpoint / "config.json"
    config = read_json(file) if file.exists() else {}
    scheme = RESIDUAL_SCHEMES.get(config.get("residual_scheme"))
    if scheme is not None and scheme.gated and "gate_norm" not in config:
        raise UserError(
            f"{checkpoint} is of a run with modeling-dca 0.1, whose gates saw entries as they are: go on with that release, "
            "or pass --overwrite to start again."
        )


def check_model(model_class: type[PreTrainedModel], config: DCAConfig, device: torch.device | None = None) -> None:
    """
    See that a model can be built, without the memory for its weights, and, if given, computed on `device`.

    Raises:
        [`UserError`]: it cannot: with an unknown implementation, say, or rotary positions that lack a parameter.
    """
    try:
        with torch.device("meta"):
            model_class(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The model cannot be built: {type(error).__name__}: {innermost_message(error)}") from error
    obstacle = device and getattr(find_implementation(config.grn_implementation, device), "obstacle", None)
    if obstacle and (reason := obstacle(device)):
        raise UserError(
            f"`grn_implementation` is {config.grn_implementation!r}, which cannot run ({reason}): leave it out for the best "
            "that can."
        )


def check_optimizer(arguments: RunArguments) -> None:
    """
    See that the optimizer and the learning rate schedule can be had, with a model of one weight.

    Raises:
        [`UserError`]: a package is missing, or one of them does not take what `optim_args` or `lr_scheduler_kwargs` says.
    """
    model = torch.nn.Linear(1, 1, bias=False)
    named = ("optim", "optim_args")
    try:
        optimizer_class, options = RunTrainer.get_optimizer_cls_and_kwargs(arguments, model)
        if arguments.optim_args:
            plain = copy.copy(arguments)
            plain.optim_args = None
            if RunTrainer.get_optimizer_cls_and_kwargs(plain, model) == (optimizer_class, options):
                raise ValueError("it takes no `optim_args`, leave them out.")
        if isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer):
            optimizer_class(model.parameters(), **options)
        named = ("lr_scheduler_type", "lr_scheduler_kwargs")
        num_steps = max(arguments.max_steps, 1)  # without `max_steps` they are not known before the data is
        num_warmup_steps = arguments.get_warmup_steps(num_steps)
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD(model.parameters(), lr=arguments.learning_rate),
            num_warmup_steps,
            num_steps,
            arguments.lr_scheduler_kwargs,
        )
        for factor in getattr(scheduler, "lr_lambdas", []):
            factor(num_warmup_steps + 1)
    except (ArithmeticError, ImportError, TypeError, ValueError) as error:
        kind, options = (getattr(arguments, name) for name in named)
        raise UserError(
            f"`{named[0]}` is {kind.value!r}, with {options!r} as `{named[1]}`, which cannot be had: "
            f"{innermost_message(error)}"
        ) from error


def check_trainer(arguments: RunArguments) -> None:
    """
    See that the Trainer can do what it is asked for, on the devices that there are.

    Raises:
        [`UserError`]: it cannot, or what it would do then is not tested here.
    """
    check_one_gpu(arguments)
    if arguments.fsdp and arguments.world_size == 1:
        raise UserError("`fsdp` is set, but there is one process alone: start several with `accelerate launch`.")
    if arguments.auto_find_batch_size:
        if arguments.world_size > 1 or uses_fsdp(arguments):
            raise UserError(
                "`auto_find_batch_size` is for one process: each of several would find its own. Leave it out, and set "
                "`per_device_train_batch_size`."
            )
        if arguments.baseline not in (None, "none") and arguments.global_batch_size is None:
            raise UserError(
                "`auto_find_batch_size` may find other batches for the `baseline` than for the model: set `global_batch_size`, "
                "too."
            )
    _check_checkpointing(arguments)
    if arguments.torch_compile:
        backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
        try:
            TorchDynamoPlugin(backend=backend)
            torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"`torch_compile_backend` is {backend!r}, with {mode!r} as `torch_compile_mode`, which cannot be had: "
                f"{innermost_message(error)}"
            ) from error
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"`report_to` is {arguments.report_to}, which cannot be had: {innermost_message(error)}"
        ) from error


def _check_checkpointing(arguments: RunArguments) -> None:
    """Have what is to be recomputed for the backward pass recomputed once."""
    # Its name, and the one that it has in older releases.
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    name = next(name for name in names if hasattr(arguments, name))
    options = dict(arguments.gradient_checkpointing_kwargs or {}) if arguments.gradient_checkpointing else {}
    if name == names[0]:
        every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        if type(every) is not int or every < 1:
            raise UserError(f"`{name}` has {every!r} as `every_n_layers`; it must be at least 1.")
        if offload and arguments.device.type == "cpu":
            raise UserError(f"`{name}` has `offload`, but there is no device beside the CPU: leave it out.")
    try:
        value = torch.ones(1, requires_grad=True)
        torch.utils.checkpoint.checkpoint(torch.square, value, **{"use_reentrant": False, **options}).backward()
    except (TypeError, ValueError) as error:
        raise UserError(f"`{name}` is {options}, which cannot be: {innermost_message(error)}") from error


def check_batches(arguments: RunArguments, num_examples: int) -> None:
    """
    Raises:
        [`UserError`]: `dataloader_drop_last` would leave nothing of the examples to train on.
    """
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and arguments.global_batch_size is None and num_examples < batch:
        raise UserError(
            f"`dataloader_drop_last` is set, but there are {num_examples:,} examples to train on, and a batch has {batch:,}: "
            "leave it out, or lower `per_device_train_batch_size`."
        )


def check_hub(arguments: RunArguments) -> None:
    """
    See that a run can be published, and create the repository, before anything else is done for the run.

    Raises:
        [`UserError`]: the Hub cannot be reached, or the run could not be published there as it is to be.
    """
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if getattr(arguments, name, None) and "trackio" not in arguments.report_to:
            raise UserError(
                f"`{name}` is {getattr(arguments, name)!r}, but `report_to` does not name 'trackio': add it, or leave "
                f"`{name}` out."
            )
    if arguments.push_to_hub and arguments.should_save:
        repo_id = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        # (With its whole name, which the trainer would ask for once more.)
        arguments.hub_model_id = check_target(repo_id, arguments.hub_private_repo, arguments.hub_revision)


def make_output_folder(run: Run) -> None:
    """Make the folder of a run, which `check_output_folder` has seen, with a record of what was asked for."""
    folder = Path(run.training.output_dir)
    record = folder / RECORD
    if run.training.resume_from_checkpoint is not None:
        before = read_record(record)
        if before is None:
            raise UserError(f"{record} is damaged: name another `output_dir`, or pass --overwrite to start again.")
        if "split_seed" in run.named["data"]:  # which was the run's seed before it had one of its own
            before["data"].setdefault("split_seed", before["training"].get("seed", 42))
        for section in ("model", "data"):
            if before[section] != run.named[section]:
                raise UserError(
                    f"The run in {folder} was started with other `{section}` fields ({record}): resume it with those, or "
                    "name another `output_dir`."
                )
        defaults = {field.name: field.default for field in dataclasses.fields(run.training)}
        for name in OF_THE_OPTIMIZER:
            was, now = (named["training"].get(name, defaults[name]) for named in (before, run.named))
            if was != now:
                raise UserError(
                    f"The run in {folder} was started with {was!r} as `{name}`, not {now!r}, and its checkpoints hold that: "
                    "resume it so, or name another `output_dir`."
                )
    try:
        if run.training.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").unlink(missing_ok=True)  # A card says that the run is finished, and with what figures.
        write_whole(record, yaml.safe_dump(run.named, sort_keys=False))
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error


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


def figures_of_the_past(trainer: RunTrainer) -> dict[str, float]:
    """What the training of a run had come to that was over before this sitting, by what was logged and counted in it."""
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
        if arguments.should_save:
            (folder / DIVERGED).unlink(missing_ok=True)
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if result.global_step > first_step:
            trainer.save_metrics("train", result.metrics)
        elif not (folder / "train_results.json").exists():
            # It ended between its last checkpoint and its figures. (Those that there are stay as they are.)
            trainer.save_metrics("train", figures_of_the_past(trainer))
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate()
        trainer.log_metrics(config.residual_scheme, metrics)
        trainer.save_metrics("eval", metrics)
    return trainer
