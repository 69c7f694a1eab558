"""The checks before a run starts, so that it does not fail after the training."""

import copy
from pathlib import Path

import torch
import torch.utils.checkpoint
from accelerate.utils import TorchDynamoPlugin
from transformers import PreTrainedModel, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from modeling_dca import DCABaseConfig
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES, nearest_name
from modeling_dca.grn import find_implementation
from training.results.hub import check_target
from training.run.fields import Run, RunArguments, check_one_gpu
from training.run.initial import check_scheme
from training.run.parallel import uses_fsdp
from training.run.trainer import RunTrainer
from training.support.errors import UserError, innermost_message
from training.variants.registry import VARIANTS


def check_model(model_class: type[PreTrainedModel], config: DCABaseConfig, device: torch.device | None = None) -> None:
    """
    Check that a model can be built, without allocating its weights, and that `device`, if given, can run it.

    Raises:
        [`UserError`]: it cannot, for example because the implementation is unknown or rotary positions lack a parameter.
    """
    try:
        with torch.device("meta"):
            model_class(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The model cannot be built: {type(error).__name__}: {innermost_message(error)}") from error
    obstacle = device and getattr(find_implementation(config.grn_implementation, device), "obstacle", None)
    if obstacle and (reason := obstacle(device)):
        raise UserError(
            f"`grn_implementation` is {config.grn_implementation!r}, which cannot run here ({reason}): leave it out to use the "
            "best one that can."
        )


def check_optimizer(arguments: RunArguments) -> None:
    """
    Check that the optimizer and the learning rate schedule can be created, with a model of one weight.

    Raises:
        [`UserError`]: a package is missing, or `optim_args` or `lr_scheduler_kwargs` has an invalid argument.
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
        num_steps = max(arguments.max_steps, 1)  # without `max_steps`, the number depends on the data
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
            f"`{named[0]}` is {kind.value!r}, with {options!r} as `{named[1]}`, which cannot be created: "
            f"{innermost_message(error)}"
        ) from error


def check_trainer(arguments: RunArguments) -> None:
    """
    Check that the Trainer supports the arguments on the available devices.

    Raises:
        [`UserError`]: it does not, or the combination is not tested here.
    """
    check_one_gpu(arguments)
    if arguments.fsdp and arguments.world_size == 1:
        raise UserError("`fsdp` is set, but there is only one process: start several with `accelerate launch`.")
    if arguments.auto_find_batch_size:
        if arguments.world_size > 1 or uses_fsdp(arguments):
            raise UserError(
                "`auto_find_batch_size` is for one process, as each of several would find its own size: leave it out, and set "
                "`per_device_train_batch_size`."
            )
        if arguments.baseline not in (None, "none") and arguments.global_batch_size is None:
            raise UserError(
                "`auto_find_batch_size` may find another batch size for the `baseline` than for the model: set "
                "`global_batch_size`, too."
            )
    _check_checkpointing(arguments)
    if arguments.torch_compile:
        backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
        try:
            TorchDynamoPlugin(backend=backend)
            torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"`torch_compile_backend` is {backend!r}, with {mode!r} as `torch_compile_mode`, which is not available: "
                f"{innermost_message(error)}"
            ) from error
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"`report_to` is {arguments.report_to}, which is not available: {innermost_message(error)}"
        ) from error


def _check_checkpointing(arguments: RunArguments) -> None:
    """Try activation checkpointing once, with the arguments of the run."""
    # The name of the field, and its name in older releases.
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    name = next(name for name in names if hasattr(arguments, name))
    options = dict(arguments.gradient_checkpointing_kwargs or {}) if arguments.gradient_checkpointing else {}
    if name == names[0]:
        every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        if type(every) is not int or every < 1:
            raise UserError(f"`{name}` has {every!r} as `every_n_layers`; it must be at least 1.")
        if offload and arguments.device.type == "cpu":
            raise UserError(f"`{name}` has `offload`, but there is no device other than the CPU: leave it out.")
    try:
        value = torch.ones(1, requires_grad=True)
        torch.utils.checkpoint.checkpoint(torch.square, value, **{"use_reentrant": False, **options}).backward()
    except (TypeError, ValueError) as error:
        raise UserError(f"`{name}` is {options}, which is invalid: {innermost_message(error)}") from error


def check_variant(run: Run) -> None:
    """
    Raises:
        [`UserError`]: the variant does not apply to the run's residual scheme, baseline or initial checkpoint, or would be
            published.
    """
    if run.training.variant is None:
        return
    altered, scheme = f"`variant` is {run.training.variant!r}", VARIANTS[run.training.variant].scheme
    if scheme is not None and run.config.residual_scheme != "standard":
        raise UserError(
            f"{altered}, itself a residual scheme, but `residual_scheme` is {run.config.residual_scheme!r}: leave that out, or "
            "choose 'standard'."
        )
    if scheme is None and run.config.residual_scheme == "standard":
        raise UserError(
            f"{altered}, but the 'standard' scheme has nothing to alter: choose another `residual_scheme`."
        )
    if run.training.baseline not in (None, "none"):
        raise UserError(
            f"{altered}, which would apply to the `baseline`, too: leave `baseline` out, and train it separately."
        )
    if run.initial_checkpoint is not None:
        raise UserError(f"{altered}, which is for models with random initial weights: leave `initial_checkpoint` out.")
    if run.training.push_to_hub:
        raise UserError(f"{altered}, whose models are for studies and not for use: leave `push_to_hub` out.")


def check_best_metric(arguments: RunArguments, figures: list[str]) -> None:
    """
    Raises:
        [`UserError`]: `metric_for_best_model` is not measured.

    Args:
        figures: the names of the values that `metrics` of the run give.
    """
    name = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if name in arguments.held_out_metrics:
        return
    if name not in figures:
        known = nearest_name(name, [*arguments.held_out_metrics, *figures])
        raise UserError(f"`metric_for_best_model` is {arguments.metric_for_best_model!r}; {known}")


def check_batches(arguments: RunArguments, num_examples: int) -> None:
    """
    Raises:
        [`UserError`]: `dataloader_drop_last` would drop all training examples.
    """
    batch = arguments.per_device_train_batch_size * arguments.data_parallel_size
    if arguments.dataloader_drop_last and arguments.global_batch_size is None and num_examples < batch:
        raise UserError(
            f"`dataloader_drop_last` is set, but there are only {num_examples:,} training examples for a batch of {batch:,}: "
            "leave it out, or lower `per_device_train_batch_size`."
        )


def check_hub(arguments: RunArguments) -> None:
    """
    Check that a run can be published, and create the repository, before the run starts.

    Raises:
        [`UserError`]: the Hub cannot be reached, or would refuse the run.
    """
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if getattr(arguments, name, None) and "trackio" not in arguments.report_to:
            raise UserError(
                f"`{name}` is {getattr(arguments, name)!r}, but `report_to` does not name 'trackio': add it, or leave "
                f"`{name}` out."
            )
    if arguments.push_to_hub and arguments.should_save:
        repo_id = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        # (With the full name, the trainer does not ask the Hub again.)
        arguments.hub_model_id = check_target(repo_id, arguments.hub_private_repo, arguments.hub_revision)


def config_of_baseline(run: Run) -> DCABaseConfig | None:
    """The configuration of the baseline: the run's, except for the residual scheme. `None` without a baseline."""
    scheme = run.training.baseline
    if scheme in (None, "none"):
        return None
    if scheme not in RESIDUAL_SCHEMES:
        raise UserError(f"`baseline` is {scheme!r}; {nearest_name(scheme, RESIDUAL_SCHEMES)}")
    if scheme == run.config.residual_scheme:
        raise UserError(f"`baseline` is {scheme!r}, which is the run's own `residual_scheme`: choose another.")
    config = copy.deepcopy(run.config)
    config.residual_scheme = scheme
    if scheme == "standard":
        config.last_k = None
    check_scheme(config, run.initial_checkpoint)
    return config
