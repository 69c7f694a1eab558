"""Runs on the engines for many devices: they train as one process does, and say what cannot be kept."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest
import torch
from accelerate import ParallelismConfig
from torch.multiprocessing import get_context
from transformers import set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_dca import DCAConfig, DCAForCausalLM
from tests.training.run.launching import (
    KINDS,
    LAUNCH_FILES,
    RESUME,
    ROOT,
    RUN,
    assert_as_alone,
    failure,
    history,
    launch,
    results,
)
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, assert_same_weights, call, refusal, write_images, write_room
from training import causal_lm, image_classification
from training.run import parallel
from training.run.checkpoints import UNFINISHED, checkpoints, damage, finish_checkpoint
from training.run.trainer import RunTrainer
from training.support.errors import UserError


pytestmark = pytest.mark.usefixtures("offline")

needs_division = pytest.mark.skipif(
    parallel.DistributedConfig is None, reason="this transformers cannot save the optimizer of a model that is divided"
)
# Older releases of accelerate have fewer sizes than the trainer asks for.
HAS_SIZES = hasattr(ParallelismConfig, "sp_size")
needs_sizes = pytest.mark.skipif(not HAS_SIZES, reason="this accelerate is older than 1.12")
# Tokens are counted, too, so that a batch that several compute together is not counted for each.
COUNTED = ("--include_num_input_tokens_seen=all",)
TENSOR = "--tp_size=2"
# The batches of four processes, of which the global one is a multiple.
HALF = ("--per_device_train_batch_size=2",)


def launcher(monkeypatch, **sizes):
    """The environment of a launcher that has a `parallelism_config`."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", str(size))


# HSDP


@needs_sizes
@pytest.mark.parametrize("kind", ["map-style", pytest.param("stream", marks=pytest.mark.slow)])
def test_replicas_that_are_shared_out_train_as_one_process_does(room, alone, kind):
    launch("hsdp", 4, *RUN, *KINDS[kind], *HALF, "--max_steps=4")
    launch("hsdp", 4, *RUN, *KINDS[kind], *HALF, RESUME)
    assert_as_alone(room / "run", alone[kind])
    assert all(damage(checkpoint) is None for checkpoint in checkpoints(room / "run"))


@needs_sizes
@pytest.mark.slow
def test_checkpoint_of_shards_goes_on_with_replicas_and_without(room, alone):
    launch("fsdp2", 2, *RUN, "--max_steps=3")
    launch("hsdp", 4, *RUN, *HALF, "--max_steps=6", RESUME)
    launch("fsdp2", 4, *RUN, *HALF, RESUME)
    assert_as_alone(room / "run", alone["map-style"])


# Tensor parallelism


@needs_division
@pytest.mark.parametrize("kind", ["map-style", pytest.param("stream", marks=pytest.mark.slow)])
def test_processes_that_divide_the_model_train_as_one_does_and_go_on(room, alone, kind):
    launch("ddp", 2, *RUN, *KINDS[kind], TENSOR, "--max_steps=4", *COUNTED)
    launch("ddp", 2, *RUN, *KINDS[kind], TENSOR, RESUME, *COUNTED)
    assert_as_alone(room / "run", alone[kind])
    assert all(damage(checkpoint) is None for checkpoint in checkpoints(room / "run"))


@needs_division
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_divided_model_goes_on_with_other_numbers_of_processes(room, alone, kind):
    run = (*RUN, *KINDS[kind])
    launch("ddp", 2, *run, TENSOR, "--max_steps=2")
    launch("ddp", 4, *run, TENSOR, "--max_steps=4", RESUME)  # and shared out among two
    launch("ddp", 4, *run, TENSOR, "--dp_replicate_size=2", "--max_steps=6", RESUME)
    launch("ddp", 2, *run, TENSOR, "--max_steps=7", RESUME)
    call(causal_lm.main, *run, RESUME)  # and whole
    assert_as_alone(room / "run", alone[kind])


@needs_division
@pytest.mark.slow
def test_divided_and_shared_out_model_counts_what_one_process_counts(room):
    counted = (*RUN, *COUNTED, "--max_steps=3")
    call(causal_lm.main, *counted, "--output_dir=one")
    launch("ddp", 4, *counted, TENSOR)
    assert history(room / "run", "loss") == pytest.approx(history(room / "one", "loss"), abs=1e-5)
    assert history(room / "run", "grad_norm") == pytest.approx(history(room / "one", "grad_norm"), rel=1e-4)
    state, alone = (json.loads((room / name / "trainer_state.json").read_text()) for name in ("run", "one"))
    assert state["num_input_tokens_seen"] == alone["num_input_tokens_seen"] == 3 * 24 * 16
    assert state["total_flos"] == alone["total_flos"]
    for name in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert results(room / "run")[name] == pytest.approx(results(room / "one")[name], rel=1e-5), name


SHAPES = {
    "tied": ["--tie_word_embeddings=true", "--gated_mlp=true"],
    "biased": ["--attention_bias=true", "--mlp_bias=true", "--vocab_size=301"],
    "normed": ["--qk_norm=true", "--last_k=1", "--num_attention_heads=4", "--num_key_value_heads=2"],
    "smoothed": ["--label_smoothing_factor=0.1", "--gradient_checkpointing"],
}


@needs_division
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_other_shapes_are_divided(room, shape):
    options = (*RUN, *SHAPES[shape], "--max_steps=4")
    call(causal_lm.main, *options, "--output_dir=one")
    best = ("--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", "--save_steps=2")
    launch("ddp", 4, *options, *best, TENSOR)
    assert history(room / "run", "loss") == pytest.approx(history(room / "one", "loss"), abs=2e-5)
    assert results(room / "run")["eval_loss"] == pytest.approx(results(room / "one")["eval_loss"], rel=1e-4)


@needs_division
@pytest.mark.slow
def test_image_classifier_is_divided(room):
    write_images(room / "images", count=30)
    options = (IMAGE_RUN, "--use_cpu", "--global_batch_size=8", "--max_steps=4")
    call(image_classification.main, *options, "--output_dir=one")
    launch("ddp", 4, *options, "--output_dir=two", TENSOR, main=image_classification.main)
    assert history(room / "two", "loss") == pytest.approx(history(room / "one", "loss"), abs=1e-5)
    for name in ("eval_loss", "eval_accuracy"):
        assert results(room / "two")[name] == pytest.approx(results(room / "one")[name], rel=1e-5)


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ({"tp": 2}, [], ["2 as `parallelism_config_tp_size`", "does not divide the model", "`tp_size`"]),
        ({"sp": 2}, [], ["2 as `parallelism_config_sp_size`", "DeepSpeed"]),
        ({"cp": 2, "dp_shard": 2}, [], ["2 as `parallelism_config_cp_size`", "on GPUs only"]),
        ({"dp_replicate": 2, "dp_shard": 2}, [], ["`parallelism_config`", "FSDP2", "hsdp.yaml"]),
        ({}, [TENSOR], ["`tp_size` is 2", "1 processes", "product"]),
        ({}, ["--fsdp_size=2"], ["`fsdp_size` is 2", "`tp_size` is 1", "fsdp2.yaml"]),
        ({}, ["--dp_replicate_size=2"], ["`dp_replicate_size` is 2", "hsdp.yaml"]),
        ({"dp_shard": 1}, [TENSOR], ["`tp_size` is 2", "launcher", "ddp.yaml"]),
        ({}, ["--tp_size=0"], ["`tp_size` is 0", "at least 1"]),
        ({}, [TENSOR, "--variant=random_gate"], ["`tp_size` is 2", "`variant`"]),
        ({}, ["--save_on_each_node"], ["`save_on_each_node` is True", "all machines share"]),
    ],
)
def test_what_cannot_be_kept_is_refused(room, monkeypatch, capsys, sizes, options, words):
    if sizes:
        launcher(monkeypatch, **sizes)
    if TENSOR in options and parallel.DistributedConfig is None:
        words = ["`tp_size` is 2", "later release of transformers"]
    elif sizes and not HAS_SIZES:
        words = ["`parallelism_config`", "accelerate 1.12"]
    line = refusal(capsys, causal_lm.main, *RUN, *options)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("name", "options", "arguments", "words"),
    [
        ("hsdp", [], [], ["for 4 processes, 2 (dp_replicate) x 2 (dp_shard), but there are 2"]),
        (
            "hsdp",
            ["--parallelism_config_dp_shard_size=1"],
            [],
            ["1 as `parallelism_config_dp_shard_size`", "ddp.yaml"],
        ),
        ("fsdp2", [], [TENSOR], ["`tp_size` is 2", "ddp.yaml"]),
        ("ddp", [], [TENSOR, "--num_attention_heads=1"], ["`tp_size` is 2", "`num_attention_heads` = 1"]),
        ("ddp", [], [TENSOR, "--global_batch_size=6"], ["multiple of 4", "2 of which compute each batch together"]),
    ],
)
def test_what_several_processes_cannot_keep_is_refused(room, capfd, name, options, arguments, words):
    if TENSOR in arguments and parallel.DistributedConfig is None:
        words = ["`tp_size` is 2", "later release of transformers"]
    elif name == "hsdp" and not HAS_SIZES:
        words = ["`parallelism_config`", "accelerate 1.12"]
    printed = failure(capfd, name, *RUN, *arguments, options=options)
    assert all(word in printed for word in words), printed
    assert not (room / "run").exists()


# Context parallelism


class Gathered(torch.autograd.Function):
    """Keys, or values, of all processes, each of which has a part of every sequence, `(batch, heads, length, size)`."""

    @staticmethod
    def forward(ctx, values):
        parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, gradient):
        torch.distributed.all_reduce(gradient := gradient.contiguous())
        return gradient.chunk(torch.distributed.get_world_size(), dim=2)[torch.distributed.get_rank()]


def gathering_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    keys, values = Gathered.apply(key), Gathered.apply(value)
    positions = torch.distributed.get_rank() * query.shape[2] + torch.arange(query.shape[2])
    seen = torch.arange(keys.shape[2]) <= positions[:, None]
    output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def gradients(folder, rank=0, num_processes=1):
    """Loss and gradients of a model with a part of each sequence, summed over all."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = DCAForCausalLM(DCAConfig(vocab_size=50, **sizes))
    tokens = torch.randint(50, (3, 16))
    targets = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
    part = slice(rank * 16 // num_processes, (rank + 1) * 16 // num_processes)
    if num_processes > 1:
        ALL_ATTENTION_FUNCTIONS.register("gathering", gathering_attention)
        model.set_attn_implementation("gathering")
    loss = model(
        input_ids=tokens[:, part],
        position_ids=torch.arange(16)[part].expand(3, -1),
        labels=tokens[:, part],
        shift_labels=targets[:, part].contiguous(),
        num_items_in_batch=torch.tensor(3 * 15),
    ).loss
    loss.backward()
    found = {"loss": loss.detach(), **{name: weight.grad for name, weight in model.named_parameters()}}
    if num_processes > 1:
        for value in found.values():
            torch.distributed.all_reduce(value)
    return found


def gradients_of_parts(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(gradients(folder, rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_with_parts_of_the_sequences_have_the_gradients_of_one(tmp_path):
    """What DCA adds to a transformer looks at one token at a time: with the keys and values of all parts, a part is exact."""
    torch.multiprocessing.start_processes(gradients_of_parts, (tmp_path,), nprocs=2, start_method="fork")
    expected, parts = gradients(tmp_path), torch.load(tmp_path / "1.pt")
    assert expected.keys() == parts.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="sequences are divided among GPUs alone, of which two are needed"
)
def test_gpus_with_parts_of_the_sequences_train_as_one_does(room):
    run = [argument for argument in RUN if argument != "--use_cpu"]
    sizes = {"dp_replicate": 1, "dp_shard": 1, "cp": 2}
    launcher = [f"--config_file={LAUNCH_FILES / 'hsdp.yaml'}", "--num_processes=2", "--main_process_port=0"]
    launcher += [f"--parallelism_config_{name}_size={size}" for name, size in sizes.items()]
    for options in ([*launcher, "-m", "training.causal_lm", *run], None):
        line = line_of("accelerate.commands.launch", *options) if options else line_of("training.causal_lm", *run)
        line += [] if options else ["--output_dir=one"]
        devices = {} if options else {"CUDA_VISIBLE_DEVICES": "0"}
        done = subprocess.run(line, cwd=room, env=environment(**devices), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert history(room / "run", "loss") == pytest.approx(history(room / "one", "loss"), abs=1e-3)
    assert results(room / "run")["eval_loss"] == pytest.approx(results(room / "one")["eval_loss"], abs=1e-3)


@needs_division
def test_divided_model_does_not_go_on_from_a_whole_one(room, capfd):
    call(causal_lm.main, *RUN, "--max_steps=1")
    assert "checkpoint-1 was written without `tp_size`" in failure(capfd, "ddp", *RUN, TENSOR, RESUME)


# 16 bits


def test_shards_in_16_bits_have_losses_and_gradients_in_32(room):
    """Losses are summed, and gradients reduced, in 32 bits."""
    types = room / "types.txt"

    def arrange(rank):
        # (Its name depends on the release of torch.)
        for name in {"reduce_scatter_single", "reduce_scatter_tensor"}.intersection(dir(torch.distributed)):
            setattr(torch.distributed, name, recorded(getattr(torch.distributed, name)))

    def recorded(reduce_scatter):
        def call(*args, **kwargs):
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            with types.open("a") as file:
                file.writelines(f"{value.dtype}\n" for value in values)
            return reduce_scatter(*args, **kwargs)

        return call

    options = (*RUN, "--max_steps=2", "--bf16")
    call(causal_lm.main, *options, "--output_dir=one")
    launch("fsdp2", 2, *options, arrange=arrange)
    losses = history(room / "run", "loss")
    assert losses == pytest.approx(history(room / "one", "loss"), abs=5e-3)
    assert all(torch.tensor(loss).bfloat16().item() != loss for loss in losses), losses
    assert set(types.read_text().split()) == {"torch.float32"}


# Folders that machines do not share


def elsewhere(room):
    """Has the second process start in a room of its own, as one on another machine does."""
    other = room / "other"
    other.mkdir()
    write_room(other)

    def arrange(rank):
        parallel.VISIBLE_WITHIN = 0.5
        if rank == 1:
            os.environ.update(LOCAL_RANK="0")
            os.chdir(other)

    return arrange


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_folder_that_machines_do_not_share_is_said_at_the_start(room, capfd, name):
    printed = failure(capfd, name, *RUN, arrange=elsewhere(room))
    assert "`output_dir` is 'run', which the processes do not share" in printed
    assert "is not visible to process 1 (on " in printed
    for folder in (room, room / "other"):
        assert not list(folder.glob("run/*.safetensors")) and not list(folder.glob("run/checkpoint-*"))


def test_checkpoint_of_which_the_first_process_lacks_a_part_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "VISIBLE_WITHIN", 0.2)
    unfinished = tmp_path / UNFINISHED / "checkpoint-2"
    unfinished.mkdir(parents=True)
    (unfinished / "rng_state_0.pth").write_bytes(b"state")
    with pytest.raises(UserError) as raised:
        finish_checkpoint(unfinished, tmp_path, [["rng_state_0.pth"], ["rng_state_1.pth"]])
    assert "checkpoint-2 is not complete: rng_state_1.pth, which another process wrote" in str(raised.value)
    assert "There is no checkpoint yet." in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_part_that_is_seen_late_is_waited_for(tmp_path, monkeypatch):
    late, rounds = tmp_path / "folder" / "late", []

    def sleep(seconds):
        rounds.append(seconds)
        if len(rounds) == 2:
            late.parent.mkdir()
            late.touch()

    monkeypatch.setattr(parallel.time, "sleep", sleep)
    assert parallel.unseen([late]) == [] and len(rounds) == 2


@pytest.mark.parametrize("name", ["rng_state_1.pth", "pytorch_model_fsdp_0/__1_0.distcp", "optimizer_0/__0_0.distcp"])
def test_part_that_is_missing_in_the_manifest_too_is_missed(room, capfd, sharded, name):
    checkpoint = sharded(room) / "checkpoint-2"
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    assert damage(checkpoint) is None and manifest["processes"] == 2
    (checkpoint / name).unlink()
    del manifest["files"][name]
    crc = checksum_of(manifest["files"])
    file.write_text(json.dumps({**manifest, "crc32": crc}))
    assert damage(checkpoint) == f"{checkpoint / name} is missing, and so is its entry in the manifest"


def checksum_of(content):
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Copies the folder of a run whose model is shared out among two processes."""
    room = tmp_path_factory.mktemp("sharded")
    write_room(room)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        launch("fsdp2", 2, *RUN, "--max_steps=2")
    return lambda folder: shutil.copytree(room / "run", folder / "run")


# One line for start and restart

AUTO = (TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint=auto")


def killed(*arguments, at):
    """Run a command in another process, which is killed before its step `at`."""

    def run():
        torch.set_num_threads(1)
        step = RunTrainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)

        RunTrainer.training_step = training_step
        call(causal_lm.main, *arguments)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_starts_and_goes_on_after_a_kill(room, kind):
    killed(*AUTO, *KINDS[kind], at=1)  # before there is a checkpoint
    killed(*AUTO, *KINDS[kind], at=4)
    assert [path.name for path in checkpoints(room / "run")] == ["checkpoint-2"]
    call(causal_lm.main, *AUTO, *KINDS[kind])
    call(causal_lm.main, *AUTO[:-1], *KINDS[kind], "--output_dir=uninterrupted")
    assert_same_weights(room / "run", room / "uninterrupted")
    before = (room / "run" / "model.safetensors").stat().st_mtime_ns
    call(causal_lm.main, *AUTO, *KINDS[kind])  # a run that is complete stays as it is
    assert_same_weights(room / "run", room / "uninterrupted")
    assert before <= (room / "run" / "model.safetensors").stat().st_mtime_ns


def test_one_line_passes_over_a_checkpoint_that_is_damaged(room, capsys):
    call(causal_lm.main, *AUTO)
    expected = (room / "run" / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "trainer_state.json"):
        (room / "run" / "checkpoint-6" / name).write_bytes(b"spoilt")
    call(causal_lm.main, *AUTO)
    assert "checkpoint-6 is skipped, because" in capsys.readouterr().out
    assert (room / "run" / "model.safetensors").read_bytes() == expected
    assert damage(room / "run" / "checkpoint-6") is None  # it was written anew


def test_one_line_starts_where_a_run_was_killed_before_its_record(room):
    (room / "run" / UNFINISHED).mkdir(parents=True)
    (room / "run" / ".run.yaml.unfinished").write_text("model:")
    call(causal_lm.main, *AUTO, "--max_steps=1")
    assert (room / "run" / "model.safetensors").exists()


def test_one_line_touches_nothing_else(room, capsys):
    (room / "run").mkdir()
    (room / "run" / "thesis.txt").write_text("mine")
    assert "which holds no run to resume: choose another folder" in refusal(capsys, causal_lm.main, *AUTO)
    line = refusal(capsys, causal_lm.main, *AUTO, "--overwrite")
    assert "Both `overwrite` and `resume_from_checkpoint` are set" in line


# On several machines


def line_of(*module_and_arguments):
    return [sys.executable, "-m", *module_and_arguments]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def wait_for(path, *processes):
    """Wait for a file of a run that is under way."""
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end and all(process.poll() is None for process in processes), path
        time.sleep(0.01)


LONG = (*AUTO, "--use_cpu", "--global_batch_size=8", "--max_steps=40", "--save_steps=4", "--logging_steps=4")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_torchrun_on_two_machines_goes_on_after_the_loss_of_a_process(room, way):
    options = ["--fsdp=true", '--fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}'] if way == "FSDP2" else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = line_of("torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-id=run")
    line += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    machines = [
        subprocess.Popen(
            [*line, "-m", "training.causal_lm", *LONG, *options],
            cwd=room,
            env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        wait_for(room / "run" / "checkpoint-4" / "manifest.json", *machines)
        workers = subprocess.run(["pgrep", "-P", str(machines[1].pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        errors = [machine.communicate(timeout=240)[1] for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    assert [machine.returncode for machine in machines] == [0, 0], errors
    call(causal_lm.main, *LONG, "--output_dir=one")
    assert history(room / "run", "loss") == pytest.approx(history(room / "one", "loss"), abs=1e-4)


# What stands for Slurm: as many processes as tasks, to which `srun` passes SIGTERM on, and of whose states it returns the
# highest. (Bash waits anew for each of them when a signal has come between.)
SRUN = """#!/bin/bash
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued.txt; fi
"""


@pytest.mark.slow
def test_slurm_file_goes_on_when_it_is_requeued(room):
    file = ROOT / "configuration" / "accelerate" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    commands = room / "bin"
    commands.mkdir()
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(content)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2(x1)", "SLURM_JOB_NODELIST": "here"}
    slurm |= {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable}
    arguments = [argument for argument in LONG if "resume" not in argument]

    def submit(*more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        line = ["bash", str(file), "causal_lm", *arguments, *more]
        return subprocess.Popen(
            line, cwd=room, env=environment(**slurm, MASTER_PORT=port), stderr=subprocess.PIPE, text=True
        )

    job = submit()
    wait_for(room / "run" / "checkpoint-4" / "manifest.json", job)
    job.terminate()
    errors = job.communicate(timeout=240)[1]
    assert job.returncode == 143 and "terminated; run/checkpoint-" in errors, errors
    assert (room / "requeued.txt").read_text() == "requeue 7\n"
    assert not (room / "run" / "model.safetensors").exists()
    job = submit()
    errors = job.communicate(timeout=240)[1]
    assert job.returncode == 0, errors
    # What fails is not requeued.
    job = submit("--hidden_size=32")
    errors = job.communicate(timeout=240)[1]
    assert job.returncode == 2 and "other `model` fields" in errors, errors
    assert (room / "requeued.txt").read_text() == "requeue 7\n"
    launch("ddp", 2, *arguments, "--output_dir=uninterrupted")
    assert_same_weights(room / "run", room / "uninterrupted")
