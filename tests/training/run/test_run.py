"""A run from its start to its folder: what is left, and how it is resumed, stopped, compared and published."""

import ast
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_dca import DCAForCausalLM, grn_triton
from tests.training.hub_server import HubServer, User
from tests.training.processes import forked, run_as_main
from tests.training.tiny import (
    IMAGE_RUN,
    TEXT_RUN,
    TRAINING,
    assert_same_weights,
    call,
    failure,
    record_training,
    refusal,
    snapshot,
    weights,
    write_images,
    write_jsonl,
    write_room,
)
from training import altered, causal_lm, image_classification
from training.run import trainer
from training.run.folder import check_gates
from training.run.trainer import NonFiniteGuard, RunTrainer
from training.studies.report import read_member
from training.studies.study import read_runs
from training.support.errors import UserError
from training.text.task import sample_text


pytestmark = pytest.mark.usefixtures("offline")
ROOT = Path(__file__).parents[3]
TOKEN = "hf_" + "WritersSecretWritersSecretWriters9"
READ_TOKEN = "hf_" + "ReadersSecretReadersSecretReaders9"

COMPARISON = (TEXT_RUN, "--output_dir=run", "--baseline=standard")


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_files_of_a_finished_run(comparison):
    run = comparison[0] / "run"
    for file in (
        *("model.safetensors", "config.json", "generation_config.json", "modeling_dca.py", "configuration_dca.py"),
        *("tokenizer.json", "tokenizer_config.json", "all_results.json", "train_results.json", "eval_results.json"),
        *("README.md", "loss_curve.png", "depth_weights.png", "depth_weights.json", "run.yaml", "trainer_state.json"),
    ):
        assert (run / file).stat().st_size > 0, file
    assert list(run.glob("runs/*/events.out.tfevents.*")), "no TensorBoard events"
    assert {"train_loss", "eval_loss", "eval_perplexity", "eval_bits_per_byte"} <= results(run).keys()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_baseline_is_saved_too(comparison):
    run = comparison[0] / "run"
    model = AutoModelForCausalLM.from_pretrained(run / "standard")
    assert model.config.residual_scheme == "standard"
    assert not [name for name in weights(run / "standard") if "residual" in name]
    assert len(AutoTokenizer.from_pretrained(run / "standard")) == len(AutoTokenizer.from_pretrained(run))
    assert {"eval_loss", "eval_perplexity", "eval_bits_per_byte"} <= results(run / "standard").keys()


def test_training_changes_the_model(comparison):
    run = comparison[0] / "run"
    delta, gate = (weights(run)[f"model.layers.1.residual.{name}"] for name in ("delta", "gate"))
    assert delta.abs().max() > 0 and gate.abs().max() > 0
    losses = [step.loss for step in comparison[1] if step.scheme == "dca"]
    assert losses[-1] < losses[0]


def test_both_models_see_the_same_batches_and_start_as_the_same_function(comparison):
    dca, standard = ([step for step in comparison[1] if step.scheme == scheme] for scheme in ("dca", "standard"))
    assert [step.number for step in dca] == [step.number for step in standard] == [1, 2, 3, 4, 5, 6]
    assert [step.input_ids for step in dca] == [step.input_ids for step in standard]
    assert len({str(step.input_ids) for step in dca}) == 6  # they are not one batch again and again
    assert dca[0].loss == pytest.approx(standard[0].loss, rel=1e-6)
    assert dca[-1].loss != standard[-1].loss


@torch.no_grad()
def test_figures_of_a_run_follow_from_its_model_and_the_held_out_text(comparison):
    room, _ = comparison
    model = DCAForCausalLM.from_pretrained(room / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(room / "run")
    held_out = [json.loads(line)["text"] for line in (room / "held_out.jsonl").read_text().splitlines()]
    tokens = [token for text in held_out for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    blocks = torch.tensor(tokens[: len(tokens) // 16 * 16]).reshape(-1, 16)
    assert len(blocks) % TRAINING["per_device_eval_batch_size"]  # the last batch is not full: it must not count more
    loss = cross_entropy(model(blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    num_bytes = sum(len(text.encode()) for text in held_out)

    figures = results(room / "run")
    assert figures["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["eval_bits_per_byte"] == pytest.approx(loss / math.log(2) * len(tokens) / num_bytes, rel=1e-5)


def test_record_of_a_run_runs_again_to_the_same_weights(comparison, monkeypatch):
    room, _ = comparison
    record = yaml.safe_load((room / "run" / "run.yaml").read_text())
    assert record["training"]["baseline"] == "standard" and record["training"]["output_dir"] == "run"
    assert record["model"]["hidden_size"] == 16 and record["data"]["dataset"] == "text.jsonl"
    monkeypatch.chdir(room)
    call(causal_lm.main, "run/run.yaml", "--output_dir=again")
    assert_same_weights(room / "run", room / "again")
    assert_same_weights(room / "run" / "standard", room / "again" / "standard")


@pytest.mark.parametrize("scheme", ["standard", "dca"])
@pytest.mark.parametrize("step", [2, 6])
def test_interrupted_run_is_resumed_to_the_same_weights(comparison, room, scheme, step, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        record_training(patch, interrupt=(scheme, step))
        call(causal_lm.main, *COMPARISON)
    assert exit.value.code == 130
    assert "error: interrupted" in capsys.readouterr().err

    with pytest.MonkeyPatch.context() as patch:
        steps = record_training(patch)
        call(causal_lm.main, *COMPARISON, "--resume_from_checkpoint")
    # It went on from the last checkpoint, where there was one, and did not train anew what was whole.
    rest = [1, 2, 3, 4, 5, 6] if step == 2 else [5, 6]
    assert [each.number for each in steps if each.scheme == scheme] == rest
    if scheme == "dca":
        assert not [each for each in steps if each.scheme == "standard"]
    assert_same_weights(room / "run", comparison[0] / "run")
    assert_same_weights(room / "run" / "standard", comparison[0] / "run" / "standard")
    assert results(room / "run")["eval_loss"] == results(comparison[0] / "run")["eval_loss"]
    assert (room / "run" / "README.md").exists()


@pytest.mark.parametrize("checkpoint", ["run/checkpoint-2", "run/standard/checkpoint-4"])
def test_run_is_resumed_from_a_checkpoint_that_is_named(comparison, room, checkpoint):
    call(causal_lm.main, *COMPARISON)
    with pytest.MonkeyPatch.context() as patch:
        steps = record_training(patch)
        call(causal_lm.main, *COMPARISON, f"--resume_from_checkpoint={checkpoint}")
    # It is a checkpoint of one of the models: the other one is whole and stays so.
    expected = (
        [("dca", n) for n in (3, 4, 5, 6)] if checkpoint == "run/checkpoint-2" else [("standard", 5), ("standard", 6)]
    )
    assert [(step.scheme, step.number) for step in steps] == expected
    assert_same_weights(room / "run", comparison[0] / "run")
    assert_same_weights(room / "run" / "standard", comparison[0] / "run" / "standard")


def test_finished_run_that_is_resumed_keeps_its_figures(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    before, run = results(room / "run"), room / "run"
    train_results, model = (run / "train_results.json").read_bytes(), (run / "model.safetensors").read_bytes()
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint")
    assert (run / "train_results.json").read_bytes() == train_results
    assert (run / "model.safetensors").read_bytes() == model
    after = results(run)
    assert before["train_loss"] > 0
    for name in ("train_loss", "train_runtime", "eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert after[name] == before[name], name


@pytest.mark.parametrize("batch", ["--per_device_train_batch_size=4", "--global_batch_size=8"])
def test_run_that_was_killed_before_its_figures_has_those_of_its_training(room, batch):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", batch)
    before, run = results(room / "run"), room / "run"
    read_before = read_member(read_runs([Path("run")], None).members[0])
    for name in ("train_results.json", "all_results.json"):
        (run / name).unlink()
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", batch, "--resume_from_checkpoint")
    after, logged = results(run), json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert after["train_loss"] == pytest.approx(before["train_loss"])
    assert after["train_tokens_per_second"] == before["train_tokens_per_second"]
    assert after["train_steps_per_second"] * after["train_runtime"] == pytest.approx(6, rel=0.02)
    size = 8 if batch.startswith("--global") else 4
    assert after["train_samples_per_second"] == pytest.approx(size * after["train_steps_per_second"], rel=0.01)
    assert {name for entry in logged for name in entry if name.endswith("_per_second")} <= {
        "tokens_per_second",
        *(f"{kind}_{unit}_per_second" for kind in ("train", "eval") for unit in ("tokens", "samples", "steps")),
    }
    read_after = read_member(read_runs([Path("run")], None).members[0])
    for name in ("steps", "examples", "seconds", "speed"):
        assert read_after[name] == read_before[name], name


def test_run_is_resumed_for_more_steps(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint", "--max_steps=8")
    assert json.loads((room / "run" / "trainer_state.json").read_text())["global_step"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hidden_size=32"], ["`model`", "run.yaml"]),
        (["--block_size=8"], ["`data`", "run.yaml"]),
        (["--overwrite"], ["`overwrite`", "`resume_from_checkpoint`"]),
    ],
)
def test_run_is_not_resumed_as_another(room, capsys, arguments, words):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint", *arguments)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("content", [b"", b"model: [", b"\xff", b"model: {}\ndata: {}\n", b"model: {}\nmodel: {}\n"])
def test_run_with_a_damaged_record_is_not_resumed(comparison, room, capsys, content):
    shutil.copytree(comparison[0] / "run", room / "run")
    (room / "run" / "run.yaml").write_bytes(content)
    line = refusal(capsys, causal_lm.main, *COMPARISON, "--resume_from_checkpoint")
    assert "run/run.yaml is damaged" in line and "--overwrite" in line


def test_folder_of_another_run_is_left_alone_unless_it_is_to_be_overwritten(room, capsys):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", "--seed=2")
    for word in ("`output_dir` is 'run'", "--overwrite", "--resume_from_checkpoint"):
        assert word in line
    first = weights(room / "run")["lm_head.weight"]
    (room / "run" / "checkpoint-90").mkdir()  # of a longer run, say
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--seed=2", "--overwrite")
    assert not torch.equal(weights(room / "run")["lm_head.weight"], first)
    assert not (room / "run" / "checkpoint-90").exists()


def test_run_within_the_folder_of_a_run_is_not_deleted_with_it(room, capsys):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=1")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run/inner", "--max_steps=1")
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", "--overwrite")
    assert "`output_dir` is 'run'" in line and "'run/inner'" in line


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume_from_checkpoint"]])
def test_folder_with_files_of_someone_else_is_left_alone(room, capsys, option):
    (room / "mine").mkdir()
    (room / "mine" / "thesis.txt").write_text("years of work")
    assert "'mine'" in refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=mine", *option)
    assert "'.'" in refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=.", *option)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output_dir=new", "--resume_from_checkpoint"], ["'new'", "no run to resume"]),
        (["--output_dir=text.jsonl"], ["`output_dir` is 'text.jsonl'", "is a file"]),
        (["--output_dir=text.jsonl/run"], ["`output_dir` is 'text.jsonl/run'", "cannot be written"]),
    ],
)
def test_folder_that_cannot_be_used(room, capsys, arguments, words):
    line = refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("checkpoint", ["nowhere", "run", "other/checkpoint-2"])
def test_what_is_no_checkpoint_of_the_run_is_not_resumed(room, capsys, checkpoint):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    call(causal_lm.main, TEXT_RUN, "--output_dir=other", "--seed=2", "--max_steps=2")
    arguments = (TEXT_RUN, "--output_dir=run", f"--resume_from_checkpoint={checkpoint}")
    assert f"'{checkpoint}', which is not a checkpoint" in refusal(capsys, causal_lm.main, *arguments)


def spoil(patch, step, change):
    """Have `change(model, output)` done in a step of the training, and what it returns taken for the output."""
    forward, calls = DCAForCausalLM.forward, []

    @functools.wraps(forward)  # the trainer looks at its arguments
    def spoiled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(None)
            if len(calls) == step:
                return change(self, output)
        return output

    patch.setattr(DCAForCausalLM, "forward", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("logging_steps", [1, 50])
def test_loss_that_is_not_finite_stops_the_run(room, capsys, monkeypatch, value, logging_steps):
    def change(model, output):
        output.loss = output.loss * value
        return output

    spoil(monkeypatch, 3, change)
    arguments = ("--output_dir=run", "--learning_rate=0.0042", f"--logging_steps={logging_steps}")
    line = failure(capsys, causal_lm.main, TEXT_RUN, *arguments)
    for word in ("loss became NaN or infinite", "step 3,", "of 0.0042:", "`learning_rate`", "run/checkpoint-2"):
        assert word in line
    # The last good checkpoint is there, and nothing that came after it.
    assert [path.name for path in (room / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(weight.isfinite().all() for weight in weights(room / "run" / "checkpoint-2").values())
    assert not (room / "run" / "model.safetensors").exists() and not (room / "run" / "README.md").exists()


def test_weights_that_are_not_finite_are_not_saved(room, capsys, monkeypatch):
    def change(model, output):
        # The embedding of a token that no text has: the loss stays as it is.
        model.model.embed_tokens.weight.data[model.config.pad_token_id] = math.nan
        return output

    spoil(monkeypatch, 3, change)
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run")
    assert "weights became NaN or infinite" in line and "step 4," in line and "run/checkpoint-2" in line
    assert [path.name for path in (room / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (room / "run" / "model.safetensors").exists()


def test_weights_are_not_looked_at_in_every_step(room, monkeypatch):
    taken = []
    on_step_end = NonFiniteGuard.on_step_end

    def counted(self, *args, **kwargs):
        before = len(self.trainer.losses)
        on_step_end(self, *args, **kwargs)
        taken.append(before - len(self.trainer.losses))

    monkeypatch.setattr(NonFiniteGuard, "on_step_end", counted)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--logging_steps=3", "--save_strategy=no")
    assert taken == [0, 0, 3, 0, 0, 3]


def test_losses_that_nobody_looks_at_are_not_kept_for_ever(room, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "LOSSES_KEPT", 4)
    kept, on_step_end = [], NonFiniteGuard.on_step_end

    def counted(self, *args, **kwargs):
        kept.append(len(self.trainer.losses))
        on_step_end(self, *args, **kwargs)

    monkeypatch.setattr(NonFiniteGuard, "on_step_end", counted)
    silent = (TEXT_RUN, "--logging_strategy=no", "--save_strategy=no")
    call(causal_lm.main, *silent, "--output_dir=run", "--max_steps=10")
    assert kept == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]

    def change(model, output):
        output.loss = output.loss * math.nan
        return output

    # Nor is a loss overlooked that is not finite in the last step, where nothing is logged or saved.
    spoil(monkeypatch, 6, change)
    line = failure(capsys, causal_lm.main, *silent, "--output_dir=last")
    assert "loss became NaN or infinite at step 6" in line
    assert not (room / "last" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def hub():
    with HubServer({TOKEN: User("writer"), READ_TOKEN: User("writer", may_write=False)}) as hub:
        yield hub


PUBLISHED = (TEXT_RUN, "--output_dir=run", "--push_to_hub", "--hub_model_id=writer/tiny")


def test_run_is_published_and_the_token_is_nowhere(hub, tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    write_room(tmp_path / "room")
    # In a process of its own, as someone who has nothing but access to `hub`.
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "training.causal_lm", *PUBLISHED, f"--hub_token={TOKEN}"]
    completed = subprocess.run(
        line, cwd=tmp_path / "room", env=environment, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    assert f"{hub.url}/writer/tiny" in completed.stdout
    run, files = tmp_path / "room" / "run", hub.repositories["writer/tiny"].commits[-1].files
    assert TOKEN not in completed.stdout + completed.stderr
    for content in (*snapshot(tmp_path).values(), *files.values()):
        assert content is None or TOKEN.encode() not in content
    assert (run / "training_args.bin").exists() and "training_args.bin" not in files

    # What was published is the run, but that its card loads it from the hub.
    assert 'from_pretrained("run"' in (run / "README.md").read_text()
    assert 'from_pretrained("writer/tiny"' in files["README.md"].decode()
    assert 'from_pretrained("run"' not in files["README.md"].decode()
    published = tmp_path / "published"
    for path, content in files.items():
        (published / path).parent.mkdir(parents=True, exist_ok=True)
        (published / path).write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", "")
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    local = weights(run)
    assert all(torch.equal(weight, local[name]) for name, weight in model.state_dict().items())
    assert files["README.md"].count(b"writer/tiny") >= 2 and len(AutoTokenizer.from_pretrained(published)) == 300


def test_run_that_may_not_be_published_is_not_started(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_room(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = snapshot(tmp_path)
    with hub.reached(READ_TOKEN), pytest.raises(SystemExit) as exit:
        call(causal_lm.main, *PUBLISHED, "--baseline=standard", "--hub_model_id=writer/no")
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and "write access" in line and "status 403" in line
    assert READ_TOKEN not in line
    assert snapshot(tmp_path) == before
    assert "writer/no" not in hub.repositories


def memory_for(patch, examples, first_step=1):
    """Have a training that takes more examples at a time run out of memory, from its step of that number on."""
    training_step = RunTrainer.training_step

    def limited(self, model, inputs, *args, **kwargs):
        loss = training_step(self, model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > examples and self.state.global_step + 1 >= first_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    patch.setattr(RunTrainer, "training_step", limited)


STEPS_OF_8 = (TEXT_RUN, "--global_batch_size=8", "--attention_dropout=0.1", "--report_to=tensorboard")


# Also where it is found out when some steps are done.
@pytest.mark.parametrize(("first_step", "kind"), [(4, ()), (1, ("--streaming", "--stream_lanes=4"))])
def test_batch_that_fits_into_memory_leaves_the_steps_as_they_are(room, monkeypatch, first_step, kind):
    expected, found = room / "expected", room / "found"
    call(causal_lm.main, *STEPS_OF_8, *kind, "--output_dir=expected", "--per_device_train_batch_size=2")
    memory_for(monkeypatch, 2, first_step)
    steps = record_training(monkeypatch)
    options = ("--output_dir=found", "--per_device_train_batch_size=8", "--auto_find_batch_size")
    call(causal_lm.main, *STEPS_OF_8, *kind, *options)
    assert_same_weights(expected, found)
    assert [len(step.input_ids) for step in steps[-24:]] == [2] * 24
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (expected, found)]
    assert states[0]["train_batch_size"] == states[1]["train_batch_size"] == 2
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    counted = [state["stateful_callbacks"]["Throughput"]["attributes"]["examples"] for state in states]
    assert counted[0] == counted[1] == 5 * 8 * 16  # all steps but the first
    arguments = torch.load(found / "training_args.bin", weights_only=False)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (2, 4)
    read = [read_member(read_runs([Path(name)], None).members[0]) for name in ("expected", "found")]
    assert read[0]["examples"] == read[1]["examples"] == 6 * 8 * 16
    assert "| `gradient_accumulation_steps` | 4 |" in (found / "README.md").read_text()

    # A run that is resumed goes on with the batch that was found.
    options = (*options, "--resume_from_checkpoint=found/checkpoint-4")
    call(causal_lm.main, *STEPS_OF_8, *kind, *options)
    assert_same_weights(expected, found)


def test_batch_that_is_no_part_of_a_step_is_not_taken(room, monkeypatch):
    memory_for(monkeypatch, 7)
    steps = record_training(monkeypatch)
    options = ("--global_batch_size=12", "--per_device_train_batch_size=12", "--auto_find_batch_size")
    call(causal_lm.main, TEXT_RUN, *options, "--output_dir=run", "--max_steps=2")
    assert [len(step.input_ids) for step in steps] == [6, 6, 6, 6]


@pytest.mark.parametrize("option", [[], ["--auto_find_batch_size"]])
def test_memory_that_suffices_for_no_batch_is_told(room, capsys, monkeypatch, option):
    memory_for(monkeypatch, 0)
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", *option)
    assert f"with {1 if option else 4} as `per_device_train_batch_size`: lower it" in line


def test_memory_that_does_not_suffice_to_evaluate_is_told(room, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(RunTrainer, "prediction_step", fail)
    options = ("--auto_find_batch_size", "--eval_strategy=steps", "--eval_steps=2")
    line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", *options)
    assert "with 4 as `per_device_eval_batch_size`: lower it" in line


def test_checkpoint_of_the_model_alone_is_not_resumed_but_started_from(room, capsys):
    options = (TEXT_RUN, "--save_only_model")
    call(causal_lm.main, *options, "--output_dir=run")
    for named in ("--resume_from_checkpoint", "--resume_from_checkpoint=run/checkpoint-2"):
        line = refusal(capsys, causal_lm.main, *options, "--output_dir=run", named)
        step = named[-1] if named[-1].isdigit() else "6"
        start = f"--initial_checkpoint=run/checkpoint-{step}"
        for word in (f"run/checkpoint-{step} cannot be resumed", "without its optimizer", "`save_only_model`", start):
            assert word in line
    # What the sentence says can be done.
    call(causal_lm.main, TEXT_RUN, "--output_dir=new", start, "--learning_rate=0", "--max_steps=1")
    assert_same_weights(room / "new", room / "run" / "checkpoint-2")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--learning_rate=0.02", ["0.01 as `learning_rate`, not 0.02"]),
        ("--weight_decay=0", ["0.1 as `weight_decay`, not 0.0"]),
        ("--optim=sgd", ["None as `optim`, not 'sgd'"]),
        ("--adam_beta1=0.5", ["0.9 as `adam_beta1`, not 0.5"]),
    ],
)
def test_run_is_not_resumed_with_what_its_checkpoints_would_replace(room, capsys, option, words):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2")
    arguments = (TEXT_RUN, "--output_dir=run", "--resume_from_checkpoint")
    line = refusal(capsys, causal_lm.main, *arguments, option)
    assert not [word for word in words if word not in line], line
    call(causal_lm.main, *arguments, "--learning_rate=0.01", "--adam_beta1=0.9", "--max_steps=3")  # as before


@pytest.mark.parametrize("main", [causal_lm.main, altered.main])
def test_smoothed_labels_are_those_of_the_next_token(room, main):
    """Whatever the class of the model is called, by whose name the Trainer would know how to shift labels."""
    altered_part = ["--alteration=dead_gate"] if main is altered.main else []
    with pytest.MonkeyPatch.context() as patch:
        steps = record_training(patch)
        call(main, TEXT_RUN, "--output_dir=run", "--label_smoothing_factor=0.1", "--learning_rate=0", *altered_part)
    model = DCAForCausalLM.from_pretrained(room / "run").eval()
    tokens = torch.tensor(steps[0].input_ids)
    with torch.no_grad():
        log_probabilities = model(tokens).logits[:, :-1].log_softmax(-1)
    likelihood = log_probabilities.gather(-1, tokens[:, 1:, None]).mean()
    expected = -0.9 * likelihood - 0.1 * log_probabilities.mean()
    assert steps[0].loss == pytest.approx(expected.item(), rel=1e-5)
    # What is held out has the loss that other runs have, too.
    figures = results(room / "run")
    assert figures["eval_loss"] == pytest.approx(math.log(figures["eval_perplexity"]), rel=1e-5)


def test_smoothed_labels_are_summed_over_batches_as_one(room):
    options = (TEXT_RUN, "--label_smoothing_factor=0.1", "--global_batch_size=8")
    for size in (2, 8):
        call(causal_lm.main, *options, f"--output_dir=run-{size}", f"--per_device_train_batch_size={size}")
    histories = [json.loads((room / f"run-{size}" / "trainer_state.json").read_text()) for size in (2, 8)]
    losses = [[entry["loss"] for entry in each["log_history"] if "loss" in entry] for each in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_smoothed_labels_leave_the_held_out_loss_of_images_as_it_is(room):
    write_images(room / "images")
    for factor in (0, 0.5):
        options = ("--learning_rate=0", f"--label_smoothing_factor={factor}", f"--output_dir=run-{factor}")
        call(image_classification.main, IMAGE_RUN, *options, "--max_steps=1")
    assert results(room / "run-0.5")["eval_loss"] == results(room / "run-0")["eval_loss"]
    assert results(room / "run-0.5")["train_loss"] != results(room / "run-0")["train_loss"]


def test_what_is_held_out_is_whole_where_batches_that_are_not_are_dropped(room):
    for option in ("true", "false"):
        options = ("--learning_rate=0", "--max_steps=1", f"--dataloader_drop_last={option}")
        call(causal_lm.main, TEXT_RUN, *options, f"--output_dir=run-{option}")
    assert results(room / "run-true")["eval_loss"] == results(room / "run-false")["eval_loss"]


def test_epoch_in_order_is_filled_up_to_whole_steps(room, monkeypatch):
    steps = record_training(monkeypatch)
    options = ("--train_sampling_strategy=sequential", "--global_batch_size=96", "--per_device_train_batch_size=96")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2", *options)
    first, second = (step.input_ids for step in steps)
    assert len(first) == len(second) == 96
    assert second[132 - 96 :] == first[: 2 * 96 - 132]


def test_training_arguments_can_be_read_without_the_command(room):
    """In a process of its own, that the command was, too, and in one that has transformers alone."""
    options = (TEXT_RUN, "--output_dir=run", "--global_batch_size=8")
    status, printed = forked(lambda: run_as_main("training.causal_lm", *options))
    assert status == 0, printed
    read = (
        "import sys, torch\n"
        "for file in sys.argv[1:]:\n"
        "    arguments = torch.load(file, weights_only=False)\n"
        "    print(type(arguments).__module__, arguments.learning_rate, arguments.global_batch_size, arguments.device)\n"
        "assert 'training' not in sys.modules"
    )
    files = [str(room / folder / "training_args.bin") for folder in ("run", "run/checkpoint-2")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-c", read, *files]
    completed = subprocess.run(line, cwd=room, env=environment, capture_output=True, text=True, timeout=120)
    assert completed.stdout == 2 * "transformers.training_args 0.01 8 cpu\n", completed.stderr


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_files_of_a_run_can_be_read_by_those_who_can_read_the_others(room, mask):
    before = os.umask(mask)
    try:
        call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    finally:
        os.umask(before)
    files = [path for path in (room / "run").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert {"run/model.safetensors", "run/checkpoint-2/model.safetensors"} <= {str(p.relative_to(room)) for p in files}


def test_streamed_run(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--streaming")
    assert "a stream of documents" in (room / "run" / "README.md").read_text()
    assert results(room / "run")["eval_loss"] > 0


def test_streamed_run_has_the_batches_of_the_text_in_order(room, monkeypatch):
    steps = record_training(monkeypatch)
    options = ("--streaming", "--stream_lanes=1", "--shuffle_buffer=1")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=3", *options)
    tokenizer = AutoTokenizer.from_pretrained(room / "run")
    seen = tokenizer.decode([token for step in steps for block in step.input_ids for token in block])
    texts = [json.loads(line)["text"] for line in (room / "text.jsonl").read_text().splitlines()]
    assert tokenizer.eos_token.join(texts).startswith(seen) and len(seen) > 100


def test_run_on_token_ids(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run")
    tokenizer = AutoTokenizer.from_pretrained(room / "run")
    for file in ("text", "held_out"):
        texts = [json.loads(line)["text"] for line in (room / f"{file}.jsonl").read_text().splitlines()]
        write_jsonl(room / f"{file}_ids.jsonl", tokenizer(texts)["input_ids"], column="ids")
    data = ("--dataset=text_ids.jsonl", "--eval_dataset=held_out_ids.jsonl", "--text_column=ids", "--tokenizer=run")
    call(causal_lm.main, TEXT_RUN, "--output_dir=ids", *data)
    assert_same_weights(room / "run", room / "ids")
    assert results(room / "run")["eval_bits_per_byte"] == results(room / "ids")["eval_bits_per_byte"]


def test_run_says_where_it_is(room, capsys):
    call(causal_lm.main, TEXT_RUN, "--max_steps=1")
    assert "The run is complete: runs/text (model card: runs/text/README.md" in capsys.readouterr().out


def test_run_ends_with_both_models_figures_and_what_they_write(room, capsys):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--baseline=standard")
    said = capsys.readouterr().out.rpartition("| parameters |")[2]
    for folder in (room / "run", room / "run" / "standard"):
        assert f"{results(folder)['eval_loss']:.4f}" in said
        assert sample_text(DCAForCausalLM, folder, "def f(", seed=0) == sample_text(
            DCAForCausalLM, folder, "def f(", 0
        )
    assert "This is one run with one seed." in said
    samples = re.findall(r"^(\S+) continues ('.*'):\n\n(.*)", said, flags=re.MULTILINE)
    assert [name for name, _, _ in samples] == ["dca", "standard"]
    for _, prompt, sample in samples:
        assert sample.startswith(ast.literal_eval(prompt).partition("\n")[0])


def test_run_ends_where_no_position_is_left_to_write_on(room, capsys):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_position_embeddings=4", "--max_steps=1")
    assert "The run is complete" in capsys.readouterr().out


def test_losses_of_documents(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--baseline=standard", "--document_losses")
    model = DCAForCausalLM.from_pretrained(room / "run")
    tokenizer = AutoTokenizer.from_pretrained(room / "run")
    texts = [json.loads(line)["text"] for line in (room / "held_out.jsonl").read_text().splitlines()]
    owners = [i for i, text in enumerate(texts) for _ in range(len(tokenizer(text)["input_ids"]) + 1)]
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    size = yaml.safe_load((room / TEXT_RUN).read_text())["data"]["block_size"]
    losses = {}
    for start in range(0, len(ids) // size * size, size):
        block = torch.tensor([ids[start : start + size]])
        logits = model(block).logits[0, :-1]
        for i, loss in enumerate(cross_entropy(logits, block[0, 1:], reduction="none").tolist(), start + 1):
            losses.setdefault(owners[i], []).append(loss)
    found = json.loads((room / "run" / "document_losses.json").read_text())
    assert [(each["document"], each["tokens"]) for each in found] == [(i, len(own)) for i, own in losses.items()]
    for each in found:
        assert each["loss"] == pytest.approx(sum(losses[each["document"]]) / each["tokens"], abs=1e-5)
    for folder in (room / "run", room / "run" / "standard"):
        found = json.loads((folder / "document_losses.json").read_text())
        mean = sum(each["tokens"] * each["loss"] for each in found) / sum(each["tokens"] for each in found)
        assert mean == pytest.approx(results(folder)["eval_loss"], abs=1e-6)


def test_implementation_that_cannot_run_is_refused_before_the_training(room, monkeypatch, capsys):
    monkeypatch.setattr(grn_triton, "INTERPRETED", False)
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--grn_implementation=triton")
    assert "`grn_implementation` is 'triton', which cannot run" in line and "leave it out" in line
    assert not (room / "runs").exists()


def test_run_of_the_first_release_is_not_resumed(tmp_path):
    """Its gates saw entries as they are, and would go on as another model."""
    for fields in ({"residual_scheme": "grn_v2"}, {"residual_scheme": "dca", "gate_norm": "rms"}, None):
        if fields is not None:
            (tmp_path / "config.json").write_text(json.dumps(fields))
        check_gates(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"residual_scheme": "dca"}))
    with pytest.raises(UserError, match="of a run with modeling-dca 0.1.*--overwrite to start again"):
        check_gates(tmp_path)
