"""The fields of a run's section `training`, and a run as it was asked for."""

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


# What `resume_from_checkpoint` is when it is given without a path, and where a run is started and gone on with by one line.
LAST, AUTO = "last", "auto"

# From where to where a field may be: what the Trainer meets only when it is too late for a sentence, or never.
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
    "ddp_timeout": (1, 10**9),  # more than 30 years, and less than a date can hold
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "eval_delay": (0, math.inf),
    # What NumPy takes.
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}

# Fields that say something each so many steps, or each such share of all, by the field that says whether they are asked.
INTERVALS = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}

# Fields that can have one value alone: with others the Trainer would fail when all is trained, or not do what they say.
FIXED = {
    "prediction_loss_only": (False, "a run reports more than its loss"),
    "eval_do_concat_batches": (True, "a run reports figures of all that was held out"),
    "batch_eval_metrics": (False, "a run reports figures of all that was held out"),
    "include_for_metrics": ([], "the figures of a run need no more"),
    "label_names": (None, "all models that are trained here name them alike"),
    "length_column_name": ("length", "all examples have one length"),
    "use_liger_kernel": (False, "Liger has no kernels for these models"),
    "liger_kernel_config": (None, "Liger has no kernels for these models"),
    "deepspeed": (None, "a run is shared out among devices by the files of configuration/accelerate"),
    "parallelism_config": (None, "a run is shared out among devices by the files of configuration/accelerate"),
    "save_on_each_node": (False, "the folder of a run is one that all machines share"),
    "enable_jit_checkpoint": (False, "SIGTERM has a checkpoint written in any case"),
    "use_cache": (False, "there is nothing to keep in a cache where nothing is generated"),
    "do_predict": (False, "a run has nothing to predict"),
    "restore_callback_states_from_checkpoint": (False, "what is to be restored is, in any case"),
}


def check_one_gpu(arguments: TrainingArguments) -> None:
    """
    Raises:
        [`UserError`]: one process has several GPUs, over which the Trainer would spread it in a way that is not tested here.
    """
    if arguments.n_gpu > 1:
        line = shlex.join(["-m", f"training.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        raise UserError(
            f"There are {arguments.n_gpu} GPUs, for which as many processes are needed: `accelerate launch --config_file "
            f"configuration/accelerate/ddp.yaml --num_processes {arguments.n_gpu} {line}`; or let this one see one GPU alone, "
            "with CUDA_VISIBLE_DEVICES=0."
        )


@dataclasses.dataclass
class RunArguments(TrainingArguments):
    """The fields of [`~transformers.TrainingArguments`], with what every run of this project has."""

    #: What is measured on held-out data, and whether more of it is better.
    held_out_metrics: ClassVar[dict[str, bool]] = {"loss": False}

    baseline: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A residual scheme to train too, on the same batches, for comparison: 'standard', say; or 'none'."
        },
    )
    variant: str | None = dataclasses.field(
        default=None,
        metadata={"help": f"What to train beside DCA, for studies; not for models to be used: {', '.join(VARIANTS)}."},
    )
    # (A word for the parser; the settings by name when it has been read.)
    variant_fields: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Settings of the `variant`, where it has some: '{n: 2}', say; see `training/variants/`."},
    )
    freeze_backbone: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Of the `initial_checkpoint`, train what DCA adds alone (`delta` and `gate`), and the head of a classifier."
        },
    )
    lora_rank: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Of the `initial_checkpoint`, train nothing but adapters of this rank (LoRA, needs peft) beside all linear "
            "maps of the blocks, and the head of a classifier. The run ends with them added to the weights."
        },
    )
    metrics: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Metrics of `evaluate` to measure besides: names on the Hub ('f1'), or paths ('./my_metric'). Predictions "
            "and references are classes, or of text the next tokens."
        },
    )
    global_batch_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The examples of a training step over all devices; `gradient_accumulation_steps` follows from it, "
            "whatever the number of devices. An epoch is filled up to whole steps, with examples drawn again."
        },
    )
    tp_size: int = dataclasses.field(
        default=1,
        metadata={
            "help": "Over how many devices each weight of attention and MLP is divided (tensor parallelism); they train on the "
            "same examples. Launch with ddp.yaml or torchrun."
        },
    )
    fsdp_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "With `tp_size`: over how many devices the weights are shared out besides; if none, over all that remain."
        },
    )
    dp_replicate_size: int = dataclasses.field(
        default=1,
        metadata={"help": "With `tp_size`: how many copies of the model there are. The number of machines, say."},
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "Delete an earlier run that `output_dir` holds, and start again."}
    )
    push_to_hub: bool = dataclasses.field(
        default=False, metadata={"help": "Publish the run on the Hub when it is complete, as `training.publish` does."}
    )
    hub_strategy: str = dataclasses.field(
        default="end", metadata={"help": "When to push to the Hub: 'end', the only time that a run is whole."}
    )
    model_license: str = dataclasses.field(
        default="apache-2.0", metadata={"help": "The license that the model card states for the weights."}
    )
    optim: OptimizerNames | None = dataclasses.field(
        default=None,
        metadata={
            "help": "The optimizer; if not given, 'adamw_torch' on an XLA device and "
            f"{TrainingArguments.default_optim!r} on others."
        },
    )
    # Every weight has a part in every loss.
    ddp_find_unused_parameters: bool = dataclasses.field(
        default=False,
        metadata={"help": "Have several devices look, in every step, for weights that had no part in it."},
    )
    # A loss that is not finite must be seen, not replaced by the last finite one.
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "Whether to leave losses that are not finite out of the logs."}
    )
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Where to log to: integrations of the Trainer, 'all' that are installed, or 'none'."},
    )
    # (The parser takes what is a word or a truth value for a truth value alone.)
    include_num_input_tokens_seen: str = dataclasses.field(
        default="no",
        metadata={"help": "Whether to count the tokens that are trained on: 'all', 'non_padding' or 'no'."},
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
        GradientAccumulationPlugin(**accumulation)  # which knows its fields
        if "num_steps" in accumulation:
            raise ValueError(
                "`accelerator_config` has `num_steps`: leave it out, and set `gradient_accumulation_steps`."
            )
        if self.global_batch_size is not None and self.accelerator_config.split_batches:
            raise ValueError("`accelerator_config` has `split_batches`, but `global_batch_size` says what a batch is.")
        if self.device.type == "cpu" and self.fp16:
            raise ValueError("`fp16` is for GPUs: leave it out on a CPU, or choose `bf16`.")
        if DebugOption.TPU_METRICS_DEBUG in self.debug and self.device.type != "xla":
            raise ValueError(f"`debug` is {DebugOption.TPU_METRICS_DEBUG.value!r}, but there is no TPU: leave it out.")
        if self.greater_is_better and self.lr_scheduler_type in (
            SchedulerType.REDUCE_ON_PLATEAU,
            SchedulerType.GREEDY,
        ):
            # (Left to itself, the schedule would take a metric that rises for one that gets no better.)
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        if self.device.type == "xla":
            self._set_xla_defaults(chosen_optimizer)
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(f"`hub_strategy` is {str(self.hub_strategy.value)!r}; only 'end' is supported.")
        if self.global_batch_size is not None:
            self._set_gradient_accumulation_steps()

    @property
    def data_parallel_size(self) -> int:
        """How many processes, or groups of them, have examples of their own."""
        return self.world_size // processes_per_batch(self.tp_size)

    @property
    def data_parallel_index(self) -> int:
        """Which of them this process is, or belongs to."""
        return self.process_index // processes_per_batch(self.tp_size)

    @property
    def is_first_of_batch(self) -> bool:
        """Whether this process is the first of those that compute the same examples."""
        return self.process_index % processes_per_batch(self.tp_size) == 0

    def _check_values(self):
        """
        Raises:
            `ValueError`: a field has a value with which the Trainer would fail later, or do something else without a word.
        """
        for name, (smallest, largest) in BOUNDS.items():
            value = getattr(self, name)
            # (Comparing so, and not with `<`, refuses NaN, too.)
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
                raise ValueError(f"`{name}` is {value}; it must be steps from 1 on, or a share of all below 1.")
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps}; it must be whole steps, or a share of all below 1."
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
                f"`optim_target_modules` is {self.optim_target_modules!r}, which is for GaLore and APOLLO alone: leave it out, "
                "or choose such an `optim`."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r}, but all examples have one length: choose "
                "'random' or 'sequential'."
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "`save_strategy` is 'best', but nothing is evaluated to find it: set `eval_strategy`, too."
            )

    def _set_variant_fields(self):
        """Give the settings of the variant by name, and see that it has them."""
        fields = self.variant_fields
        if isinstance(fields, str):
            with contextlib.suppress(yaml.YAMLError):  # (what is none is told below)
                fields = load_yaml(fields)
        if fields is None:
            return
        if self.variant is None:
            raise ValueError(f"`variant_fields` is {fields!r}, but no `variant` is named: leave it out, or name one.")
        if not isinstance(fields, dict):
            raise ValueError(
                f"`variant_fields` is {fields!r}; it must name settings and their values: '{{n: 2}}', say."
            )
        VARIANTS[self.variant].settings(fields)
        self.variant_fields = fields

    def _set_words(self):
        """Give fields that are words, or lists of words, what the Trainer takes."""
        self.report_to = (
            [self.report_to] if isinstance(self.report_to, str) else list(dict.fromkeys(self.report_to or []))
        )
        self.fsdp = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        for alone in {"all", "none"}.intersection(self.report_to):
            if len(self.report_to) > 1:
                raise ValueError(
                    f"`report_to` is {self.report_to}, but {alone!r} goes alone: leave it, or the others, out."
                )
        counted = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = {"true": "all", "false": "no"}.get(counted, counted)
        if self.include_num_input_tokens_seen not in ("all", "non_padding", "no"):
            raise ValueError(
                f"`include_num_input_tokens_seen` is {counted!r}; it must be one of 'all', 'non_padding' and 'no'."
            )

    def _set_metric(self):
        """Know the metric that finds the best model, and that of two perplexities the lower one is better."""
        if self.metric_for_best_model is None:
            return
        name = self.metric_for_best_model.removeprefix("eval_")
        if self.metrics and name not in self.held_out_metrics:
            return  # it may be one that a metric gives which is named
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
                f"`optim` is {self.optim.value!r}, which XLA devices do not have: leave it out, or name 'adamw_torch'."
            )
        if self.eval_accumulation_steps is None:
            # On the device, what the batches so far gave would be a tensor, and so a graph, of another size with each.
            self.eval_accumulation_steps = 1

    def _set_gradient_accumulation_steps(self):
        at_once = self.per_device_train_batch_size * self.data_parallel_size
        steps, rest = divmod(self.global_batch_size, at_once)
        together = self.world_size // self.data_parallel_size
        if rest:
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, but must be a multiple of {at_once}: "
                f"`per_device_train_batch_size` is {self.per_device_train_batch_size}, and the number of devices "
                f"{self.world_size}"
                + (f", each {together} of which compute a batch together." if together > 1 else ".")
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but follows from "
                f"`global_batch_size` = {self.global_batch_size} as {steps}: leave one of them out."
            )
        self.gradient_accumulation_steps = steps


class Run(NamedTuple):
    """A run as it was asked for."""

    config: DCABaseConfig
    initial_checkpoint: str | None
    data: Any
    training: RunArguments
    named: dict[str, dict[str, Any]]  # the fields that the YAML file or the command line names, by section
