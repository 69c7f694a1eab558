"""
Estimate the cost of a run of a language model:

    python -m training.benchmarks.plan --layers 32 --hidden 4096 --devices 64 --tensor 8 --last_k 2
    python -m training.benchmarks.plan RUN.yaml --devices 8

Parameters, memory per device, the generalized residuals relative to the blocks, communication, and what fits. Nothing is
measured: the formulas are in `training/benchmarks/costs.md`.
"""

import copy
import dataclasses
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from modeling_dca import DCAConfig
from modeling_dca.configuration_dca import nearest_name
from training.benchmarks import costs
from training.benchmarks.costs import Layout
from training.benchmarks.devices import DEVICES, peak_flops_of
from training.run.parsing import parse_run
from training.support.errors import UserError, command, innermost_message
from training.support.parser import Parser, argument
from training.support.tables import align
from training.text.task import LANGUAGE_MODELS


#: The formulas and their sources.
PAGE = Path(__file__).with_name("costs.md")

#: The usable share of a device's memory: the rest is for the allocator, libraries and communication.
USABLE = 0.9


@dataclasses.dataclass
class PlanArguments:
    """The model (with a file, what differs from it), and its parallelism."""

    layers: int | None = argument(None, "Number of blocks (default: 12).")
    hidden: int | None = argument(None, "Width of the model (default: 512).")
    heads: int | None = argument(None, "Number of query heads (default: 8).")
    kv_heads: int | None = argument(None, "Number of key and value heads (default: as many).")
    intermediate: int | None = argument(None, "Width of the feed-forward modules (default: 4 x the model's).")
    vocab: int | None = argument(None, "Vocabulary size (default: 32,000).")
    residual_scheme: str | None = argument(None, "standard, grn_v1, grn_v2, grn_v3 or dca (default: dca).")
    last_k: int | None = argument(None, "The k of k-DCA (default: full DCA).")
    gated: bool | None = argument(None, "Whether feed-forward modules are gated (default: true).")
    tied: bool | None = argument(None, "Whether the embeddings are tied (default: false).")
    seq: int | None = argument(None, "Tokens per sequence (default: 2,048).")
    batch: int | None = argument(None, "Sequences per micro-batch on each device (default: 1).")
    checkpointing: bool | None = argument(None, "Whether activations are checkpointed (default: false).")
    float32: bool | None = argument(None, "Whether activations are float32 instead of bfloat16 (default: false).")
    devices: int = argument(1, "Number of devices.")
    tensor: int = argument(1, "Tensor parallelism: devices that share each projection.")
    by_sequence: bool = argument(False, "Also shard the stack, residuals and norms by sequence over these devices.")
    pipeline: int = argument(1, "Pipeline stages.")
    micro_batches: int = argument(1, "Micro-batches per step (at least one per pipeline stage).")
    replicas: int = argument(1, "Replicas of the model. The remaining devices shard weights and optimizer (FSDP2).")
    device: str = argument("NVIDIA H100 80GB HBM3", f"The device, or a part of its name: {', '.join(DEVICES)}.")
    utilization: float = argument(0.4, "The share of the device's FLOPs that matrix products reach.")


# The names of the arguments in a configuration, and in a run.
MODEL_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "residual_scheme": "residual_scheme",
    "last_k": "last_k",
    "gated": "gated_mlp",
    "tied": "tie_word_embeddings",
}
RUN_FIELDS = {"seq": "block_size", "batch": "per_device_train_batch_size", "checkpointing": "gradient_checkpointing"}


def read_model(arguments: PlanArguments, file: str | None) -> tuple[DCAConfig, dict]:
    """The configuration, and the fields of the layout from a run's file or the arguments."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if file is None:
        fields = {"gated_mlp": True} | {MODEL_FIELDS[name]: given[name] for name in MODEL_FIELDS if name in given}
        try:
            config = DCAConfig(**fields)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"The model: {innermost_message(error)}") from error
        layout = {"batch": given.get("batch", 1), "seq": given.get("seq", 2048)}
        return config, layout | {
            "checkpointing": given.get("checkpointing", False),
            "element": 4 if given.get("float32") else 2,
        }
    names = MODEL_FIELDS | RUN_FIELDS
    # (`--use_cpu` allows any precision, whatever this machine has.)
    run = parse_run(
        [file, "--use_cpu", *(f"--{names[name]}={value}" for name, value in given.items() if name in names)],
        "training.benchmarks.plan",
        "",
        *LANGUAGE_MODELS.fields,
    )
    half = run.training.bf16 or run.training.fp16
    return run.config, {
        "batch": run.training.per_device_train_batch_size,
        "seq": run.data.block_size,
        "checkpointing": run.training.gradient_checkpointing,
        "element": 4 if given.get("float32", not half) else 2,
    }


def find_device(name: str) -> str:
    """The name in `DEVICES` that equals or contains `name`."""
    found = [known for known in DEVICES if name.lower() == known.lower()]
    found = found or [known for known in DEVICES if name.lower() in known.lower()]
    if len(found) != 1:
        several = f"it may be {' or '.join(found)}." if found else nearest_name(name, DEVICES)
        raise UserError(f"`device` is {name!r}; {several}")
    return found[0]


def read_layout(arguments: PlanArguments, config: DCAConfig, fields: dict) -> Layout:
    """The layout of the arguments, checked."""
    for name in ("devices", "tensor", "pipeline", "micro_batches", "replicas"):
        if getattr(arguments, name) < 1:
            raise UserError(f"`{name}` is {getattr(arguments, name)}; it must be at least 1.")
    for name in ("batch", "seq"):
        if fields[name] < 1:
            raise UserError(f"`{name}` is {fields[name]}; it must be at least 1.")
    if not 0 < arguments.utilization <= 1:
        raise UserError(f"`utilization` is {arguments.utilization}; it must be above 0 and at most 1.")
    groups = arguments.tensor * arguments.pipeline * arguments.replicas
    if arguments.devices % groups:
        raise UserError(
            f"`devices` is {arguments.devices}, which is not a multiple of `tensor` x `pipeline` x `replicas` = {groups}."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % arguments.tensor:
            raise UserError(
                f"`tensor` is {arguments.tensor}, which does not divide `{name}`, {getattr(config, name)}."
            )
    if arguments.pipeline > config.num_hidden_layers:
        raise UserError(f"`pipeline` is {arguments.pipeline}, but the model has {config.num_hidden_layers} blocks.")
    names = ("tensor", "by_sequence", "pipeline", "micro_batches", "replicas")
    shared = {name: getattr(arguments, name) for name in names}
    return Layout(sharding=arguments.devices // groups, **shared, **fields)


def name_of(config: DCAConfig) -> str:
    """The name of a residual scheme in tables."""
    names = {"standard": "the residual sum", "dca": "DCA"}
    name = names.get(config.residual_scheme, config.residual_scheme)
    return f"{config.last_k}-{name}" if config.last_k else ("full DCA" if name == "DCA" else name)


def _with_scheme(config: DCAConfig, scheme: str, last_k: int | None) -> DCAConfig:
    result = copy.deepcopy(config)
    result.last_k = None
    result.residual_scheme = scheme
    result.last_k = last_k
    return result


def _gib(number: float) -> str:
    return f"{number / 2**30:,.2f}"


def _large(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f} "


def describe(config: DCAConfig, layout: Layout, device: str, utilization: float) -> str:
    """All estimates, as text."""
    limits = DEVICES[device]
    flops, bandwidth = utilization * peak_flops_of(device), limits.bandwidth * 1e12
    parts = []

    counts = costs.count_parameters(config)
    parts.append("Parameters")
    rows = [[kind, f"{number:,}"] for kind, number in {**counts, "all": sum(counts.values())}.items()]
    parts.append(align(["kind", "parameters"], rows))

    plain, again = (dataclasses.replace(layout, checkpointing=value) for value in (False, True))
    columns = [costs.memory(config, each) for each in (plain, again)]
    rows = [[kind, *(_gib(column[kind]) for column in columns)] for kind in columns[0]]
    rows.append(["all", *(_gib(sum(column.values())) for column in columns)])
    parts.append("\nMemory of the fullest device, GiB")
    parts.append(align(["kind", "without checkpointing", "with"], rows))
    kept = costs.checkpointed_tensors(config)
    parts.append(f"With checkpointing {kept} tensors of tokens x width are kept, apart from the norm's output.")

    forward, backward = costs.residual_bytes(config, layout.element)
    blocks = costs.block_flops(config, layout.seq)
    stack = layout.tensor if layout.by_sequence else 1
    seconds = (forward + backward) / stack / bandwidth
    of_projections = seconds / (blocks["projections"] / layout.tensor / flops)
    parts.append("\nPer token in all blocks, forward and backward")
    rows = [
        ["bytes of the residuals", f"{_large(forward + backward)}B"],
        ["FLOPs of the residuals", f"{_large(costs.residual_flops(config))}FLOP"],
        ["FLOPs of the projections", f"{_large(blocks['projections'])}FLOP"],
        ["FLOPs of the attention", f"{_large(blocks['attention'])}FLOP"],
        ["FLOPs of the head", f"{_large(blocks['head'])}FLOP"],
        ["time of the residuals relative to the projections", f"{of_projections:.1%}"],
        ["slowdown relative to the plain transformer", f"{costs.slowdown(config, layout, flops, bandwidth):.1%}"],
    ]
    parts.append(align(["", ""], rows))

    links = costs.link_bytes(config, layout)
    standard = costs.link_bytes(_with_scheme(config, "standard", None), layout)
    rows = [[kind, _gib(number), _gib(standard[kind])] for kind, number in links.items() if number or standard[kind]]
    if rows:
        parts.append("\nCommunication per device in a step of one micro-batch, GiB sent")
        parts.append(align(["for", name_of(config), "plain transformer"], rows))
    for index, number in enumerate(costs.cut_bytes(config, layout)):
        entries = number // (layout.tokens * config.hidden_size * layout.element)
        parts.append(f"Cut {index + 1}: {entries} tensors, {number:,} bytes per direction and micro-batch.")

    parts.append(f"\nWhat fits into {USABLE:.0%} of the {limits.memory:g} GB of {device}")
    schemes = [("standard", None), ("dca", 2), ("dca", None), (config.residual_scheme, config.last_k)]
    rows = []
    for scheme, last_k in dict.fromkeys(schemes):
        other = _with_scheme(config, scheme, last_k)
        for each in (plain, again):
            total = sum(costs.memory(other, each).values())
            fits = "yes" if total <= USABLE * limits.memory * 1e9 else "no"
            loss = costs.slowdown(other, layout, flops, bandwidth)
            rows.append(
                [name_of(other), "with" if each.checkpointing else "without", _gib(total), fits, f"{loss:.1%}"]
            )
    parts.append(align(["residuals", "checkpointing", "GiB", "fits", "slowdown"], rows))
    parts.append(
        f"Matrix products at {utilization:.0%} of {peak_flops_of(device) / 1e12:g} TFLOP/s, {limits.bandwidth:g} TB/s memory."
    )
    return "\n".join(parts)


@command
def main():
    parser = Parser(PlanArguments, "training.benchmarks.plan", "Estimate the cost of a run of a language model.")
    parser.add_argument("configuration", nargs="?", metavar="RUN.yaml", help="the file of a run of a language model")
    given = vars(parser.parse_args())
    file = given.pop("configuration")
    arguments = PlanArguments(**given)
    config, fields = read_model(arguments, file)
    device = find_device(arguments.device)
    layout = read_layout(arguments, config, fields)
    shape = f"{config.num_hidden_layers} layers x {config.hidden_size}, {name_of(config)}"
    print(f"{shape}; {layout.batch} x {layout.seq} tokens on each of {arguments.devices} {device}\n")
    print(describe(config, layout, device, arguments.utilization))


if __name__ == "__main__":
    main()
