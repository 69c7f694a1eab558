"""Runs of several processes, on one machine or as if on several, and what is asked of what they leave."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.multiprocessing.spawn import ProcessExitedException

from tests.training.tiny import TEXT_RUN, call, weights
from training import causal_lm


ROOT = Path(__file__).parents[3]
LAUNCH_FILES = ROOT / "configuration" / "accelerate"

# 132 blocks are no whole number of these batches, and two processes do not share the 21 to evaluate on evenly.
RUN = (TEXT_RUN, "--output_dir=run", "--use_cpu", "--global_batch_size=24", "--max_steps=9", "--save_steps=100")
STREAM = ("--streaming", "--stream_lanes=4", "--shuffle_buffer=5")
KINDS = {"map-style": (), "stream": STREAM}
RESUME = "--resume_from_checkpoint"


def launch_environment(name: str, num_processes: int, *options: str) -> dict[str, str]:
    """What `accelerate launch` sets for a process that it starts by one of our files, but for its rank."""
    line = [f"--config_file={LAUNCH_FILES / name}.yaml", f"--num_processes={num_processes}", *options]
    arguments = launch_command_parser().parse_args([*line, "--main_process_port=0", "-m", "training.causal_lm"])
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


def launch(
    name, num_processes, *arguments, main=causal_lm.main, arrange=lambda rank: None, options=(), **environment
) -> None:
    """
    Run a command in processes that start as copies of this one and have the environment of `accelerate launch`.

    Args:
        arrange: what each process does before.
        options: more of those of `accelerate launch`.
        environment: more of it.

    Raises:
        [`ProcessExitedException`]: one has failed, and the others were terminated.
    """
    environment = {**launch_environment(name, num_processes, *options), **environment}
    torch.multiprocessing.start_processes(
        work, (environment, main, arguments, arrange), nprocs=num_processes, start_method="fork"
    )


def failure(capfd, name, *arguments, num_processes=2, **options) -> str:
    """What processes print that fail."""
    capfd.readouterr()
    with pytest.raises(ProcessExitedException) as raised:
        launch(name, num_processes, *arguments, **options)
    printed = capfd.readouterr().err
    assert raised.value.exit_code == 2 and "Traceback" not in printed, printed
    return printed


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
