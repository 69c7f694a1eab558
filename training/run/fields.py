"""The fields of the section `training`, and a run as the user requested it."""

import contextlib
import dataclasses
import math
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from accelerate.utils import GradientAccumulationPlugin
from transformers import SchedulerType, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.training_args import OptimizerNames

from modeling_dca import DCABaseConfig
from modeling_dca.configuration_dca import nearest_name
from training.run.parallel import check_launcher, check_tensor_parallelism, processes_per_batch, uses_fsdp
from training.support.errors import UserError
from training.support.files import load_yaml
from training.variants.registry import VARIANTS


# `resume_from_checkpoint` without a path, and where one command starts a run or resumes it.
LAST, AUTO = "last", "auto"

# The ranges of fields that the Trainer checks too late, or never.
BOUNDS = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "global_batch_size": (1, math.inf),
    "lora_rank": (1, math.inf),
    "tp_size": (1, math.inf),
    "fsdp_size": (1, math.inf),
    "dp_replicate_size": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "ddp_bucket_cap_mb": (1, math.inf),
    "ddp_timeout": (1, 10**9),  # seconds: more than 30 years, and less than a date can hold
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "eval_delay": (0, math.inf),
    # The range of NumPy.
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}

# Intervals, in steps or as a share of all steps, and the strategies that use them.
INTERVALS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}

# Fields that support a single value: with any other, the Trainer would fail after the training, or ignore the field.
FIXED = {
    "prediction_loss_only": (False, "a run reports more than its loss"),
    "eval_do_concat_batches": (True, "a run computes its metrics over all held-out data"),
    "batch_eval_metrics": (False, "a run computes its metrics over all held-out data"),
    "include_for_metrics": ([], "the metrics of a run need nothing else"),
    "label_names": (None, "all models that are trained here use the same names"),
    "length_column_name": ("length", "all examples have the same length"),
    "use_liger_kernel": (False, "Liger has no kernels for these models"),
    "liger_kernel_config": (None, "Liger has no kernels for these models"),
    "deepspeed": (None, "the files in configuration/accelerate distribute a run over devices"),
    "parallelism_config": (None, "the files in configuration/accelerate distribute a run over devices"),
    "save_on_each_node": (False, "all machines share the folder of a run"),
    "enable_jit_checkpoint": (False, "a run always writes a checkpoint at SIGTERM"),
    "use_cache": (False, "training generates no text, and needs no cache"),
    "do_predict": (False, "a run has nothing to predict"),
    "restore_callback_states_from_checkpoint": (False, "a run always restores what it needs"),
}


def check_one_gpu(arguments: TrainingArguments) -> None:
    """
    Raises:
        [`UserError`]: one process has several GPUs, which the Trainer would use with `DataParallel`. That is not tested here.
    """
    if arguments.n_gpu > 1:
        line = shlex.join(["-m", f"training.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        raise UserError(
            f"There are {arguments.n_gpu} GPUs, and each needs its own process: `accelerate launch --config_file "
            f"configuration/accelerate/ddp.yaml --num_processes {arguments.n_gpu} {line}`; or use a single GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def with_default(name: str, default: Any) -> Any:
    """A field of [`~transformers.TrainingArguments`] with another default, and the same help."""
    return dataclasses.field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclasses.dataclass
class RunArguments(TrainingArguments):
    """The fields of [`~transformers.TrainingArguments`], and those that every run of this project has."""

    #: The metrics of held-out data, and whether greater is better.
    held_out_metrics: ClassVar[dict[str, bool]] = {"loss": False}

    baseline: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A second residual scheme to train on the same batches for comparison, such as 'standard', or 'none'."
        },
    )
    variant: str | None = dataclasses.field(
        default=None,
        metadata={"help": f"Train a variant for a study instead of DCA, not a model for use: {', '.join(VARIANTS)}."},
    )
    # (The parser sees a string; it becomes a dictionary of settings.)
    variant_fields: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The settings of the `variant`, if it has any, such as '{n: 2}'; see `training/variants/`."},
    )
    freeze_backbone: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Train only what DCA adds to the `initial_checkpoint` (`delta` and `gate`), and the head of a classifier."
        },
    )
    lora_rank: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Train only LoRA adapters of this rank (needs peft) on all projections of the blocks of the "
            "`initial_checkpoint`, and the head of a classifier. The adapters are merged into the weights at the end."
        },
    )
    metrics: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Additional metrics of `evaluate`: names on the Hub ('f1'), or paths ('./my_metric'). Predictions and "
            "references are classes, or the next tokens of a text."
        },
    )
    global_batch_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The number of examples in a training step over all devices, from which `gradient_accumulation_steps` "
            "follows. The last step of an epoch is filled up with examples drawn again."
        },
    )
    tp_size: int = dataclasses.field(
        default=1,
        metadata={
            "help": "Tensor parallelism: the number of devices that each weight of attention and MLP is divided over. These "
            "devices train on the same examples. Launch with ddp.yaml or torchrun."
        },
    )
    fsdp_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "With `tp_size`: the number of devices that the weights are also sharded over; by default all that remain."
        },
    )
    dp_replicate_size: int = dataclasses.field(
        default=1,
        metadata={"help": "With `tp_size`: the number of replicas of the model, for example the number of machines."},
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "Delete the earlier run in `output_dir`, and start again."}
    )
    push_to_hub: bool = dataclasses.field(
        default=False, metadata={"help": "Publish the run on the Hub when it is complete, as `training.publish` does."}
    )
    hub_strategy: str = dataclasses.field(
        default="end", metadata={"help": "When to push to the Hub: only 'end', when the run is complete."}
    )
    model_license: str = dataclasses.field(
        default="apache-2.0", metadata={"help": "The license that the model card states for the weights."}
    )
    optim: OptimizerNames | None = dataclasses.field(
        default=None,
        metadata={
            "help": f"The optimizer; by default 'adamw_torch' on an XLA device, and {TrainingArguments.default_optim!r} "
            "elsewhere."
        },
    )
    # Every loss depends on every weight.
    ddp_find_unused_parameters: bool = dataclasses.field(
        default=False,
        metadata={"help": "On several devices, search every step for weights that the loss does not depend on."},
    )
    # A loss that is not finite must be visible, not replaced by the last finite one.
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "Whether to leave NaN and infinite losses out of the logs."}
    )
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where to log: integrations of the Trainer, 'all' that are installed, or 'none'."},
    )
    # (The parser would take a field that is a string or a boolean for a boolean.)
    include_num_input_tokens_seen: str = dataclasses.field(
        default="no",
        metadata={"help": "Which of the training tokens to count: 'all', 'non_padding' or 'no'."},
    )

    def __post_init__(self):
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"`variant` is {self.variant!r}; {nearest_name(self.variant, VARIANTS)}")
        self._set_variant_fields()
        self._check_values()
        self._set_words()
        self._set_metric()
        chosen_optimizer = self.optim
        if chosen_optimizer is None:
            self.optim = self.default_optim
        super().__post_init__()
        check_tensor_parallelism(self)
        check_launcher(self.world_size, self.device, uses_fsdp(self))
        accumulation = self.accelerator_config.gradient_accumulation_kwargs or {}
        GradientAccumulationPlugin(**accumulation)  # validates its fields
        if "num_steps" in accumulation:
            raise ValueError(
                "`accelerator_config` has `num_steps`: leave it out, and set `gradient_accumulation_steps`."
            )
        if self.global_batch_size is not None and self.accelerator_config.split_batches:
            raise ValueError(
                "`accelerator_config` has `split_batches`, but `global_batch_size` is set: leave one out."
            )
        if self.device.type == "cpu" and self.fp16:
            raise ValueError("`fp16` is for GPUs: leave it out on a CPU, or choose `bf16`.")
        if DebugOption.TPU_METRICS_DEBUG in self.debug and self.device.type != "xla":
            raise ValueError(f"`debug` is {DebugOption.TPU_METRICS_DEBUG.value!r}, but there is no TPU: leave it out.")
        if self.greater_is_better and self.lr_scheduler_type in (
            SchedulerType.REDUCE_ON_PLATEAU,
            SchedulerType.GREEDY,
        ):
            # (By default the schedule takes a rising metric for one that does not improve.)
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.device.type == "xla":
            self._set_xla_defaults(chosen_optimizer)
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(f"`hub_strategy` is {str(self.hub_strategy.value)!r}; only 'end' is supported.")
        if self.global_batch_size is not None:
            self._set_gradient_accumulation_steps()

    @property
    def data_parallel_size(self) -> int:
        """The number of processes, or groups of processes, with their own examples."""
        return self.world_size // processes_per_batch(self.tp_size)

    @property
    def data_parallel_index(self) -> int:
        """The index of this process, or of its group, among them."""
        return self.process_index // processes_per_batch(self.tp_size)

    @property
    def is_first_of_batch(self) -> bool:
        """Whether this process is the first of those that compute the same examples."""
        return self.process_index % processes_per_batch(self.tp_size) == 0

    def _check_values(self):
        """
        Raises:
            `ValueError`: a field has a value with which the Trainer would fail later, or silently do something else.
        """
        for name, (smallest, largest) in BOUNDS.items():
            value = getattr(self, name)
            # (This comparison is also false for NaN.)
            if value is not None and not (smallest <= value <= largest and value < math.inf):
                limit = "finite" if largest == math.inf else f"at most {largest}"
                raise ValueError(f"`{name}` is {value}; it must be at least {smallest}, and {limit}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 0 and below 1.")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"`max_grad_norm` is {self.max_grad_norm}; it must be at least 0.")
        for name, strategy in INTERVALS.items():
            value = getattr(self, name)
            if getattr(self, strategy) == "steps" and value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"`{name}` is {value}; it must be a number of steps, or a share of all steps below 1."
                )
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps}; it must be a whole number of steps, or a share of all below 1."
            )
        if self.max_steps == 0:
            raise ValueError("`max_steps` is 0; it must be at least 1, or -1 for the steps of `num_train_epochs`.")
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}; it must be above 0, and finite.")
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; leave it out: {reason}.")
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but `dataloader_num_workers` is 0: set that, too."
                )
        if self.optim_target_modules is not None and not any(name in str(self.optim) for name in ("galore", "apollo")):
            raise ValueError(
                f"`optim_target_modules` is {self.optim_target_modules!r}, which only GaLore and APOLLO support: leave it out, "
                "or choose such an `optim`."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but all examples have the same length: choose "
                "'random' or 'sequential'."
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "`save_strategy` is 'best', but nothing is evaluated to find it: set `eval_strategy`, too."
            )

    def _set_variant_fields(self):
        """Parse and check the settings of the variant."""
        fields = self.variant_fields
        if isinstance(fields, str):
            with contextlib.suppress(yaml.YAMLError):  # (reported below)
                fields = load_yaml(fields)
        if fields is None:
            return
        if self.variant is None:
            raise ValueError(f"`variant_fields` is {fields!r}, but `variant` is not set: set it, or leave this out.")
        if not isinstance(fields, dict):
            raise ValueError(f"`variant_fields` is {fields!r}; it must map settings to values, such as '{{n: 2}}'.")
        VARIANTS[self.variant].settings(fields)
        self.variant_fields = fields

    def _set_words(self):
        """Convert fields that are strings, or lists of strings, to what the Trainer takes."""
        self.report_to = (
            [self.report_to] if isinstance(self.report_to, str) else list(dict.fromkeys(self.report_to or []))
        )
        self.fsdp = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        for alone in {"all", "none"}.intersection(self.report_to):
            if len(self.report_to) > 1:
                raise ValueError(
                    f"`report_to` is {self.report_to}, but {alone!r} excludes the others: leave it, or them, out."
                )
        counted = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(counted, counted)
        if self.include_num_input_tokens_seen not in ("all", "non_padding", "no"):
            raise ValueError(
                f"`include_num_input_tokens_seen` is {counted!r}; it must be one of 'all', 'non_padding' and 'no'."
            )

    def _set_metric(self):
        """Check the metric that selects the best model, and set whether greater is better."""
        if self.metric_for_best_model is None:
            return
        name = self.metric_for_best_model.removeprefix("eval_")
        if self.metrics and name not in self.held_out_metrics:
            return  # one of `metrics` may give it
        if name not in self.held_out_metrics:
            raise ValueError(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}; {nearest_name(name, self.held_out_metrics)}"
            )
        if self.greater_is_better is None:
            self.greater_is_better = self.held_out_metrics[name]

    def _set_xla_defaults(self, chosen_optimizer: OptimizerNames | None):
        if chosen_optimizer is None:
            self.optim = OptimizerNames.ADAMW_TORCH
        elif self.optim == OptimizerNames.ADAMW_TORCH_FUSED:
            raise ValueError(
                f"`optim` is {self.optim.value!r}, which XLA devices do not support: leave it out, or use 'adamw_torch'."
            )
        if self.eval_accumulation_steps is None:
            # On the device, the results so far would grow with each batch, and each size would need its own graph.
            self.eval_accumulation_steps = 1

    def _set_gradient_accumulation_steps(self):
        at_once = self.per_device_train_batch_size * self.data_parallel_size
        steps, rest = divmod(self.global_batch_size, at_once)
        together = self.world_size // self.data_parallel_size
        if rest:
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, but must be a multiple of {at_once}: "
                f"`per_device_train_batch_size` is {self.per_device_train_batch_size}, and the number of devices "
                f"{self.world_size}" + (f", {together} of which compute each batch together." if together > 1 else ".")
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but `global_batch_size` = "
                f"{self.global_batch_size} makes it {steps}: leave one of them out."
            )
        self.gradient_accumulation_steps = steps


class Run(NamedTuple):
    """A run as the user requested it."""

    config: DCABaseConfig
    initial_checkpoint: str | None
    data: Any
    training: RunArguments
    named: dict[str, dict[str, Any]]  # the fields that the YAML file or the command line sets, by section
