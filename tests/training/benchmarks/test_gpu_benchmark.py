"""All that a GPU is wanted for, on the CPU: the order and the time of the steps, what is left of them, and the steps at a tiny size."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.training.tiny import failure
from training.benchmarks import gpu, gpu_steps, operation
from training.benchmarks.gpu import GPUArguments, run_steps
from training.benchmarks.gpu_data import sources, write_tokens
from training.benchmarks.gpu_steps import STEPS, Record, Step, Task, count_outcomes, learning_rate_factor
from training.benchmarks.operation import COPY, FLA, Operation, measure_operation
from training.text.tokenizer import train_tokenizer


ROOT = Path(gpu.__file__).parents[2]


@pytest.fixture
def steps(monkeypatch):
    """Steps of the test, by name, in processes that know them."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(gpu, "LEAST", 0.0)

    def put(**steps):
        steps = {name.replace("_", " "): Step(run, share, "") for name, (run, share) in steps.items()}
        for module in (gpu, gpu_steps):
            monkeypatch.setattr(module, "STEPS", steps)

    return put


@pytest.fixture
def task(tmp_path):
    """A task to be run in the test's own process."""
    Record(tmp_path / "results.json", {"steps": {"tried": {}}})
    return Task("tried", tmp_path, "cpu", time.monotonic() + 100)


def read(folder):
    return json.loads((folder / "results.json").read_text())


def is_alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    # One that has ended and that nobody has asked for is there by its number alone.
    return ") Z" not in Path(f"/proc/{process_id}/stat").read_text()


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def good(task):
    before = task.record.read()
    task.save(figure=1.5, left=task.left(), before={name: step["status"] for name, step in before["steps"].items()})


def failing(task):
    task.save(figure=2.5)
    raise RuntimeError("no such\nkernel")


def failing_in_part(task):
    with task.part("second"):
        raise ValueError("too wide")
    task.save(figure=3.5)


def slow(task):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    task.save(figure=4.5, processes=[os.getpid(), child.pid])
    time.sleep(1000)


def dying(task):
    task.save(figure=5.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_steps_run_in_order_and_one_that_fails_does_not_keep_the_others_from_running(steps, tmp_path):
    steps(
        first=(good, 100), fails=(failing, 100), in_part=(failing_in_part, 100), slow=(slow, 10), dies=(dying, 100),
        last=(good, 100),
    )  # fmt: skip
    began = time.monotonic()
    run_steps(GPUArguments(minutes=0.5, device="cpu"), tmp_path)
    assert time.monotonic() - began < 25
    results = read(tmp_path)
    found = {name: (step["status"], step["result"]["figure"]) for name, step in results["steps"].items()}
    assert found == {
        "first": ("done", 1.5),
        "fails": ("failed", 2.5),
        "in part": ("done in part", 3.5),
        "slow": ("out of time", 4.5),
        "dies": ("failed", 5.5),
        "last": ("done", 1.5),
    }
    assert results["steps"]["fails"]["errors"] == {"step": "RuntimeError: no such kernel"}
    assert results["steps"]["in part"]["errors"] == {"second": "ValueError: too wide"}
    assert "RuntimeError: no such" in (tmp_path / "fails.log").read_text()
    assert not any(map(is_alive, results["steps"]["slow"]["result"]["processes"]))
    # Each step has found those before it done, and all of the time that they left over.
    last = results["steps"]["last"]["result"]
    assert last["before"] == {
        **{name: status for name, (status, _) in found.items() if name != "last"}, "last": "running"
    }  # fmt: skip
    assert last["left"] > results["steps"]["first"]["result"]["left"]
    shown = (tmp_path / "README.md").read_text()
    assert "## In part" in shown and "- second: ValueError: too wide" in shown and "out of time" in shown


def test_each_step_has_its_share_of_what_is_left(steps, tmp_path):
    steps(a=(good, 1), b=(good, 2), c=(good, 1))
    run_steps(GPUArguments(minutes=1, device="cpu"), tmp_path)
    allowed = [step["allowed_seconds"] for step in read(tmp_path)["steps"].values()]
    assert allowed == pytest.approx([15, 40, 60], abs=3)


def test_no_step_begins_after_the_last_minute(steps, tmp_path):
    steps(slow=(slow, 1000), late=(good, 1))
    gpu.LEAST = 1.0
    run_steps(GPUArguments(minutes=3 / 60, device="cpu"), tmp_path)
    assert [step["status"] for step in read(tmp_path)["steps"].values()] == ["out of time", "not reached"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_what_was_measured_and_no_process(steps, tmp_path, how):
    steps(first=(good, 1), slow=(slow, 100), last=(good, 1))

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # (which what runs in the background ignores)
        run_steps(GPUArguments(minutes=5, device="cpu"), tmp_path)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    wait_for(lambda: (tmp_path / "slow.log").exists() and "result" in read(tmp_path)["steps"]["slow"])
    os.kill(process.pid, how)
    process.join()
    results = read(tmp_path)["steps"]
    assert [step["status"] for step in results.values()] == [
        "done", "interrupted" if how == signal.SIGINT else "running", "not reached"
    ]  # fmt: skip
    assert results["first"]["result"]["figure"] == 1.5 and results["slow"]["result"]["figure"] == 4.5
    wait_for(lambda: not any(map(is_alive, results["slow"]["result"]["processes"])))


def test_the_file_of_results_is_replaced_at_once(tmp_path, monkeypatch):
    record = Record(tmp_path / "results.json", {"steps": {"a": {"status": "running"}}})
    monkeypatch.setattr(os, "replace", lambda *files: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.update("a", result={"figure": 1})
    assert record.read() == {"steps": {"a": {"status": "running"}}}


def test_steps_import_anew_where_forks_cannot_use_the_device(monkeypatch):
    def context(method):
        found = multiprocessing.context._default_context.get_context("fork")
        return SimpleNamespace(method=method, Process=found.Process, set_forkserver_preload=lambda modules: None)

    monkeypatch.setattr(gpu.multiprocessing, "get_context", context)
    assert gpu.context_for("cpu").method == "forkserver"
    assert gpu.context_for("xpu").method == "spawn"


@pytest.mark.slow
def test_every_step_at_a_tiny_size(tmp_path):
    command = [sys.executable, "-m", "training.benchmarks.gpu", "--minutes", "4", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "runs" / "benchmarks" / "gpu"
    steps = read(folder)["steps"]
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(STEPS, "done")
    assert steps["tests"]["result"]["counts"].keys() == {"passed"}
    shares = steps["operation"]["result"]["operation"]["width 64"]["forward"]["implementations"]
    assert shares.keys() == {COPY, "cpu"} and steps["operation"]["result"]["copy_bytes_per_second"] > 0
    measures = ["forward and backward", "training step", "peak memory"]
    decoding = [f"decoding, batch {batch}, 4 tokens after 64" for batch in (1, 2)]
    for name, more in {
        "models": ["kept bytes", *decoding], "narrow": ["kept bytes"], "compiled": [], "narrow compiled": [], "graphs": []
    }.items():  # fmt: skip
        found = steps[name]["result"]["measures"]
        assert list(found) == measures + more
        assert all(measure["models"].keys() == set(gpu_steps.MODELS) for measure in found.values())
    assert steps["profile"]["result"]["profiles"].keys() == set(gpu_steps.MODELS)
    assert steps["text"]["result"]["curves"].keys() == {"standard", "dca"}
    shown = (folder / "README.md").read_text()
    assert re.findall("^## (.*)", shown, flags=re.MULTILINE) == [name.capitalize() for name in STEPS]
    assert (folder / "loss.png").exists() and "error" not in result.stderr.lower()


def test_both_models_learn_from_the_same_text(task):
    STEPS["text"].run(task)
    result = task.record.read()["steps"]["tried"]["result"]
    standard, dca = result["curves"]["standard"], result["curves"]["dca"]
    assert [figures[0] for figures in standard] == [figures[0] for figures in dca] == [0, 5, 10, 15, 20]
    # At its start DCA is the sum; then both learn, each in its own way.
    assert dca[0][3] == pytest.approx(standard[0][3], rel=1e-5)
    assert standard[-1][3] < standard[0][3] - 0.5 and dca[-1][3] < dca[0][3] - 0.5 and dca[-1] != standard[-1]
    assert dca[-1][1] > dca[1][1] > 0 == dca[0][1]
    assert result["steps"] == 20 and result["vocab_size"] == 256 and result["training_tokens"] > 10**5


def test_text_is_taken_from_the_file_of_token_ids(task, tmp_path):
    np.savez(tmp_path / "text.npz", train=np.arange(200, dtype=np.uint16), held_out=np.full(70, 7), vocab_size=300)
    task.data = tmp_path / "text.npz"
    train, held_out, vocab_size = gpu_steps.read_tokens(task.data)
    assert train.tolist() == list(range(200)) and held_out.tolist() == [7] * 70 and vocab_size == 300
    STEPS["text"].run(task)
    result = task.record.read()["steps"]["tried"]["result"]
    assert (result["data"], result["training_tokens"], result["held_out_tokens"]) == ("text.npz", 192, 64)


def test_learning_rate_warms_up_and_cools_down():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:2] == [0.1, 0.2] and set(factors[9:80]) == {1.0} and factors[-1] == 0.05


def test_compiling_beside_the_tests(capfd):
    sizes = gpu_steps.SIZES["cpu"]._replace(batch={64: 1})
    gpu_steps.compile_model(torch.device("cpu"), sizes, "2-DCA", 0)
    gpu_steps.compile_model(torch.device("cpu"), sizes._replace(backend="none"), "2-DCA", 0)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["compiled"] * 2 + ["not compiled"] * 2


def test_models_for_which_there_is_no_time_are_named(task):
    task.deadline = time.monotonic() - 1
    gpu_steps.run_models(task, index=1)
    step = task.record.read()["steps"]["tried"]
    assert step["errors"] == dict.fromkeys(gpu_steps.MODELS[1:], "There was no time for it.")
    assert step["result"]["measures"]["training step"]["models"].keys() == {"Llama"}


def test_a_model_that_fails_leaves_the_others(task, monkeypatch):
    forward = gpu_steps.Candidate.forward_and_backward

    def broken(candidate):
        if candidate.model.config.model_type == "dca" and candidate.model.config.last_k == 2:
            raise RuntimeError("out of memory")
        forward(candidate)

    monkeypatch.setattr(gpu_steps.Candidate, "forward_and_backward", broken)
    gpu_steps.run_models(task, index=1)
    step = task.record.read()["steps"]["tried"]
    assert step["errors"] == {"2-DCA": "RuntimeError: out of memory"}
    assert step["result"]["measures"]["training step"]["models"].keys() == {"Llama", "full DCA", "standard"}


@pytest.mark.parametrize(
    ("line", "outcome", "test"),
    [
        ("[gw3] [ 12%] PASSED tests/modeling_dca/test_gpu.py::test_a[cuda-1, 2] ", "passed", "tests/modeling_dca/test_gpu.py::test_a[cuda-1, 2]"),
        ("[gw0] [100%] FAILED tests/modeling_dca/test_gpu.py::test_b ", "failed", "tests/modeling_dca/test_gpu.py::test_b"),
        ("tests/modeling_dca/test_gpu.py::test_a[cuda-1, 2] PASSED      [ 12%]", "passed", "tests/modeling_dca/test_gpu.py::test_a[cuda-1, 2]"),
        ("tests/modeling_dca/test_gpu.py::test_c SKIPPED (no GPU)    [ 13%]", "skipped", "tests/modeling_dca/test_gpu.py::test_c"),
        ("ERROR tests/modeling_dca/test_gpu.py - ImportError: no module", "error", "tests/modeling_dca/test_gpu.py"),
        ("FAILED tests/modeling_dca/test_gpu.py::test_b - assert 1 == 2", "failed", "tests/modeling_dca/test_gpu.py::test_b"),
    ],
)  # fmt: skip
def test_outcomes_are_read_from_what_pytest_prints(line, outcome, test):
    assert gpu_steps.outcome_of(line) == (test, outcome)
    assert gpu_steps.outcome_of(f"  assert 'PASSED' == '{line}'") is None


def test_outcomes_are_counted():
    counted = count_outcomes({"a": "passed", "b": "failed", "c": "passed", "d": "error"})
    assert counted == {"counts": {"error": 1, "failed": 1, "passed": 2}, "failures": ["b", "d"]}


def test_kernels_are_those_of_the_device():
    def average(key, where, microseconds, count):
        return SimpleNamespace(
            key=key, device_type=where, self_device_time_total=microseconds, self_cpu_time_total=7, count=count
        )

    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    averages = [average("short", on_gpu, 10, 3), average("aten::mm", on_cpu, 90, 1), average("long", on_gpu, 2e6, 1)]
    assert gpu_steps.kernels_of(averages, torch.device("cuda")) == [
        {"name": "long", "seconds": 2, "launches": 1},
        {"name": "short", "seconds": 1e-5, "launches": 3},
    ]
    assert [kernel["name"] for kernel in gpu_steps.kernels_of(averages, torch.device("cpu"))] == ["aten::mm"]


def test_resources_are_those_of_new_variants():
    def variant(warps, registers):
        metadata = SimpleNamespace(num_warps=warps, shared=512)
        return SimpleNamespace(metadata=metadata, n_regs=registers, n_spills=8)

    kernel = SimpleNamespace(device_caches={0: ({"a": variant(2, 64)}, "more")}, fn=None)
    tuned = SimpleNamespace(fn=SimpleNamespace(device_caches={0: ({"b": variant(4, 99)}, "more")}))
    module, known = SimpleNamespace(forward=kernel, helper=len, backward=tuned), set()
    found = gpu_steps.resources_of_kernels(module, known)
    assert [tuple(each.values()) for each in found] == [("forward", 2, 64, 8, 512), ("backward", 4, 99, 8, 512)]
    kernel.device_caches[0][0]["c"] = variant(8, 128)
    assert [each["registers"] for each in gpu_steps.resources_of_kernels(module, known)] == [128]


def test_attnres_has_one_output(monkeypatch):
    module = SimpleNamespace(fused_attnres=lambda query, stack, weight: sum(stack) * query.sum())
    for name in ("fla", "fla.ops", "fla.ops.attnres"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(operation, "COPY_BYTES", 2**16)
    subject = Operation(3, (1, 4, 8), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(subject, "implementations", lambda names: ({FLA: subject._attnres}, []))
    monkeypatch.setattr(operation, "seconds", lambda run, device: (run(), 2.0)[1])
    results, _ = measure_operation(subject, "test", rounds=1, warmup=1, names=[FLA])
    # Read three entries of 128 bytes, write one; read three and the output's gradient, write three.
    for direction, entries in (("forward", 4), ("backward", 7)):
        shares = results[direction]["implementations"][FLA]["shares"]
        assert shares == [entries * 128 / (2 * 2**16)]


def test_text_is_written_as_token_ids(tmp_path):
    texts = ["deep cross attention " * 40, "größe 🙂 <|endoftext|>\n" * 30]
    write_tokens(tmp_path / "room" / "text.npz", texts, texts[::-1], 300, 280)
    train, held_out, vocab_size = gpu_steps.read_tokens(tmp_path / "room" / "text.npz")
    assert vocab_size == 300 and len(train) == len(held_out) == 280
    tokenizer = train_tokenizer(iter(texts), 300, 512)
    for tokens, (first, second) in ((train, texts), (held_out, texts[::-1])):
        tokens = tokens.tolist()
        end = tokens.index(tokenizer.eos_token_id)
        assert tokenizer.decode(tokens[:end]) == first
        # (The last token may be a part of a character.)
        assert second.startswith(tokenizer.decode(tokens[end + 1 :]).rstrip("\ufffd")) and len(tokens) - end > 50
    assert [file.name for file in (tmp_path / "room").iterdir()] == ["text.npz"]


def test_sources_of_packages(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    for name, text in {"__init__.py": "", "a.py": "x = 1", "b.py": "x = 1", "c.py": "y = 2", "d.py": "z = 3"}.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(sources(["some_package"], {"z = 3"})) == ["x = 1", "y = 2"]


def test_the_steps_need_nothing_that_a_bare_machine_lacks():
    program = """
import sys
for name in ("datasets", "evaluate", "sklearn", "scipy", "pandas", "pyarrow", "tensorboard"):
    sys.modules[name] = None  # makes the import fail
import training.benchmarks.gpu
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (gpu.main, "--minutes 0", "`minutes` is 0; it must be more than 0."),
        (gpu.main, "--minutes nan", "`minutes` is nan; it must be more than 0."),
        (gpu.main, "--only profil", "`only` names 'profil'; did you mean 'profile'?"),
        (gpu.main, "--data none.npz", "`data` is 'none.npz', which is not a file: `make gpu-data` writes data/gpu/text.npz."),
        (gpu.main, "--device cuda", "`device` is 'cuda', but PyTorch finds no GPU here: pass --device cpu"),
        (gpu.main, "--device cpu --output_dir full", "`output_dir` is 'full', which holds results"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_a_sentence(main, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    assert failure(capsys, main, *arguments.split()).startswith(f"error: {message}")
