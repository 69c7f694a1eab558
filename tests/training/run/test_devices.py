"""Runs of several processes: they train as one does, go on where others were, and say what is wrong once."""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from modeling_dca import DCAForCausalLM, DCAForImageClassification
from tests.training.run.launching import (
    KINDS,
    LAUNCH_FILES,
    RESUME,
    ROOT,
    RUN,
    STREAM,
    assert_as_alone,
    failure,
    history,
    is_sharded,
    launch,
    results,
)
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, refusal, weights, write_images
from training import causal_lm, image_classification
from training.run.checkpoints import checkpoints, damage
from training.support import errors
from training.text import task


pytestmark = pytest.mark.usefixtures("offline")


# (Each way to share out the model and each kind of data once: neither looks at the other.)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "map-style"),
        ("fsdp2", "stream"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("ddp", "stream"), ("fsdp2", "map-style"))),
    ],
)
def test_processes_train_as_one_does_and_go_on_where_others_were(room, alone, name, kind):
    written = {}
    for num_processes, until in ((2, 4), (1, 7), (2, 9)):
        options = [*RUN, *KINDS[kind], f"--max_steps={until}", *([RESUME] if written else [])]
        if name == "ddp" and num_processes == 1:
            call(causal_lm.main, *options)
        else:
            launch(name, num_processes, *options)
        for checkpoint in checkpoints(room / "run"):
            written.setdefault(checkpoint, num_processes)
    assert_as_alone(room / "run", alone[kind])
    if kind == "map-style":  # the end of a stream is the last step, which these runs had not all in the same place
        assert history(room / "run", "epoch") == pytest.approx(history(alone[kind], "epoch"))
    assert {checkpoint.name: number for checkpoint, number in written.items()} == {
        "checkpoint-4": 2,
        "checkpoint-7": 1,
        "checkpoint-9": 2,
    }
    for checkpoint, num_processes in written.items():
        assert is_sharded(checkpoint, num_processes) == (name == "fsdp2")
        assert damage(checkpoint) is None
    model = DCAForCausalLM.from_pretrained(room / "run")
    assert all(torch.equal(value, weights(room / "run")[name]) for name, value in model.named_parameters())


def test_processes_that_share_out_the_model_leave_a_whole_run(room, comparison):
    # Two models, one after the other; the first may not change how the second is saved.
    launch("fsdp2", 2, TEXT_RUN, "--output_dir=run", "--use_cpu", "--baseline=standard", "--max_steps=2")
    for folder in (room / "run", room / "run" / "standard"):
        expected = comparison[0] / folder.relative_to(room)
        files = [
            {path.name for path in each.iterdir() if "checkpoint" not in path.name} for each in (folder, expected)
        ]
        assert files[1] - files[0] == {"runs"} and not files[0] - files[1]  # the logs of TensorBoard
        assert is_sharded(folder / "checkpoint-2", 2)
        assert weights(folder).keys() == weights(expected).keys()
        assert (folder / "config.json").read_text() == (expected / "config.json").read_text()


def test_processes_classify_images_as_one_does(room):
    write_images(room / "images", count=30)
    options = (IMAGE_RUN, "--use_cpu", "--global_batch_size=8", "--max_steps=4")
    call(image_classification.main, *options, "--output_dir=one")
    launch("ddp", 2, *options, "--output_dir=two", main=image_classification.main)
    assert history(room / "two", "loss") == pytest.approx(history(room / "one", "loss"), abs=1e-5)
    for name in ("eval_loss", "eval_accuracy"):
        assert results(room / "two")[name] == pytest.approx(results(room / "one")[name], rel=1e-5)
    one, two = (DCAForImageClassification.from_pretrained(room / name).state_dict() for name in ("one", "two"))
    for name, values in one.items():
        torch.testing.assert_close(values, two[name], rtol=1e-4, atol=1e-5, msg=name)


# What cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--global_batch_size=12"], ["`global_batch_size` is 12", "multiple of 8", "number of devices 2"]),
        ([*STREAM, "--stream_lanes=3"], ["`stream_lanes` is 3", "2 processes", "multiple of 2"]),
        (["--vocab_size=1"], ["`vocab_size`"]),
    ],
)
def test_what_is_wrong_in_all_processes_is_said_once(room, capfd, options, words):
    def arrange(rank):
        errors.PATIENCE = 60  # the machine may be busy

    printed = failure(capfd, "ddp", *RUN, *options, arrange=arrange)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    # (The other process may have been terminated before it had come so far.)
    (line,) = [line for line in lines if line != "error: terminated"]
    assert all(word in line for word in words), line
    assert not (room / "run").exists()


def test_what_is_wrong_in_another_process_than_the_first_is_said_too(room, capfd):
    def arrange(rank):
        errors.PATIENCE = 0.1
        if rank == 1:
            task.run_models = fail

    def fail(*args, **kwargs):
        raise errors.UserError("The disk of this one is full.")

    assert "error: The disk of this one is full." in failure(capfd, "ddp", *RUN, arrange=arrange)


def test_checkpoint_is_resumed_in_the_way_in_which_it_was_written(room, capfd):
    launch("fsdp2", 1, *RUN, "--max_steps=1", "--output_dir=sharded")
    line = refusal(capfd, causal_lm.main, *RUN, "--output_dir=sharded", RESUME)
    assert "sharded/checkpoint-1 was written with FSDP" in line
    call(causal_lm.main, *RUN, "--max_steps=1")
    assert "run/checkpoint-1 was written without FSDP" in failure(capfd, "fsdp2", *RUN, RESUME)


# The launch files


@pytest.mark.parametrize("file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_files_are_what_accelerate_knows(file):
    configuration = load_config_from_file(str(file))
    assert configuration.mixed_precision == "no"  # the run says it
    arguments = launch_command_parser().parse_args([f"--config_file={file}", "--num_processes=2", "-m", "module"])
    arguments = _validate_launch_command(arguments)[0]
    ways = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp, "tpu": arguments.tpu}
    assert [name for name, chosen in ways.items() if chosen] == [file.stem.replace("hsdp", "fsdp2")]
    assert arguments.use_parallelism_config == (file.stem == "hsdp")


@pytest.mark.parametrize("module", ["training.causal_lm", "training.image_classification"])
def test_what_a_tpu_runs_can_be_sent_to_its_processes(module):
    main = getattr(
        importlib.import_module(module), load_config_from_file(f"{LAUNCH_FILES}/tpu.yaml").main_training_function
    )
    assert pickle.loads(pickle.dumps(main)) is main


def test_command_runs_in_a_thread_as_those_of_a_tpu_do(room):
    ended = []

    def run():
        for _ in range(2):
            with contextlib.suppress(SystemExit):
                call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=1")
                ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True] and (room / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_launches_a_run_by_our_files(room, alone, name):
    line = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={LAUNCH_FILES / name}.yaml"]
    line += ["--num_processes=2", "--main_process_port=0", "-m", "training.causal_lm", *RUN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run(line, cwd=room, env=environment, capture_output=True, text=True, timeout=300)

    completed = run()
    assert completed.returncode == 0, completed.stderr
    assert_as_alone(room / "run", alone["map-style"])
    assert is_sharded(room / "run" / "checkpoint-9", 2) == (name == "fsdp2")
    # The folder now holds a run.
    completed = run()
    assert completed.returncode != 0
    assert completed.stderr.count("error: `output_dir` is 'run', which holds another run") == 1, completed.stderr
