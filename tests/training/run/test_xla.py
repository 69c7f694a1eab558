"""Runs on the XLA device, here that of the CPU: as on the CPU itself, with no more graphs or waiting than with Llama."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.training.tiny import (
    IMAGE_RUN,
    TEXT,
    TEXT_RUN,
    TRAINING,
    call,
    failure,
    record_training,
    refusal,
    write_images,
    write_room,
)
from training import causal_lm, image_classification
from training.results.depth_weights import measure_depth_weights
from training.run.trainer import NonFiniteGuard, RunTrainer
from training.support.errors import UserError
from training.text import task


pytestmark = pytest.mark.xla

ROOT = Path(__file__).parents[3]
COMMANDS = {"text": causal_lm.main, "stream": causal_lm.main, "image": image_classification.main}
RUNS = {
    "text": [TEXT_RUN, "--eval_strategy=steps", "--eval_steps=3"],
    "stream": [TEXT_RUN, "--streaming", "--stream_lanes=2", "--shuffle_buffer=5"],
    "image": [IMAGE_RUN, "--eval_strategy=steps", "--eval_steps=3"],
}
ON_THE_CPU = """
from tests.training.run.test_xla import COMMANDS, RUNS, call
for name, arguments in RUNS.items():
    call(COMMANDS[name], *arguments, f"--output_dir={name}")
"""


@pytest.fixture(scope="module")
def metrics():
    return pytest.importorskip("torch_xla.debug.metrics")


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    """The folder with the runs as they are without XLA."""
    folder = tmp_path_factory.mktemp("cpu")
    write_room(folder)
    write_images(folder / "images")
    environment = {**os.environ, "USE_TORCH_XLA": "0", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ON_THE_CPU], cwd=folder, env=environment, check=True)
    return folder


def counts(metrics):
    """The graphs compiled, those executed, what was moved to the host, and how often a value was waited for."""
    import torch_xla.core.xla_model as xm

    xm.wait_device_ops()  # what is still under way is not yet counted
    names = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
    counted = [(metrics.metric_data(name) or [0])[0] for name in names]
    return torch.tensor([*counted, metrics.counter_value("aten::_local_scalar_dense") or 0])


def log_of(folder):
    names = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity", "eval_accuracy")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log.append(json.loads((folder / "all_results.json").read_text()))
    return [{name: entry[name] for name in names if name in entry} for entry in log]


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_the_cpu(on_the_cpu, room, monkeypatch, name):
    write_images(room / "images")
    run = [*RUNS[name], "--output_dir=run"]
    if name != "image":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            record_training(patch, interrupt=("dca", 6))
            call(COMMANDS[name], *run)
        run.append("--resume_from_checkpoint")
    devices = set()
    training_step = RunTrainer.training_step

    def recorded(self, model, inputs, *args):
        devices.update(values.device.type for values in inputs.values())
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(RunTrainer, "training_step", recorded)
    call(COMMANDS[name], *run)
    assert devices == {"xla"}
    expected = log_of(on_the_cpu / name)
    assert len(expected) > 6
    for entry, before in zip(log_of(room / "run"), expected, strict=True):
        assert entry == pytest.approx(before, rel=1e-4)
    written = {file.relative_to(on_the_cpu / name) for file in (on_the_cpu / name).rglob("*")}
    written = {file for file in written if "events.out" not in file.name}
    assert {file.relative_to(room / "run") for file in (room / "run").rglob("*")} == written
    if name == "image":
        return
    weights = [json.loads((folder / "depth_weights.json").read_text()) for folder in (room / "run", on_the_cpu / name)]
    for entry, before in zip(*weights, strict=True):
        assert entry["b"] == pytest.approx(before["b"], rel=1e-4)
        assert entry["gate"] == pytest.approx(before["gate"], rel=1e-3, abs=1e-6)


def steps_of(metrics, patch, trainer_class):
    """What is counted from each step of training to the next."""
    counted = []
    training_step = trainer_class.training_step

    def recorded(*args, **kwargs):
        counted.append(counts(metrics))
        return training_step(*args, **kwargs)

    patch.setattr(trainer_class, "training_step", recorded)
    return counted


def test_steps_compile_and_wait_for_nothing(metrics, room, monkeypatch):
    options = {"max_steps": 8, "logging_steps": 100, "save_strategy": "no"}
    ended = []
    monkeypatch.setattr(NonFiniteGuard, "on_step_end", lambda *args, **kwargs: ended.append(counts(metrics)))
    with pytest.MonkeyPatch.context() as patch:
        ours = steps_of(metrics, patch, RunTrainer)
        call(causal_lm.main, TEXT_RUN, "--output_dir=run", *(f"--{name}={value}" for name, value in options.items()))
    with pytest.MonkeyPatch.context() as patch:
        llama = steps_of(metrics, patch, Trainer)
        data = [{"input_ids": torch.randint(0, 300, (16,)).tolist()} for _ in range(60)]
        model = LlamaForCausalLM(LlamaConfig(**TEXT["model"], intermediate_size=64))
        arguments = TrainingArguments("llama", optim="adamw_torch", **{**TRAINING, **options})
        Trainer(model, arguments, data_collator=task.collate, train_dataset=data).train()
    # All of what is compiled is compiled by the third step; from then on each is one graph, and none of its values is
    # asked for.
    assert len(ours) == len(llama) == 8
    assert all(after.tolist() == [0, 1, 0, 0] for after in torch.stack(ours).diff(dim=0)[2:])
    # A step is computed before its values are looked at, and compiled before its time is taken.
    assert all((end - start)[1] == 1 for start, end in zip(ours, ended))
    assert ((ours[-1] - ours[0]) <= (llama[-1] - llama[0])).all(), (ours, llama)


def test_batches_whose_gradients_are_accumulated_share_graphs(metrics, room):
    compiled = []
    for number in (3, 5):
        before = counts(metrics)
        with pytest.MonkeyPatch.context() as patch:
            counted = steps_of(metrics, patch, RunTrainer)
            call(
                *(causal_lm.main, TEXT_RUN, f"--output_dir={number}", f"--gradient_accumulation_steps={number}"),
                *("--max_steps=4", "--logging_steps=100", "--save_strategy=no", "--num_attention_heads=1"),
            )
        assert all(after.tolist() == [0, 1, 0, 0] for after in torch.stack(counted).diff(dim=0)[3 * number :])
        compiled.append((counted[-1] - before)[0].item())
    # The same graphs, but for the division of the loss: more batches do not make them larger.
    assert compiled[1] <= compiled[0]


def test_what_is_looked_at_is_looked_at_together(metrics, room, monkeypatch):
    looked, evaluated, measured = [], [], []
    on_step_end, prediction_step = NonFiniteGuard.on_step_end, RunTrainer.prediction_step

    def guarded(self, args, state, control, **kwargs):
        before = counts(metrics)
        on_step_end(self, args, state, control, **kwargs)
        looked.append((control.should_save, (counts(metrics) - before).tolist()))

    def predicted(*args, **kwargs):
        evaluated.append(counts(metrics))
        return prediction_step(*args, **kwargs)

    def depth_weights(*args):
        before = counts(metrics)
        result = measure_depth_weights(*args)
        measured.append((counts(metrics) - before).tolist())
        return result

    monkeypatch.setattr(NonFiniteGuard, "on_step_end", guarded)
    monkeypatch.setattr(RunTrainer, "prediction_step", predicted)
    monkeypatch.setattr("training.run.training.measure_depth_weights", depth_weights)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--per_device_eval_batch_size=2", "--num_hidden_layers=3")
    # The losses since the last look, and where weights are saved, one number of all of them.
    assert all(transferred == 1 + saved for saved, (_, _, transferred, _) in looked), looked
    assert [saved for saved, _ in looked] == [False, True] * 3
    assert sum(compiled for _, (compiled, *_) in looked[2:]) == 0
    # Evaluation compiles nothing from the third batch to the last but one, the last one being smaller.
    compiled = [int(count[0]) for count in evaluated]
    assert len(compiled) > 6 and len(set(compiled[2:-1])) == 1
    # One graph for the batches and one for the last; the rest is done on the host.
    assert measured[0][0] <= 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("options", [[], ["--streaming", "--stream_lanes=2"]])
def test_data_that_cannot_be_read_on_ends_a_run(room, capsys, monkeypatch, options):
    collate, batches = task.collate, []

    def broken(examples):
        batches.append(examples)
        if len(batches) == 5:  # the loader reads one batch ahead
            raise UserError("A file is broken.")
        return collate(examples)

    monkeypatch.setattr(task, "collate", broken)
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", *options)
    assert "Reading the data failed after step 3," in line and "--resume_from_checkpoint" in line


def test_fused_optimizers_are_refused(room, capsys):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--optim=adamw_torch_fused")
    assert "`optim` is 'adamw_torch_fused', which XLA devices do not support" in line


def test_weights_that_are_not_finite_are_not_saved(room, capsys, monkeypatch):
    training_step = RunTrainer.training_step

    def spoiled(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", spoiled)
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", "--save_steps=1")
    assert "became NaN or infinite at step 1" in line and not list(room.glob("run/checkpoint-*"))
