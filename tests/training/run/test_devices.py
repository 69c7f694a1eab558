"""Runs of several processes: they train as one does, go on where others were, and say what is wrong once."""

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.multiprocessing.spawn import ProcessExitedException

from modeling_dca import DCAForCausalLM, DCAForImageClassification
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, refusal, weights, write_images, write_room
from training import causal_lm, image_classification
from training.run.checkpoints import checkpoints, damage
from training.support import errors
from training.text import task


pytestmark = pytest.mark.usefixtures("offline")
ROOT = Path(__file__).parents[3]
LAUNCH_FILES = ROOT / "configuration" / "accelerate"

# 132 blocks are no whole number of these batches, and two processes do not share the 21 to evaluate on evenly.
RUN = (TEXT_RUN, "--output_dir=run", "--use_cpu", "--global_batch_size=24", "--max_steps=9", "--save_steps=100")
STREAM = ("--streaming", "--stream_lanes=4", "--shuffle_buffer=5")
KINDS = {"map-style": (), "stream": STREAM}
RESUME = "--resume_from_checkpoint"


def launch_environment(name: str, num_processes: int) -> dict[str, str]:
    """What `accelerate launch` sets for a process that it starts by one of our files, but for its rank."""
    options = [f"--config_file={LAUNCH_FILES / name}.yaml", f"--num_processes={num_processes}"]
    arguments = launch_command_parser().parse_args([*options, "--main_process_port=0", "-m", "training.causal_lm"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=arguments.master_port)
    return {**environment, "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}


def work(rank, environment, main, arguments, arrange):
    torch.set_num_threads(1)  # threads do not live on in a fork
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    PartialState._reset_state()
    AcceleratorState._reset_state()
    arrange(rank)
    call(main, *arguments)


def launch(name, num_processes, *arguments, main=causal_lm.main, arrange=lambda rank: None) -> None:
    """
    Run a command in processes that start as copies of this one and have the environment of `accelerate launch`.

    Raises:
        [`ProcessExitedException`]: one has failed, and the others were terminated.
    """
    environment = launch_environment(name, num_processes)
    torch.multiprocessing.start_processes(
        work, (environment, main, arguments, arrange), nprocs=num_processes, start_method="fork"
    )


def failure(capfd, name, *arguments, **options) -> str:
    """What two processes print that fail."""
    capfd.readouterr()
    with pytest.raises(ProcessExitedException) as raised:
        launch(name, 2, *arguments, **options)
    printed = capfd.readouterr().err
    assert raised.value.exit_code == 2 and "Traceback" not in printed, printed
    return printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folders of runs of one process, by the kind of their data."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, options in KINDS.items():
            room = tmp_path_factory.mktemp("alone")
            write_room(room)
            patch.chdir(room)
            call(causal_lm.main, *RUN, *options)
            folders[kind] = room / "run"
    return folders


def history(folder: Path, name: str) -> list[float]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries if name in entry]


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def assert_as_alone(folder: Path, alone: Path) -> None:
    """Two runs are equal but for the order in which numbers were summed."""
    losses = history(alone, "loss")
    assert len(losses) == 9 and history(folder, "loss") == pytest.approx(losses, abs=1e-5)
    assert history(folder, "learning_rate") == history(alone, "learning_rate")
    first, second = weights(folder), weights(alone)
    assert first.keys() == second.keys()
    for name, values in first.items():
        torch.testing.assert_close(values, second[name], rtol=1e-4, atol=1e-5, msg=name)
    for name in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert results(folder)[name] == pytest.approx(results(alone)[name], rel=1e-5), name


def is_sharded(checkpoint: Path, num_processes: int) -> bool:
    """Whether each process has written its part of weights and optimizer, and none the whole."""
    parts = [f"{folder}/__{rank}_0.distcp" for folder in ("pytorch_model_fsdp_0", "optimizer_0") for rank in range(2)]
    written = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.distcp"))
    expected = sorted(part for part in parts if int(part.split("__")[1][0]) < num_processes)
    return written == expected and not list(checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
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
    assert [name for name, chosen in ways.items() if chosen] == [file.stem]


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
