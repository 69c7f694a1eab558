"""
All tests and benchmarks that need a GPU, in minutes:

    python -m training.benchmarks.gpu --minutes 9 [--only tests operation ...]

The most important steps run first, each within its share of the minutes. If one fails or takes too long, the others still
run. Each result is written as soon as it is known. With `--device cpu` all sizes are tiny, to check that the steps work.
`--help` lists all arguments.
"""

import dataclasses
import multiprocessing
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from matplotlib import pyplot as plt
from tqdm.auto import tqdm

from modeling_dca.configuration_dca import nearest_name
from training.benchmarks import report
from training.benchmarks.gpu_steps import RESULTS, STEPS, Record, run_step, use
from training.results.figures import styles_of
from training.results.record import RUNS_FOLDER
from training.support.errors import UserError, command
from training.support.machine import describe_machine
from training.support.parser import Parser, argument
from training.support.tables import align


#: The token ids that `make gpu-data` writes.
DATA = "data/gpu/text.npz"
LOSSES = "loss.png"
RESOURCES = ["kernel", "warps", "registers", "spilled", "bytes of shared memory"]
#: With fewer seconds than this, a step is not started.
LEAST = 2.0


@dataclasses.dataclass
class GPUArguments:
    """What to run, and for how long."""

    minutes: float = argument(9.0, "The time limit for all steps together.")
    device: Literal["cuda", "cpu"] = argument("cuda", "Where to run; on the CPU all sizes are tiny.")
    only: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": f"The steps to run. {'; '.join(f'{name}: {step.help}' for name, step in STEPS.items())}."},
    )
    data: str | None = argument(
        None,
        f"A file of token ids from training.benchmarks.gpu_data; by default {DATA}, or the bytes of Python's standard library "
        "if there is none.",
    )
    output_dir: str = argument(f"{RUNS_FOLDER}/benchmarks/gpu", "The output folder.")
    overwrite: bool = argument(False, "Replace earlier results in `output_dir`.")

    def __post_init__(self):
        if not self.minutes > 0:
            raise UserError(f"`minutes` is {self.minutes:g}; it must be more than 0.")
        for name in self.only:
            if name not in STEPS:
                raise UserError(f"`only` names {name!r}; {nearest_name(name, STEPS)}")
        if self.data is None:
            self.data = DATA if Path(DATA).exists() else None
        elif not Path(self.data).is_file():
            raise UserError(f"`data` is {self.data!r}, which is not a file: `make gpu-data` writes {DATA}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("`device` is 'cuda', but PyTorch finds no GPU here: pass --device cpu to try the steps.")
        self.only = [name for name in STEPS if name in self.only or not self.only]


def run_steps(arguments: GPUArguments, folder: Path) -> None:
    """Run each step in its own process, and write the results to `folder`."""
    started = time.monotonic()
    deadline = started + 60 * arguments.minutes
    machine = describe_machine(torch.device(arguments.device))
    record = Record(
        folder / RESULTS,
        {
            "title": f"One {machine['GPU']}" if machine["GPU"] else "The steps for a GPU, at a tiny size on the CPU",
            "command": shlex.join(["python", "-m", "training.benchmarks.gpu", *sys.argv[1:]]),
            "arguments": dataclasses.asdict(arguments),
            "machine": machine,
            "steps": {name: {"status": "not reached"} for name in arguments.only},
        },
    )
    context = context_for(arguments.device)
    data = None if arguments.data is None else Path(arguments.data).resolve()
    for index, name in enumerate(arguments.only):
        left = deadline - time.monotonic()
        seconds = left * STEPS[name].share / sum(STEPS[other].share for other in arguments.only[index:])
        if seconds < LEAST:
            continue
        began = time.monotonic()
        record.update(name, status="running", allowed_seconds=seconds)
        tqdm.write(f"{name}: up to {seconds:.0f} s of {left:.0f} s")
        process = context.Process(
            target=run_step, args=(name, folder.resolve(), arguments.device, began + seconds, data), name=name
        )
        try:
            process.start()
            process.join(seconds)
            status = "out of time" if process.exitcode is None else "failed" if process.exitcode else "done"
        except BaseException:
            status = "interrupted"
            raise
        finally:
            end(process)
            if status == "done" and record.read()["steps"][name].get("errors"):
                status = "done in part"
            record.update(name, status=status, seconds=time.monotonic() - began)
            write_tables(record.read(), folder)
        tqdm.write(f"{name}: {status} after {time.monotonic() - began:.0f} s")


def context_for(device: str) -> multiprocessing.context.BaseContext:
    """
    How steps are started: forked from a server that has done the imports once. If an import initializes CUDA, which does not
    survive a fork, each step does the imports itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.benchmarks.gpu_steps"])
    process = context.Process(target=use, args=(device,))
    process.start()
    process.join()
    return multiprocessing.get_context("spawn") if process.exitcode else context


def end(process: multiprocessing.Process) -> None:
    """End a step and all processes that it has started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made a group of its own yet
    process.join()


def write_tables(results: dict, folder: Path) -> None:
    """What was found, for people to read."""
    text = tables(results)
    curves = results["steps"].get("text", {}).get("result", {}).get("curves")
    if curves:
        draw(curves, folder / LOSSES)
        text += f"\n![Held-out loss]({LOSSES})\n"
    (folder / report.TABLES).write_text(text, encoding="utf-8")


def draw(curves: dict[str, list], file: Path) -> None:
    """Draw the held-out loss by step and by time."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    styles = styles_of(curves)
    for axes, column, label in zip(panels, (0, 1), ("step", "seconds of training")):
        for name, figures in curves.items():
            style = styles[name] | {"marker": ""}
            axes.plot([one[column] for one in figures], [one[3] for one in figures], label=name, **style)
        axes.set_xlabel(label)
    panels[0].set_ylabel("held-out loss (nats)")
    panels[0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def tables(results: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value is not None)
    parts = [f"# {results['title']}", f"`{results['command']}`", machine]
    for name, step in results["steps"].items():
        result = step.get("result", {})
        took = f", {step['seconds']:.0f} s" if "seconds" in step else ""
        parts.append(
            f"## {name[0].upper()}{name[1:]}\n\n{result.get('title', STEPS[name].help)} ({step['status']}{took})."
        )
        if "counts" in result:
            parts.append(", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()))
            parts += [f"- failed: `{test}`" for test in result["failures"]]
        if "copy_bytes_per_second" in result:
            parts.append(f"A copy reads and writes {result['copy_bytes_per_second'] / 1e9:,.0f} GB/s.")
        parts += report.tables({"measures": result.get("measures", {}), "operation": result.get("operation", {})})
        rows = [
            [title, *map(str, kernel.values())]
            for title, kernels in result.get("resources", {}).items()
            for kernel in kernels
        ]
        if rows:
            parts.append(align(["", *RESOURCES], rows))
        parts += profile_tables(result.get("profiles", {}))
        parts += text_table(result.get("curves"))
        parts += [f"- {note}" for note in result.get("notes", [])]
        parts += [f"- {part}: {error}" for part, error in step.get("errors", {}).items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def profile_tables(profiles: dict[str, dict]) -> list[str]:
    parts = []
    for name, one in profiles.items():
        rows = [
            [f"`{kernel['name']}`", f"{1e3 * kernel['seconds']:.2f} ms", str(kernel["launches"])]
            for kernel in one["kernels"]
        ]
        share = one["device_seconds"] / one["seconds"]
        parts.append(
            f"{name}: {1e3 * one['seconds']:.1f} ms, with a kernel running for {share:.0%}; {one['launches']:,} launches."
        )
        parts.append(align(["kernel", "time", "launches"], rows))
    return parts


def text_table(curves: dict[str, list] | None) -> list[str]:
    """The held-out loss and the seconds of each model, at ten points of the training."""
    if not curves:
        return []
    every = max(1, len(next(iter(curves.values()))) // 10)
    rows = []
    for figures in list(zip(*curves.values()))[::-1][::every][::-1]:
        cells = [f"{held_out:.4f} ({seconds:.1f} s)" for _, seconds, _, held_out in figures]
        rows.append([f"{figures[0][0]:,}", *cells])
    return [align(["step", *(f"{name}: held-out loss" for name in curves)], rows)]


@command
def main():
    description = "All tests and benchmarks that need a GPU, in minutes."
    parser = Parser(GPUArguments, "training.benchmarks.gpu", description)
    arguments = GPUArguments(**vars(parser.parse_args()))
    folder = report.make_output_folder(arguments)
    run_steps(arguments, folder)
    print(f"\n{(folder / report.TABLES).read_text(encoding='utf-8')}\nThe results are in {folder}.")


if __name__ == "__main__":
    main()
