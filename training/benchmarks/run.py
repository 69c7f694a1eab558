"""
Measure DCA next to the plain transformer:

    python -m training.benchmarks.run [--layers 12 --hidden 512 --device cpu --compile ...]

The models take turns in one process, and each is compared with Llama in the same round. `--help` lists all arguments.
"""

import dataclasses
import os
import shlex
import sys
from typing import Literal

import torch

from modeling_dca.configuration_dca import nearest_name
from modeling_dca.grn import ALL_GRN_FUNCTIONS
from training.benchmarks import report
from training.benchmarks.measure import PEAK_RESET
from training.benchmarks.models import (
    BASELINE,
    HEAD_DIM,
    MEASURES,
    NEW_TOKENS,
    PUBLISHED,
    PUBLISHED_MISSING,
    PUBLISHED_NOTE,
    SCHEMES,
    SCHEMES_NOTE,
    Candidate,
    build_models,
)
from training.benchmarks.operation import Operation, measure_operation
from training.results.record import RUNS_FOLDER
from training.support.errors import UserError, command
from training.support.machine import describe_machine
from training.support.parser import Parser, argument
from training.support.timing import interleave, summarize


#: The measures, with their help.
HELP = {name: measure.help for name, measure in MEASURES.items()}
HELP["operation"] = "generalized residuals alone, against the bandwidth of a copy"

#: The operation is short, so that more rounds cost little.
OPERATION_ROUNDS = 4

SMALLEST = {"layers": 1, "hidden": HEAD_DIM, "seq": 2, "batch": 1, "vocab": 2}
SMALLEST |= {"rounds": 1, "warmup": 1, "compile_rounds": 1}


@dataclasses.dataclass
class BenchmarkArguments:
    """What to measure, and where."""

    layers: int = argument(12, "Number of blocks.")
    hidden: int = argument(512, f"Width of the model, a multiple of {HEAD_DIM}, the width of a head.")
    seq: int = argument(128, "Tokens per sequence.")
    batch: int = argument(8, "Sequences per training step and prefill.")
    vocab: int = argument(
        8192, "Vocabulary size. With a larger one, the output layer dominates the cost of the blocks."
    )
    dtype: Literal["float32", "bfloat16"] = argument("float32", "Type of weights and activations, without autocast.")
    device: Literal["cpu", "cuda"] = argument("cpu", "Where to measure.")
    compile: bool = argument(False, "Compile training step and prefill.")
    grn_implementation: str = argument(
        "auto",
        "Implementation of DCA's generalized residuals. With --compile, 'eager' lets the compiler fuse them: steps are faster, and "
        "compilation takes longer with each entry.",
    )
    rounds: int = argument(5, f"Measured rounds; {OPERATION_ROUNDS} times as many for the operation alone.")
    warmup: int = argument(2, "Warm-up rounds.")
    compile_rounds: int = argument(1, "Rounds for the compile time; each takes minutes.")
    only: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": f"What to measure. {'; '.join(f'{name}: {text}' for name, text in HELP.items())}."},
    )
    variants: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": f"Additional residual schemes to measure: {', '.join(SCHEMES)}, or 'all'."},
    )
    output_dir: str | None = argument(None, f"The output folder; by default one in {RUNS_FOLDER}/benchmarks.")
    overwrite: bool = argument(False, "Replace earlier results in `output_dir`.")

    def __post_init__(self):
        for name, smallest in SMALLEST.items():
            if getattr(self, name) < smallest:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least {smallest}.")
        if self.hidden % HEAD_DIM:
            raise UserError(f"`hidden` is {self.hidden}; it must be a multiple of {HEAD_DIM}, the width of a head.")
        for name in self.only:
            if name not in HELP:
                raise UserError(f"`only` names {name!r}; {nearest_name(name, HELP)}")
        self.variants = SCHEMES if self.variants == ["all"] else list(dict.fromkeys(self.variants))
        for name in self.variants:
            if name not in SCHEMES:
                raise UserError(f"`variants` names {name!r}; {nearest_name(name, ['all', *SCHEMES])}")
        implementations = ["auto", *ALL_GRN_FUNCTIONS.valid_keys()]
        if self.grn_implementation not in implementations:
            raise UserError(
                f"`grn_implementation` is {self.grn_implementation!r}; {nearest_name(self.grn_implementation, implementations)}"
            )
        if "compile_time" in self.only and not self.compile:
            raise UserError("`only` names 'compile_time' without `compile`: pass --compile, too.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("`device` is 'cuda', but PyTorch finds no GPU here: pass --device cpu.")
        missing = set() if self.compile else {"compile_time"}
        if self.device == "cpu" and not os.access(PEAK_RESET, os.W_OK):
            missing.add("peak_memory")
        if "peak_memory" in missing.intersection(self.only):
            raise UserError(f"`only` names 'peak_memory', which on the CPU needs Linux ({PEAK_RESET}): leave it out.")
        self.only = self.only or [name for name in HELP if name not in missing]
        if self.output_dir is None:
            shape = f"{self.layers}x{self.hidden}-{self.batch}x{self.seq}-{self.dtype}"
            ends = "-compiled" * self.compile + "-variants" * bool(self.variants)
            ends += f"-{self.grn_implementation}" * (self.grn_implementation != "auto")
            self.output_dir = f"{RUNS_FOLDER}/benchmarks/{self.device}-{shape}{ends}"


def measure_models(arguments: BenchmarkArguments, candidates: dict[str, Candidate]) -> dict[str, dict]:
    """The requested ones of `MEASURES`, for the file of results."""
    results = {}
    for name in (name for name in MEASURES if name in arguments.only):
        measure, subjects = MEASURES[name], dict(candidates)
        rounds, warmup = arguments.rounds, arguments.warmup
        if name == "compile_time":
            rounds, warmup = arguments.compile_rounds, 0
            # The first compilation of a process takes longer. Llama's second measurement shows any other drift.
            torch.compile(torch.sin)(torch.ones(1, device=arguments.device))
            subjects[f"{BASELINE}, last"] = candidates[BASELINE]
        elif name == "decoding":
            subjects.pop(PUBLISHED, None)  # it has no cache
        elif name == "kept_bytes":
            rounds, warmup = 1, 0  # deterministic
        title = name.replace("_", " ")
        values = interleave(title, subjects, measure.meter, rounds, warmup)
        tokens = NEW_TOKENS if name == "decoding" else arguments.batch * arguments.seq
        results[name] = {
            "title": title,
            "unit": measure.unit,
            "ratio_of": measure.ratio_of,
            "tokens": tokens if measure.ratio_of == "speed" else None,
            "models": summarize(values, BASELINE, measure.ratio_of == "speed"),
        }
    return results


def compare_with_published(training_step: dict[str, dict]) -> list[str]:
    """Sentences on the training speed of our models relative to the published one; Llama, without a stack, is the bound."""
    times = {name: model["values"] for name, model in training_step.items()}
    return [
        f"{name} trains at {ratio['ratio']:.2f} x the speed of {PUBLISHED} "
        f"({ratio['spread'][0]:.2f} to {ratio['spread'][1]:.2f})."
        for name, ratio in summarize(times, PUBLISHED, speed=True).items()
        if name == BASELINE or name.endswith("DCA")
    ]


def benchmark(arguments: BenchmarkArguments) -> dict:
    """Measure what is requested, and return the content of the file of results."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    entry_shape = (arguments.batch, arguments.seq, arguments.hidden)
    results = {
        "title": f"{arguments.layers} layers x {arguments.hidden}, {arguments.batch} x {arguments.seq} tokens, "
        f"{arguments.dtype}, {device}{', compiled' if arguments.compile else ''}"
        + f", residuals by {arguments.grn_implementation!r}"
        * (arguments.grn_implementation != "auto"),
        "command": shlex.join(["python", "-m", "training.benchmarks.run", *sys.argv[1:]]),
        "arguments": dataclasses.asdict(arguments),
        "machine": describe_machine(device),
        "parameters": {},
        "measures": {},
        "operation": {},
        "notes": [],
    }
    notes = results["notes"]
    torch.manual_seed(0)
    if arguments.only != ["operation"]:
        shape = (arguments.vocab, arguments.hidden, arguments.layers)
        models = build_models(
            *shape, dtype, variants=arguments.variants, grn_implementation=arguments.grn_implementation
        )
        results["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        input_ids = torch.randint(arguments.vocab, entry_shape[:2], device=device)
        candidates = {name: Candidate(model, input_ids, arguments.compile) for name, model in models.items()}
        results["measures"] = measure_models(arguments, candidates)
        notes.append(PUBLISHED_NOTE if PUBLISHED in models else PUBLISHED_MISSING)
        if arguments.variants:
            notes.append(SCHEMES_NOTE)
        if PUBLISHED in models and "training_step" in arguments.only:
            notes += compare_with_published(results["measures"]["training_step"]["models"])
        del models, candidates
    if "operation" in arguments.only:
        rounds = OPERATION_ROUNDS * arguments.rounds
        for title, entries in (("full DCA", arguments.layers), ("2-DCA", min(arguments.layers, 4))):
            operation = Operation(entries, entry_shape, dtype, device)
            results["operation"][title], skipped = measure_operation(operation, title, rounds, arguments.warmup)
            notes += [f"{title}: {note}" for note in skipped]
    return results


@command
def main():
    description = "Measure DCA next to the plain transformer."
    parser = Parser(BenchmarkArguments, "training.benchmarks.run", description)
    arguments = BenchmarkArguments(**vars(parser.parse_args()))
    folder = report.make_output_folder(arguments)
    # The models share code, which is compiled for each of them.
    with torch._dynamo.config.patch(recompile_limit=64):
        print(report.write(benchmark(arguments), folder))
    print(f"\nThe results are in {folder}.")


if __name__ == "__main__":
    main()
