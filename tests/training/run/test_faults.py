"""Runs that are killed, terminated, out of disk space, or given a spoiled checkpoint; and one of two processes that dies."""

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import trainer_utils

from tests.training.processes import ended, fork, forked, wait
from tests.training.tiny import TEXT_RUN, call, refusal, snapshot, write_room
from training import causal_lm
from training.results.record import DIVERGED
from training.run.checkpoints import (
    MANIFEST,
    UNFINISHED,
    checkpoints,
    checksum,
    damage,
    files_below,
    finish_checkpoint,
    rotate_checkpoints,
    told_if_not_written,
)
from training.run.trainer import RunTrainer
from training.run.training import mean_logged_loss
from training.support import errors
from training.support.errors import UserError, command


pytestmark = pytest.mark.usefixtures("offline")
ROOT = Path(__file__).parents[3]

# An evaluation and a checkpoint after steps 2, 4 and 6, of which one is kept; and dropout, which draws in every step.
OPTIONS = (
    *(TEXT_RUN, "--output_dir=run", "--attention_dropout=0.2"),
    *("--eval_strategy=steps", "--eval_steps=2", "--save_total_limit=1"),
)
COMPARISON = (TEXT_RUN, "--output_dir=run", "--baseline=standard")
RESUME = "--resume_from_checkpoint"

# What Python tells an audit hook of the file system.
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


@pytest.fixture
def finished(comparison, room):
    """The room of a finished comparison, of its own."""
    shutil.copytree(comparison[0] / "run", room / "run")
    return room


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of the run that nothing happened to."""
    room = tmp_path_factory.mktemp("uninterrupted")
    write_room(room)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        call(causal_lm.main, *OPTIONS)
    return room / "run"


def assert_same_run(first, second):
    """What two runs have come to is equal to the last byte, and neither holds more than the other."""
    names = [sorted(path for path in snapshot(folder) if not path.startswith("runs/")) for folder in (first, second)]
    assert names[0] == names[1]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    figures = [json.loads((folder / "all_results.json").read_text()) for folder in (first, second)]
    for name in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert figures[0][name] == figures[1][name]
    assert figures[0]["train_loss"] > 0 and figures[1]["train_loss"] > 0
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (first, second)]
    for name in ("loss", "eval_loss"):
        values = [[entry[name] for entry in history if name in entry] for history in histories]
        assert values[0] == values[1], name


# The moments at which something happens to a run. Each arranges that `happen` is called then, in the process it is in.


def in_call(method, number):
    """Before the call of that number of a method of the trainer."""

    def arrange(happen):
        original, calls = getattr(RunTrainer, method), []

        def counted(self, *args, **kwargs):
            calls.append(None)
            if len(calls) == number:
                happen()
            return original(self, *args, **kwargs)

        setattr(RunTrainer, method, counted)

    return arrange


def at_file_event(event, path, number=1):
    """Before the file is opened, renamed or removed, whose path ends so, for the time of that number."""

    def arrange(happen):
        calls = []

        def hook(name, arguments):
            if name == event and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).endswith(path):
                calls.append(None)
                if len(calls) == number:
                    happen()

        sys.addaudithook(hook)

    return arrange


def half_way_in(name):
    """When the file of that name of the second checkpoint is half written."""

    def arrange(happen):
        save = torch.save

        def broken_off(value, file, *args, **kwargs):
            save(value, file, *args, **kwargs)
            if str(file).endswith(f"checkpoint-4/{name}"):
                os.truncate(file, os.path.getsize(file) // 2)
                happen()

        torch.save = broken_off

    return arrange


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


MOMENTS = {
    "before the first step": (in_call("training_step", 1), None),
    "in training, before there is a checkpoint": (in_call("training_step", 2), None),
    "in training": (in_call("training_step", 4), 2),
    "in the evaluation of a step": (in_call("prediction_step", 9), 2),
    "half way in a file of a checkpoint": (half_way_in("optimizer.pt"), 2),
    "before the manifest": (at_file_event("open", f"checkpoint-4/{MANIFEST}"), 2),
    "before a checkpoint has its name": (at_file_event("os.rename", f"{UNFINISHED}/checkpoint-4"), 2),
    "before an old checkpoint is deleted": (at_file_event("os.rename", "run/checkpoint-2"), 4),
    "while an old checkpoint is deleted": (at_file_event("os.remove", "optimizer.pt"), 4),
    "before the figures": (at_file_event("open", "run/.train_results.json.unfinished"), 6),
    "while the figures are written": (at_file_event("os.rename", "run/.all_results.json.unfinished"), 6),
    "while the model is saved": (at_file_event("open", f"{UNFINISHED}/model/config.json"), 6),
    "while the saved model is moved": (at_file_event("os.rename", f"{UNFINISHED}/model/tokenizer.json"), 6),
    "before the weights are moved": (at_file_event("os.rename", f"{UNFINISHED}/model/model.safetensors"), 6),
    "in the last evaluation": (in_call("prediction_step", 19), 6),
    "in the model card": (at_file_event("open", "run/README.md"), 6),
}


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_whole(folder: Path) -> int | None:
    """The step of the last checkpoint, if there is one. What is named a checkpoint is whole."""
    found = checkpoints(folder)
    assert [damage(checkpoint) for checkpoint in found] == [None] * len(found)
    assert all((checkpoint / MANIFEST).exists() for checkpoint in found)
    return max(map(step, found), default=None)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_is_resumed_to_the_same_end(room, uninterrupted, moment):
    arrange, last = MOMENTS[moment]
    status, printed = forked(lambda: (arrange(kill), call(causal_lm.main, *OPTIONS)))
    assert status == -signal.SIGKILL, printed
    assert last_whole(room / "run") == last
    if last == 6 and "model" in moment and "card" not in moment:
        assert not (room / "run" / "model.safetensors").exists()
    # What may be left of a checkpoint by more processes than resume the run does not become part of one.
    (room / "run" / UNFINISHED / "checkpoint-6").mkdir(parents=True, exist_ok=True)
    (room / "run" / UNFINISHED / "checkpoint-6" / "rng_state_1.pth").touch()
    call(causal_lm.main, *OPTIONS, RESUME)
    assert_same_run(room / "run", uninterrupted)


@pytest.mark.slow
def test_run_that_is_killed_at_any_access_to_its_files_is_resumed_to_the_same_end(room, uninterrupted):
    """Also where a run is killed again while it is resumed."""

    def watched(number, *arguments):
        """The run, killed at the access of that number; the number of all accesses as the status, if there are fewer."""
        count = 0

        def hook(event, arguments):
            nonlocal count
            # (The files in a folder that is deleted have no path.)
            if event in FILE_EVENTS and ("run" in Path(str(arguments[0])).parts or event in ("os.remove", "os.rmdir")):
                count += 1
                if count == number:
                    kill()

        sys.addaudithook(hook)
        call(causal_lm.main, *OPTIONS, *arguments)

    killed = 0
    for number in range(1, 1000, 11):
        shutil.rmtree(room / "run", ignore_errors=True)
        status, printed = forked(lambda number=number: watched(number))
        if status == 0:
            break
        killed += 1
        assert status == -signal.SIGKILL, printed
        if (room / "run" / "run.yaml").exists():
            status, printed = forked(lambda number=number: watched(number % 37, RESUME))
            assert status in (0, -signal.SIGKILL), (number, printed)
            last_whole(room / "run")
            call(causal_lm.main, *OPTIONS, RESUME)
            assert_same_run(room / "run", uninterrupted)
    assert killed > 20


def test_killed_run_on_a_stream_is_resumed_to_the_same_end(room):
    call(causal_lm.main, *OPTIONS, "--streaming", "--output_dir=uninterrupted")
    arrange, last = MOMENTS["half way in a file of a checkpoint"]
    status, printed = forked(lambda: (arrange(kill), call(causal_lm.main, *OPTIONS, "--streaming")))
    assert status == -signal.SIGKILL, printed
    assert last_whole(room / "run") == last
    call(causal_lm.main, *OPTIONS, "--streaming", RESUME)
    assert_same_run(room / "run", room / "uninterrupted")


def test_killed_baseline_is_resumed_to_the_same_end(room, comparison):
    options = (TEXT_RUN, "--output_dir=run", "--baseline=standard", "--report_to=tensorboard")
    arrange, last = MOMENTS["half way in a file of a checkpoint"]
    status, printed = forked(lambda: (arrange(kill), call(causal_lm.main, *options)))
    assert status == -signal.SIGKILL, printed
    assert last_whole(room / "run" / "standard") == last
    call(causal_lm.main, *options, RESUME)
    for folder in ("run", "run/standard"):
        assert (room / folder / "model.safetensors").read_bytes() == (
            comparison[0] / folder / "model.safetensors"
        ).read_bytes()
    assert not list((room / "run").rglob(UNFINISHED))


def test_run_that_is_killed_while_its_record_is_written_again_has_the_one_before(finished):
    before = (finished / "run" / "run.yaml").read_bytes()
    arrange = at_file_event("os.rename", "run/.run.yaml.unfinished")
    status, printed = forked(lambda: (arrange(kill), call(causal_lm.main, *COMPARISON, RESUME)))
    assert status == -signal.SIGKILL, printed
    assert (finished / "run" / "run.yaml").read_bytes() == before
    call(causal_lm.main, *COMPARISON, RESUME)


def test_loss_of_a_run_that_was_killed_before_its_figures():
    history = [{"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 6.0}]
    assert mean_logged_loss(history) == 4.0


# SIGTERM


@pytest.mark.parametrize(
    ("moment", "number", "written"),
    [
        ("in training", 4, True),
        ("in the evaluation of a step", 4, True),
        ("half way in a file of a checkpoint", None, True),
        ("before a checkpoint has its name", 4, True),
        ("before an old checkpoint is deleted", 4, True),
        ("before the weights are moved", 6, False),
        ("in the last evaluation", 6, False),
        ("in the model card", 6, False),
    ],
)
def test_terminated_run_leaves_a_checkpoint_and_is_resumed_to_the_same_end(
    room, uninterrupted, moment, number, written
):
    if number is None:
        arrange, number = at_file_event("open", "checkpoint-4/optimizer.pt"), 4
    else:
        arrange = MOMENTS[moment][0]
    status, printed = forked(lambda: (arrange(terminate), call(causal_lm.main, *OPTIONS)))
    assert status == 143, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed and "terminated" in line
    assert (f"run/checkpoint-{number} was written" in line and RESUME in line) == written
    assert last_whole(room / "run") == number
    assert [path.name for path in checkpoints(room / "run")] == [f"checkpoint-{number}"]
    call(causal_lm.main, *OPTIONS, RESUME)
    assert_same_run(room / "run", uninterrupted)


def test_terminated_run_saves_a_step_that_was_not_to_be_saved(room, uninterrupted):
    arrange = in_call("training_step", 3)
    options = (*OPTIONS, "--logging_steps=5")
    status, printed = forked(lambda: (arrange(terminate), call(causal_lm.main, *options)))
    assert status == 143 and "run/checkpoint-3 was written" in printed
    assert last_whole(room / "run") == 3
    state = json.loads((room / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert "loss" in [entry for entry in state["log_history"] if entry["step"] == 3][-1]  # nothing logged is lost
    call(causal_lm.main, *options, RESUME)
    assert (room / "run" / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_second_signal_does_not_break_the_checkpoint_off(room, uninterrupted):
    def arrange():
        in_call("training_step", 3)(terminate)
        at_file_event("open", f"checkpoint-3/{MANIFEST}")(terminate)

    status, printed = forked(lambda: (arrange(), call(causal_lm.main, *OPTIONS)))
    assert status == 143 and "run/checkpoint-3 was written" in printed
    assert last_whole(room / "run") == 3


def test_weights_that_are_not_finite_are_not_saved_at_the_end_either(room):
    def spoil():
        training_step = RunTrainer.training_step

        def spoiled(self, model, *args, **kwargs):
            loss = training_step(self, model, *args, **kwargs)
            if self.state.global_step == 2:
                next(model.parameters()).data[0] = torch.nan
                terminate()
            return loss

        RunTrainer.training_step = spoiled

    status, printed = forked(lambda: (spoil(), call(causal_lm.main, *OPTIONS)))
    assert status == 2 and "weights became NaN" in printed
    assert last_whole(room / "run") == 2


def test_signal_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)

    @command
    def main():
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


# A real process, killed and terminated at a moment that nobody chose

LONG = (TEXT_RUN, "--output_dir=run", "--max_steps=150", "--save_steps=10", "--attention_dropout=0.2")


def wait_for(path: Path, running):
    end = time.monotonic() + 100
    while not path.exists():
        assert running() and time.monotonic() < end
        time.sleep(0.005)


def test_process_that_is_terminated_and_then_killed_is_resumed_to_the_same_end(room):
    printed = Path("printed.txt")

    def started_until(checkpoint, *arguments):
        process = fork(lambda: call(causal_lm.main, *LONG, *arguments), printed)
        wait_for(room / "run" / checkpoint, lambda: ended(process) is None)
        return process

    process = started_until("checkpoint-10")
    os.kill(process, signal.SIGTERM)
    assert wait(process) == 143, printed.read_text()
    last = checkpoints(room / "run")[-1]
    assert f"run/{last.name} was written" in error_of(printed.read_text())
    assert damage(last) is None

    process = started_until(f"checkpoint-{step(last) // 10 * 10 + 30}", RESUME)
    os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    assert not (room / "run" / "model.safetensors").exists(), "The run was too fast to be killed."
    call(causal_lm.main, *LONG, RESUME)
    call(causal_lm.main, *LONG, "--output_dir=uninterrupted")
    weights = [(room / name / "model.safetensors").read_bytes() for name in ("run", "uninterrupted")]
    assert weights[0] == weights[1]


# A disk that is full


def assert_told_and_resumed(room, printed, status, uninterrupted, *words):
    assert status == 2 and "Traceback" not in printed, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    for word in ("could not be written to run", *words):
        assert word in line, line
    assert not (room / "run" / UNFINISHED).exists()
    call(causal_lm.main, *OPTIONS, RESUME)
    assert_same_run(room / "run", uninterrupted)


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json", MANIFEST])
def test_device_is_full_while_a_checkpoint_is_saved(room, uninterrupted, file):
    """Linux has a device that is always full."""

    def arrange():
        def link(self, *args, **kwargs):
            if self.state.global_step == 4:
                folder = Path("run", UNFINISHED, "checkpoint-4")
                folder.mkdir(parents=True)
                (folder / file).symlink_to("/dev/full")
            return save_checkpoint(self, *args, **kwargs)

        save_checkpoint, RunTrainer._save_checkpoint = RunTrainer._save_checkpoint, link

    status, printed = forked(lambda: (arrange(), call(causal_lm.main, *OPTIONS)))
    assert last_whole(room / "run") == 2
    words = ("The checkpoint of step 4", "run/checkpoint-2 is intact", RESUME, "MB are free")
    assert_told_and_resumed(room, printed, status, uninterrupted, *words)


@pytest.mark.parametrize(("size", "words"), [(8_000, ["There is no checkpoint yet", "--overwrite"])])
def test_file_may_not_be_as_large_as_a_checkpoint_is(room, size, words):
    def arrange():
        def limit(self, *args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return save_checkpoint(self, *args, **kwargs)

        save_checkpoint, RunTrainer._save_checkpoint = RunTrainer._save_checkpoint, limit

    status, printed = forked(lambda: (arrange(), call(causal_lm.main, *OPTIONS)))
    assert status == 2 and "Traceback" not in printed, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    for word in ("The checkpoint of step 2 could not be written to run", *words):
        assert word in line, line


@pytest.mark.parametrize(
    ("error", "only_if_full", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True, True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True, True),
        (SafetensorError("I/O error: Input/output error (os error 5)"), False, True),
        (OSError(errno.EIO, "Input/output error"), False, True),
        # What went wrong in reading the data or a checkpoint, and what is no matter of files.
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True, False),
        (SafetensorError("Error while deserializing header"), True, False),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, False),
        (CheckpointException("", {1: (OSError(errno.ENOSPC, "No space left on device"), None)}), False, True),
        (CheckpointException("", {1: (ValueError("shapes differ"), None)}), False, False),
    ],
)
def test_which_errors_are_of_writing(tmp_path, error, only_if_full, told):
    expected = pytest.raises(UserError if told else type(error))
    with expected as caught, told_if_not_written("A file", tmp_path, only_if_full=only_if_full):
        raise error
    assert not told or f"A file could not be written to {tmp_path}" in str(caught.value)


def mount_small_disk(folder: str, size: int):
    """Mount a disk of so many bytes in this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x20000, 1 << 18 | 1 << 14
    if libc.unshare(new_mounts) != 0 and libc.unshare(new_user | new_mounts) != 0:
        return False
    libc.mount(b"none", b"/", None, private, None)
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (in_call("_save_checkpoint", 2), ("The checkpoint of step 4", "run/checkpoint-2 is intact")),
        (in_call("save_model", 4), ("The trained model", "run/checkpoint-6 is intact")),
        (in_call("save_metrics", 1), ("The logs or results", "run/checkpoint-6 is intact")),
    ],
)
def test_disk_is_full(room, uninterrupted, moment, words):
    def fill():
        with contextlib.suppress(OSError), open("run/other_data", "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass

    def work():
        os.mkdir("run")
        if not mount_small_disk("run", 4_000_000):
            raise SystemExit(77)
        moment(fill)
        status = 0
        try:
            call(causal_lm.main, *OPTIONS)
        except SystemExit as exit:
            status = exit.code
        os.remove("run/other_data")
        shutil.copytree("run", "kept")  # the disk goes with the process
        raise SystemExit(status)

    status, printed = forked(work)
    if status == 77:
        pytest.skip("This system lets no user mount a disk.")
    os.rmdir("run")
    os.rename("kept", "run")
    assert_told_and_resumed(room, printed, status, uninterrupted, *words, RESUME, "No space left")


# Checkpoints that are not as they were written


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "has changed since it was written"),
    "cut": (lambda file: os.truncate(file, file.stat().st_size - 1), "has changed since it was written"),
    "longer": (lambda file: file.open("ab").write(b"0"), "has changed since it was written"),
    "gone": (lambda file: file.unlink(), "is missing"),
}
DAMAGED_FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
CELLS = [(kind, file, named) for kind in DAMAGES for file in DAMAGED_FILES for named in ("", "=run/checkpoint-6")]
#: Each damage, each file and both ways to name the checkpoint once.
DIAGONAL = list(zip(DAMAGES, DAMAGED_FILES, ("", "=run/checkpoint-6") * 2))


@pytest.mark.parametrize(
    ("kind", "file", "named"),
    [pytest.param(*cell, marks=[] if cell in DIAGONAL else pytest.mark.slow) for cell in CELLS],
)
def test_damaged_checkpoint_is_refused_and_the_one_before_offered(finished, capsys, kind, file, named):
    damage_file, words = DAMAGES[kind]
    damage_file(finished / "run" / "checkpoint-6" / file)
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME + named)
    assert f"run/checkpoint-6/{file} {words}" in line
    assert f"resume from there with {RESUME}=run/checkpoint-4." in line


def test_offer_of_a_whole_checkpoint_holds(finished, comparison, capsys):
    for number in (4, 6):
        flip(finished / "run" / f"checkpoint-{number}" / "model.safetensors")
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME)
    offer = f"{RESUME}=run/checkpoint-2"
    assert f"{offer}." in line
    call(causal_lm.main, *COMPARISON, offer)
    # What was damaged has been written again.
    assert last_whole(finished / "run") == 6
    for folder in ("run", "run/checkpoint-4", "run/checkpoint-6"):
        file = Path(folder, "model.safetensors")
        assert (finished / file).read_bytes() == (comparison[0] / file).read_bytes()


def test_checkpoint_before_a_damaged_one_is_offered_rather_than_one_after_it(finished, capsys):
    flip(finished / "run" / "checkpoint-4" / "model.safetensors")
    line = refusal(capsys, causal_lm.main, *COMPARISON, f"{RESUME}=run/checkpoint-4")
    assert f"{RESUME}=run/checkpoint-2." in line


def test_first_checkpoint_that_is_damaged_is_no_reason_to_start_again(finished, capsys):
    flip(finished / "run" / "checkpoint-2" / "model.safetensors")
    line = refusal(capsys, causal_lm.main, *COMPARISON, f"{RESUME}=run/checkpoint-2")
    assert f"{RESUME}=run/checkpoint-6." in line
    flip(finished / "run" / "checkpoint-4" / "model.safetensors")
    flip(finished / "run" / "checkpoint-6" / "model.safetensors")
    line = refusal(capsys, causal_lm.main, *COMPARISON, f"{RESUME}=run/checkpoint-2")
    assert "start again with --overwrite." in line


def test_damaged_checkpoint_of_the_baseline_is_refused_too(finished, capsys):
    flip(finished / "run" / "standard" / "checkpoint-6" / "optimizer.pt")
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME)
    assert f"{RESUME}=run/standard/checkpoint-4." in line


def test_without_a_whole_checkpoint_a_run_is_started_again(finished, capsys):
    for number in (2, 4, 6):
        flip(finished / "run" / f"checkpoint-{number}" / "model.safetensors")
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME)
    assert "No other checkpoint is intact: start again with --overwrite." in line and "checkpoint-4" not in line


def test_missing_manifest_is_told_where_earlier_checkpoints_have_one(finished, capsys):
    (finished / "run" / "checkpoint-6" / MANIFEST).unlink()
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME)
    assert f"run/checkpoint-6/{MANIFEST} is missing" in line and f"{RESUME}=run/checkpoint-4" in line


@pytest.mark.parametrize("change", [flip, lambda file: os.truncate(file, 10), lambda file: file.write_text("[]")])
def test_damaged_manifest_is_refused(finished, capsys, change):
    change(finished / "run" / "checkpoint-6" / MANIFEST)
    line = refusal(capsys, causal_lm.main, *COMPARISON, RESUME)
    assert f"run/checkpoint-6/{MANIFEST} is damaged" in line and f"{RESUME}=run/checkpoint-4" in line


def test_older_checkpoint_without_a_manifest_is_resumed(finished, comparison):
    for manifest in (finished / "run").rglob(MANIFEST):
        manifest.unlink()
    call(causal_lm.main, *COMPARISON, f"{RESUME}=run/checkpoint-4")
    file = Path("run", "model.safetensors")
    assert (finished / file).read_bytes() == (comparison[0] / file).read_bytes()


def test_manifest_holds_every_file_of_a_checkpoint(comparison):
    checkpoint = comparison[0] / "run" / "checkpoint-6"
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert {*files, MANIFEST} == {path.name for path in checkpoint.iterdir()}
    assert files["model.safetensors"]["size"] == (checkpoint / "model.safetensors").stat().st_size


def test_checksum_is_that_of_the_whole_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"123456789")
    assert checksum(file) == "cbf43926"  # the check value that is given for CRC-32
    file.write_bytes(bytes(1 << 23) + b"end")
    before = checksum(file)
    for position in (0, 1 << 22, 1 << 23):
        content = bytearray(file.read_bytes())
        content[position] ^= 128
        (tmp_path / "other").write_bytes(content)
        assert checksum(tmp_path / "other") != before


def test_checkpoint_with_folders_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """As those are that several processes write together."""
    unfinished = tmp_path / UNFINISHED / "checkpoint-1"
    (unfinished / "shards").mkdir(parents=True)
    (unfinished / "shards" / "__0_0.distcp").write_bytes(b"part")
    (unfinished / "trainer_state.json").write_text("{}")
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("rename") or rename(path, target))
    finish_checkpoint(unfinished, tmp_path, [files_below(unfinished)])
    written = events[: events.index("rename")]
    names = {"checkpoint-1", "shards", "__0_0.distcp", "trainer_state.json", MANIFEST}
    assert {Path(path).name for path in written} == names
    assert events[-1] == str(tmp_path)
    assert damage(tmp_path / "checkpoint-1") is None
    flip(tmp_path / "checkpoint-1" / "shards" / "__0_0.distcp")
    assert "shards/__0_0.distcp has changed" in damage(tmp_path / "checkpoint-1")


def test_best_checkpoint_is_kept_and_known_by_its_name(room):
    best = ("--metric_for_best_model=eval_loss", "--greater_is_better=true")  # so that it is the first one
    call(causal_lm.main, *OPTIONS, *best, "--save_total_limit=2")
    assert [path.name for path in checkpoints(room / "run")] == ["checkpoint-2", "checkpoint-6"]
    state = json.loads((room / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == "run/checkpoint-2"


def test_old_checkpoints_are_deleted_in_their_order(room):
    # (In the order of names, 10 comes before 8.)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=12", "--save_total_limit=2")
    assert [path.name for path in checkpoints(room / "run")] == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("limit", range(7))
@pytest.mark.parametrize("best", [None, 2, 5])
def test_as_many_checkpoints_are_kept_as_transformers_keeps(tmp_path, limit, best):
    folders = [tmp_path / name for name in ("run", "expected")]
    for number in range(1, 11):
        for folder in folders:
            (folder / f"checkpoint-{number}").mkdir(parents=True)
        if best is None or number < best:
            kept, best_folder = set(), None
        else:
            kept, best_folder = {f"checkpoint-{best}"}, str(folders[1] / f"checkpoint-{best}")
        # (That of a later step is of an earlier attempt, and stays until it is replaced.)
        (folders[0] / "checkpoint-11").mkdir(exist_ok=True)
        # (The best one may be named from elsewhere.)
        rotate_checkpoints(folders[0], number, limit, best_folder and f"moved/checkpoint-{best}")
        (folders[0] / "checkpoint-11").rmdir()
        trainer_utils.rotate_checkpoints(str(folders[1]), limit, best_folder)
        found, expected = ([path.name for path in checkpoints(folder)] for folder in folders)
        assert found == expected, number
        assert len(found) == (min(number, max(limit, len(kept | {found[-1]}))) if limit else number)


@pytest.mark.parametrize(("limit", "kept"), [(4, 4), (5, 5), (8, 8), (None, 9)])
def test_run_keeps_the_number_of_checkpoints_that_was_asked_for(room, limit, kept):
    options = [] if limit is None else [f"--save_total_limit={limit}"]
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=9", "--save_steps=1", *options)
    assert [step(checkpoint) for checkpoint in checkpoints(room / "run")] == list(range(10 - kept, 10))


# Two processes


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def two_processes(*arguments, arrange=lambda rank: None) -> list[tuple[int, str]]:
    """How two processes end that train together, and what they print."""
    port = free_port()

    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
        PartialState._reset_state()
        AcceleratorState._reset_state()
        arrange(rank)
        call(causal_lm.main, *OPTIONS, "--use_cpu", *arguments)

    files = [Path(f"printed-{rank}.txt") for rank in range(2)]
    processes = [fork(lambda rank=rank: work(rank), file) for rank, file in enumerate(files)]
    try:
        statuses = [wait(process) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    return list(zip(statuses, (file.read_text() for file in files)))


def error_of(printed: str) -> str:
    assert "Traceback" not in printed, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def uninterrupted_by_two(tmp_path_factory):
    """The folder of the run of two processes that nothing happened to."""
    room = tmp_path_factory.mktemp("uninterrupted_by_two")
    write_room(room)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        # One is late with its part of the last checkpoint.
        outcomes = two_processes(
            arrange=lambda rank: in_call("_save_rng_state", 3)(lambda: time.sleep(1)) if rank == 1 else None
        )
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    return room / "run"


def test_checkpoint_of_two_processes_is_whole_only_with_the_parts_of_both(uninterrupted_by_two):
    files = json.loads((uninterrupted_by_two / "checkpoint-6" / MANIFEST).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files.keys() and last_whole(uninterrupted_by_two) == 6


@pytest.mark.parametrize(
    ("victim", "moment", "last"),
    [(0, "in training", 2), (1, "in the evaluation of a step", 2), (0, "before a checkpoint has its name", 2)],
)
def test_survivor_of_two_processes_ends(room, uninterrupted_by_two, victim, moment, last):
    arrange = in_call("prediction_step", 4) if "evaluation" in moment else MOMENTS[moment][0]
    start = time.monotonic()
    outcomes = two_processes(arrange=lambda rank: arrange(kill) if rank == victim else None)
    assert time.monotonic() - start < 60
    assert outcomes[victim][0] == -signal.SIGKILL
    status, printed = outcomes[1 - victim]
    line = error_of(printed)
    assert status == 2 and "Another process of this run has ended" in line and RESUME in line
    assert last_whole(room / "run") == last
    outcomes = two_processes(RESUME)
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert_same_run(room / "run", uninterrupted_by_two)


@pytest.mark.parametrize("receivers", [[0], [1], [0, 1]])
def test_two_processes_are_terminated_at_the_same_step(room, uninterrupted_by_two, receivers):
    # Those that get the signal get it in different steps.
    outcomes = two_processes(
        arrange=lambda rank: in_call("training_step", 3 - rank)(terminate) if rank in receivers else None
    )
    lines = [error_of(printed) for _, printed in outcomes]
    assert [status for status, _ in outcomes] == [143, 143] and lines[0] == lines[1]
    last = checkpoints(room / "run")[-1]
    assert f"run/{last.name} was written" in lines[0] and last.name != "checkpoint-6"
    assert last_whole(room / "run") == step(last)
    assert {path.name for path in last.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    outcomes = two_processes(RESUME)
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert (room / "run" / "model.safetensors").read_bytes() == (
        uninterrupted_by_two / "model.safetensors"
    ).read_bytes()


def test_both_processes_end_when_the_disk_of_one_is_full(room):
    def arrange(rank):
        at_file_event("open", f"checkpoint-4/{MANIFEST}")(fail)

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    (first, second) = two_processes(arrange=arrange)
    assert first[0] == second[0] == 2
    assert "No space left on device" in error_of(first[1]) and "run/checkpoint-2 is intact" in error_of(first[1])
    assert "Another process of this run has ended" in error_of(second[1])
    assert not (room / "run" / UNFINISHED).exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_both_processes_end_when_the_loss_of_one_is_not_finite(room, victim):
    def arrange(rank):
        compute_loss = RunTrainer.compute_loss

        def spoiled(self, model, *args, **kwargs):
            loss = compute_loss(self, model, *args, **kwargs)
            return loss * torch.nan if rank == victim and model.training and self.state.global_step == 2 else loss

        RunTrainer.compute_loss = spoiled
        errors.PATIENCE = 0.1

    outcomes = two_processes("--save_steps=4", arrange=arrange)
    lines = [error_of(printed) for _, printed in outcomes]
    assert [status for status, _ in outcomes] == [2, 2] and lines[0] == lines[1]
    assert "The loss became NaN or infinite at step 3, with a learning rate of 0.01:" in lines[0]
    found = json.loads((room / "run" / DIVERGED).read_text())
    assert found == {"step": 3, "learning_rate": 0.01, "what": "loss"}
    assert checkpoints(room / "run") == []


@pytest.mark.parametrize(("processes", "lost"), [("1", False), ("2", True), (None, False)])
def test_other_processes_are_named_only_where_there_are_some(monkeypatch, capsys, processes, lost):
    if processes is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", processes)

    @command
    def main():
        raise RuntimeError("[gloo/transport] Connection closed by peer")

    with pytest.raises(SystemExit if lost else RuntimeError):
        main()
    assert ("Another process of this run" in capsys.readouterr().err) == lost


def test_both_processes_end_when_a_checkpoint_is_damaged(room):
    call(causal_lm.main, *OPTIONS)
    flip(room / "run" / "checkpoint-6" / "optimizer.pt")
    (first, second) = two_processes(RESUME)
    assert first[0] == second[0] == 2
    for _, said in (first, second):  # the first process decides for all
        assert "optimizer.pt has changed" in error_of(said)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a launcher in /proc")
def test_launched_processes(room):
    """One of them is killed, and the others end, too; the launcher is terminated, and they leave a checkpoint."""
    launch = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "num_machines": 1}
    (room / "launch.yaml").write_text(yaml.safe_dump({**launch, "main_process_port": int(free_port())}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=launch.yaml"]
    line = [*launcher, "-m", "training.causal_lm", *LONG, "--use_cpu", "--max_steps=2000"]

    def start(*arguments):
        with open("printed.txt", "w") as printed:
            return subprocess.Popen([*line, *arguments], cwd=room, env=environment, stderr=printed, stdout=printed)

    def end(process, ranks):
        start = time.monotonic()
        assert process.wait(60) != 0
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() - start < 60, "A process of the run is left."
            time.sleep(0.1)
        return Path("printed.txt").read_text()

    process = start()
    wait_for(room / "run" / "checkpoint-20", lambda: process.poll() is None)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    end(process, ranks)
    last = checkpoints(room / "run")[-1]
    assert damage(last) is None

    process = start(RESUME)
    wait_for(room / "run" / f"checkpoint-{step(last) + 20}", lambda: process.poll() is None)
    ranks = children(process.pid)
    process.terminate()
    printed = end(process, ranks)
    last = checkpoints(room / "run")[-1]
    assert printed.count(f"run/{last.name} was written") == 2
    assert damage(last) is None and step(last) < 2000
