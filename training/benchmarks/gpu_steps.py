"""The steps of `python -m training.benchmarks.gpu`, each of which is its own process."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from modeling_dca import DCAConfig, DCAForCausalLM, grn_triton
from training.benchmarks.models import BASELINE, MEASURES, PROMPT_TOKENS, Candidate, build_models
from training.benchmarks.operation import COPY, FLA, Operation, measure_operation
from training.support.timing import interleave, seconds, summarize


ROOT = Path(__file__).parents[2]
GPU_TESTS = ROOT / "tests" / "modeling_dca"
#: Packages that the machine lacks, as `make gpu-data` leaves them.
PACKAGES = ROOT / "data" / "gpu" / "packages"

#: In the order in which they are compiled, as time may not suffice for all.
MODELS = (BASELINE, "2-DCA", "full DCA", "standard")
#: With less free GPU memory than this, nothing is compiled during the tests.
FREE_BYTES = 55 * 10**9
#: The lines of pytest about a test: with several processes and at the end, and with one process.
OUTCOMES = "(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
OUTCOME_FIRST = re.compile(rf"(\[gw\d+\] \[ *\d+%\] )?{OUTCOMES} (?P<test>tests/\S+?(::\w+(\[.*?\])?)?)( - .*)?\s*$")
OUTCOME_LAST = re.compile(rf"(?P<test>tests/\S+::\w+(\[.*\])?) {OUTCOMES}\b")


#: Compiler processes per training process, when many compile at once.
COMPILE_THREADS = 4


class Sizes(NamedTuple):
    """The sizes of all steps."""

    dtype: torch.dtype = torch.bfloat16
    # The operation alone: entries of its stack, elements of an entry, and widths.
    entries: int = 13
    elements: int = 2**25
    operation_widths: tuple[int, ...] = (512, 1024, 2048)
    operation_rounds: int = 15
    operation_others: tuple[str, ...] = ("eager", "eager, compiled")
    copy_bytes: int | None = None
    # Models: the batch of each width.
    layers: int = 24
    # (Compiling 24 layers takes a minute or more per model.)
    compiled_layers: int = 12
    batch: dict[int, int] = {1024: 8, 512: 16}
    seq: int = 1024
    vocab: int = 8192
    rounds: int = 8
    new_tokens: int = 32
    decoded: tuple[int, ...] = (1, 8)
    backend: str = "inductor"
    # Training on text: the interval of evaluations in steps, and the number of held-out blocks.
    text_layers: int = 6
    text_width: int = 512
    text_block: int = 512
    text_batch: int = 32
    text_figures: int = 50
    text_held_out: int = 64
    text_most_steps: int = 10**6


SIZES = {
    "cuda": Sizes(),
    # All steps take less than a minute: they only check that the steps work.
    "cpu": Sizes(
        dtype=torch.float32,
        entries=3,
        elements=2**10,
        operation_widths=(64,),
        operation_rounds=2,
        operation_others=("eager",),  # compiling for the CPU takes long
        copy_bytes=2**20,
        layers=2,
        compiled_layers=2,
        batch={128: 2, 64: 2},
        seq=8,
        vocab=300,
        rounds=2,
        new_tokens=4,
        decoded=(1, 2),
        backend="eager",
        text_layers=2,
        text_width=64,
        text_block=32,
        text_batch=4,
        text_figures=5,
        text_held_out=8,
        text_most_steps=20,
    ),
}


class Record:
    """
    The file of results, which is replaced atomically.

    Args:
        file: its path.
        content: its initial content; by default that of the existing file.
    """

    def __init__(self, file: Path, content: dict | None = None):
        self.file = file
        if content is not None:
            self._write(content)

    def read(self) -> dict:
        return json.loads(self.file.read_text(encoding="utf-8"))

    def update(self, step: str, **values) -> None:
        """Sets `values` of a step."""
        content = self.read()
        content["steps"][step] |= values
        self._write(content)

    def _write(self, content: dict) -> None:
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.file)


class Task:
    """
    A running step.

    Args:
        name: the name of the step.
        folder: the folder of the results.
        device: where the step runs.
        deadline: when the step is killed, by `time.monotonic`.
        data: the file of token ids, if there is one.
    """

    def __init__(self, name: str, folder: Path, device: str, deadline: float, data: Path | None = None):
        self.name, self.folder, self.device, self.data = name, folder, torch.device(device), data
        self.deadline = deadline
        self.sizes = SIZES[self.device.type]
        self.record = Record(folder / RESULTS)
        self.result, self.errors = {}, {}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def save(self, **figures) -> None:
        """Writes results of this step to the file of results."""
        self.result |= figures
        self.record.update(self.name, result=self.result, errors=self.errors)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Records an error in a part of a step, and continues with the step."""
        try:
            yield
        except Exception as error:
            self.errors[name] = sentence(error)
            self.save()
            print(f"{name}: {self.errors[name]}", flush=True)


RESULTS = "results.json"


def sentence(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


def run_step(name: str, *arguments) -> None:
    """The process of a step: the leader of its own process group, which ends when the command that started it is gone."""
    os.setsid()
    folder = arguments[0]
    sys.stdout = sys.stderr = open(folder / f"{name.replace(' ', '-')}.log", "w", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)  # for the subprocesses of the step, too
    tqdm.set_lock(threading.RLock())  # a killed step would leave a lock between processes behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path.append(str(PACKAGES))
    task = Task(name, *arguments)
    try:
        torch.manual_seed(0)
        # The models share code, which is compiled for each of them.
        with torch._dynamo.config.patch(recompile_limit=64):
            STEPS[name].run(task)
    except Exception as error:
        task.errors["step"] = sentence(error)
        raise
    finally:
        task.save()


def use(device: str) -> None:
    """Fails if a process cannot use the device."""
    torch.zeros(1, device=device)


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, 9)


def run_tests(task: Task) -> None:
    """
    The tests marked `gpu`, or a few others without a GPU. Meanwhile the other cores compile the models of later steps into
    the compiler's cache.
    """
    if task.device.type == "cuda":
        files = sorted(file for file in GPU_TESTS.glob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8"))
        options = ["-m", "gpu", "-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--durations", "20"]
    else:
        files, options = (
            [GPU_TESTS / "test_gpu.py"],
            ["-m", "not gpu", "-k", "half_precision and not checkpointing", "-p", "no:xdist"],
        )
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "--tb=short", "-o", "addopts=--strict-markers"]
    compiling = []
    if task.device.type == "cuda":
        context = multiprocessing.get_context("fork")
        for index, name in enumerate(MODELS):
            arguments = (task.device, task.sizes, name, 15 * index)
            compiling.append(context.Process(target=compile_model, args=arguments))
            compiling[-1].start()
        task.save(notes=["During the tests, other processes compiled the models of later steps."])
    outcomes, written = {}, time.monotonic()
    try:
        with subprocess.Popen(
            [*command, "-p", "no:cacheprovider", *options, *map(str, files)],
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILE_THREADS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                if found := outcome_of(line):
                    outcomes |= [found]
                if time.monotonic() - written > 1:
                    task.save(**count_outcomes(outcomes))
                    written = time.monotonic()
    finally:
        for other in compiling:
            other.kill()
    task.save(**count_outcomes(outcomes), complete=True)
    if process.returncode:
        task.errors["pytest"] = f"It ended with status {process.returncode}; see the log."


def outcome_of(line: str) -> tuple[str, str] | None:
    """The test that a line of pytest's output is about, and its outcome."""
    found = OUTCOME_FIRST.match(line) or OUTCOME_LAST.match(line)
    return found and (found["test"], found["outcome"].lower())


def count_outcomes(outcomes: dict[str, str]) -> dict:
    """The number of tests by outcome, and the failed ones, from the outcome of each test."""
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in sorted(set(outcomes.values()))}
    return {"counts": counts, "failures": sorted(test for test, how in outcomes.items() if how in ("failed", "error"))}


def compile_model(device: torch.device, sizes: Sizes, name: str, delay: float) -> None:
    """Compile the training step of a model in all sizes, after a `delay` in seconds, when the others have allocated memory."""
    time.sleep(delay)
    torch._inductor.config.compile_threads = COMPILE_THREADS
    of_graphs = (list(sizes.batch)[-1], {"mode": "reduce-overhead"})
    for hidden, options in (*((hidden, {}) for hidden in sizes.batch), of_graphs):
        while device.type == "cuda" and torch.cuda.mem_get_info()[0] < FREE_BYTES:
            time.sleep(1)
        began = time.monotonic()
        try:
            candidates = make_candidates(device, sizes, hidden, (name,), **compile_options(sizes, **options))
            candidates[name].forward_and_backward()
            print(f"compiled: {name}, {hidden}, {options}, {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            print(f"not compiled: {name}, {hidden}, {options}: {sentence(error)}", flush=True)
        candidates = None
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compile_options(sizes: Sizes, mode: str | None = None) -> dict:
    """The arguments for compiling a model; the CPU has no modes."""
    return {"compile": True, "backend": sizes.backend, "mode": mode if sizes.backend == "inductor" else None}


def run_operation(task: Task) -> None:
    """Our own kernels at all widths first, then what they are compared with, whose tuning may exceed the time."""
    sizes, operations, missing, resources, known = task.sizes, {}, {}, {}, set()
    own = "triton" if task.device.type == "cuda" else "cpu"
    for names in ((own,), sizes.operation_others, (FLA,)):
        for width in sizes.operation_widths:
            other = {sizes.operation_others: ", plain PyTorch", (FLA,): ", one output"}
            title = f"width {width}{other.get(names, '')}"
            with task.part(title):
                shape = sizes.elements // width, width
                operation = Operation(sizes.entries, shape, sizes.dtype, task.device, sizes.copy_bytes)
                results, notes = measure_operation(operation, title, sizes.operation_rounds, 3, names)
                operations[title], implementations = results, results["forward"]["implementations"]
                bandwidth = results["forward"]["copied_bytes"] / implementations[COPY]["median"]
                resources[title] = resources_of_kernels(grn_triton, known)
                missing |= dict.fromkeys(notes)
                task.save(operation=operations, copy_bytes_per_second=bandwidth, notes=list(missing))
                task.save(resources={title: kernels for title, kernels in resources.items() if kernels})
                if own in names and own not in implementations:
                    raise RuntimeError(notes[0])
            operation = None


def resources_of_kernels(module, known: set[int]) -> list[dict]:
    """The resources of each compiled variant of a module's kernels whose `id` is not `known` yet."""
    found = []
    for name, kernel in vars(module).items():
        if not hasattr(kernel, "device_caches"):
            kernel = getattr(kernel, "fn", None)  # one that is tuned
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            for variant in cache.values():
                if id(variant) not in known:
                    known.add(id(variant))
                    found.append(
                        {
                            "kernel": name,
                            "warps": variant.metadata.num_warps,
                            "registers": variant.n_regs,
                            "spilled_registers": variant.n_spills,
                            "shared_bytes": variant.metadata.shared,
                        }
                    )
    return found


def make_candidates(
    device: torch.device, sizes: Sizes, hidden: int, names: tuple[str, ...] = MODELS, **options
) -> dict[str, Candidate]:
    layers = sizes.compiled_layers if options else sizes.layers
    models = build_models(sizes.vocab, hidden, layers, sizes.dtype, device, names)
    input_ids = torch.randint(sizes.vocab, (sizes.batch[hidden], sizes.seq), device=device)
    return {name: Candidate(model, input_ids, **options) for name, model in models.items()}


def run_models(task: Task, index: int, compile: bool = False, mode: str | None = None) -> None:
    """Speed and memory of the models of one width, taking turns."""
    sizes, device = task.sizes, task.device
    hidden = list(sizes.batch)[index]
    candidates = make_candidates(device, sizes, hidden, **(compile_options(sizes, mode) if compile else {}))
    how = ", compiled" * compile + f" ({mode})" * (mode is not None)
    layers = sizes.compiled_layers if compile else sizes.layers
    shape = f"{layers} layers x {hidden}, {sizes.batch[hidden]} x {sizes.seq} tokens"
    task.save(title=f"{shape}, {str(sizes.dtype).removeprefix('torch.')}{how}")
    first, spare = {}, 0.2 * task.left()
    for name in MODELS:
        if first and task.left() < spare + max(first.values()):
            task.errors[name] = "There was no time for it."
            continue
        with task.part(name):
            first[name] = seconds(candidates[name].forward_and_backward, device)
            task.save(first_seconds=first)
    subjects = {name: candidates[name] for name in first}
    tokens = sizes.batch[hidden] * sizes.seq
    measures = {}

    def measure(title: str, meter: Callable[[Candidate], float], tokens: int | None, rounds: int, warmup: int = 2):
        with task.part(title):
            values = interleave(title, subjects, meter, rounds, warmup)
            speed = tokens is not None
            measures[title] = {
                "title": title,
                "unit": "seconds" if speed else "bytes",
                "ratio_of": "speed" if speed else "size",
                "tokens": tokens,
                "models": summarize(values, BASELINE, speed),
            }
            task.save(measures=measures)

    measure("forward and backward", lambda one: seconds(one.forward_and_backward, device), tokens, sizes.rounds)
    measure("training step", MEASURES["training_step"].meter, tokens, sizes.rounds)
    measure("peak memory", MEASURES["peak_memory"].meter, None, 1)
    if not compile:
        measure("kept bytes", MEASURES["kept_bytes"].meter, None, 1, 0)
        for batch in sizes.decoded if index == 0 else ():
            for one in subjects.values():
                one.decode(batch, 2)

            def decode(one, batch=batch):
                return seconds(lambda: one.decode(batch, sizes.new_tokens), device)

            title = f"decoding, batch {batch}, {sizes.new_tokens} tokens after {PROMPT_TOKENS}"
            measure(title, decode, batch * sizes.new_tokens, 3, 0)


def run_profile(task: Task) -> None:
    """Which kernels a forward and backward pass of the larger models takes, in eager mode."""
    sizes, device = task.sizes, task.device
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiles = {}
    for name in ("standard", "full DCA", "2-DCA", BASELINE):
        with task.part(name):
            candidate = make_candidates(device, sizes, next(iter(sizes.batch)), (name,))[name]
            for _ in range(3):
                duration = seconds(candidate.forward_and_backward, device)
            with profile(activities=activities) as profiler:
                candidate.forward_and_backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            kernels = kernels_of(profiler.key_averages(), device)
            profiles[name] = {
                "seconds": duration,
                "device_seconds": sum(kernel["seconds"] for kernel in kernels),
                "launches": sum(kernel["launches"] for kernel in kernels),
                "kernels": kernels[:15],
            }
            task.save(profiles=profiles)
        candidate = profiler = None


def kernels_of(averages, device: torch.device) -> list[dict]:
    """Name, seconds and number of launches of each kernel (copies and fills included), the longest first; of each operator on the CPU."""
    on_gpu = device.type == "cuda"
    kernels = [
        {
            "name": textwrap.shorten(average.key, 120, placeholder=" ..."),
            "seconds": (average.self_device_time_total if on_gpu else average.self_cpu_time_total) / 1e6,
            "launches": average.count,
        }
        for average in averages
        if (average.device_type == DeviceType.CUDA) == on_gpu and not getattr(average, "is_user_annotation", False)
    ]
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])


def read_tokens(file: Path | None) -> tuple[Tensor, Tensor, int]:
    """
    Token ids to train on and held out, and how many there can be: those of the `file`, or, without one, the bytes of
    Python's standard library, which every machine has.
    """
    if file is not None:
        with np.load(file) as arrays:
            train, held_out = (torch.from_numpy(arrays[name].astype(np.int32)) for name in ("train", "held_out"))
            return train, held_out, int(arrays["vocab_size"])
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [b"".join(file.read_bytes() for file in files if (file in files[::10]) is held) for held in (True, False)]
    held_out, train = (torch.frombuffer(bytearray(part), dtype=torch.uint8).int() for part in parts)
    return train, held_out, 256


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, then constant, then a linear cool-down to zero; `step` counts from 0."""
    warmup, cooldown = max(1, min(200, steps // 10)), max(1, steps // 5)
    return min((step + 1) / warmup, 1.0, (steps - step) / cooldown)


class Learner:
    """
    A language model that is trained on text, and its losses.

    Args:
        scheme: its `residual_scheme`.
    """

    def __init__(self, scheme: str, task: Task, vocab_size: int):
        sizes = task.sizes
        config = DCAConfig(
            vocab_size=vocab_size,
            hidden_size=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_width // 64,
            max_position_embeddings=sizes.text_block,
            residual_scheme=scheme,
            use_cache=False,
        )
        torch.manual_seed(0)  # what the models share is the same in all of them
        self.model = DCAForCausalLM(config).to(task.device)
        self.bf16 = partial(torch.autocast, task.device.type, torch.bfloat16, task.device.type == "cuda")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.seconds, self.losses, self.curve = 0.0, [], []

    def loss(self, blocks: Tensor) -> Tensor:
        with self.bf16():
            return self.model(input_ids=blocks, labels=blocks).loss

    def step(self, blocks: Tensor, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        loss = self.loss(blocks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    @torch.no_grad()
    def figure(self, step: int, held_out: Tensor, batch: int) -> None:
        """Adds to the curve: step, seconds of training, mean loss of the steps since the last figure, held-out loss."""
        losses = [self.loss(blocks) for blocks in held_out.split(batch)]
        trained = torch.stack(self.losses).mean().item() if self.losses else None
        self.curve.append([step, self.seconds, trained, torch.stack(losses).mean().item()])
        self.losses.clear()


def run_text(task: Task) -> None:
    """The transformer with the residual sum and DCA, side by side on the same batches: as many steps as there is time for."""
    sizes, device = task.sizes, task.device
    train, held_out, vocab_size = read_tokens(task.data)
    train, held_out = (
        tokens[: len(tokens) // sizes.text_block * sizes.text_block].view(-1, sizes.text_block).to(device)
        for tokens in (train, held_out)
    )
    held_out = held_out[:: max(1, len(held_out) // sizes.text_held_out)][: sizes.text_held_out].long()
    learners = {scheme: Learner(scheme, task, vocab_size) for scheme in ("standard", "dca")}
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=generator)

    def blocks(step: int) -> Tensor:
        positions = (step * sizes.text_batch + torch.arange(sizes.text_batch)) % len(train)
        return train[order[positions].to(device)].long()

    # Kernels are chosen and compiled, and a step is timed, with weights that are not trained yet nor changed.
    durations = {}
    for name, learner in learners.items():
        for _ in range(3):
            durations[name] = seconds(lambda: learner.step(blocks(0), 0.0), device)  # noqa: B023
        learner.optimizer.state.clear()
        learner.losses.clear()
    steps = int(0.85 * task.left() / sum(durations.values()))  # the rest is for held-out losses
    steps = max(2, min(steps, sizes.text_most_steps))
    task.save(
        title=f"{sizes.text_layers} layers x {sizes.text_width}, {sizes.text_batch} x {sizes.text_block} tokens a step",
        vocab_size=vocab_size,
        data=None if task.data is None else task.data.name,
        training_tokens=train.numel(),
        held_out_tokens=held_out.numel(),
        parameters={name: learner.model.num_parameters() for name, learner in learners.items()},
        steps=steps,
    )
    for step in range(steps + 1):
        if step % sizes.text_figures == 0 or step == steps:
            for learner in learners.values():
                learner.figure(step, held_out, sizes.text_batch)
            task.save(curves={name: learner.curve for name, learner in learners.items()})
        if step < steps:
            batch, factor = blocks(step), learning_rate_factor(step, steps)
            for learner in learners.values():
                learner.seconds += seconds(lambda: learner.step(batch, factor), device)  # noqa: B023


class Step(NamedTuple):
    """What is done, and its share of the minutes."""

    run: Callable[[Task], Any]
    share: float
    help: str


#: In the order of what they are worth. Time that a step leaves over goes to those after it.
STEPS = {
    "tests": Step(run_tests, 170, "the tests marked gpu"),
    "operation": Step(run_operation, 40, "generalized residuals alone: share of the copy bandwidth"),
    "models": Step(partial(run_models, index=0), 60, "24 layers x 1,024: training, memory, decoding"),
    "profile": Step(run_profile, 20, "the kernels that a forward and backward pass takes"),
    "compiled": Step(partial(run_models, index=0, compile=True), 130, "12 layers x 1,024, compiled"),
    "narrow": Step(partial(run_models, index=1), 25, "24 layers x 512: training and memory"),
    "text": Step(run_text, 70, "6 layers x 512 on text, with the residual sum and with DCA"),
    "narrow compiled": Step(partial(run_models, index=1, compile=True), 60, "12 layers x 512, compiled"),
    "graphs": Step(
        partial(run_models, index=1, compile=True, mode="reduce-overhead"), 60, "12 layers x 512 in CUDA graphs"
    ),
}
