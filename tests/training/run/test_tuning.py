"""Runs that train a part of a trained model: what DCA added, or adapters; and the study that compares them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    training_args,
)

from modeling_dca import DCAConfig, DCAForCausalLM
from tests.training.tiny import (
    IMAGE_RUN,
    IMAGES,
    TEXT,
    TEXT_RUN,
    call,
    failure,
    refusal,
    weights,
    write_images,
    write_room,
)
from training import causal_lm, evaluate, image_classification, retrofit
from training.run.tuning import tune
from training.studies.study import read_study
from training.text.tokenizer import train_tokenizer


ROOT = Path(__file__).parents[3]
LLAMA = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 64}
FROZEN, ADAPTERS = ("--freeze_backbone",), ("--residual_scheme=standard", "--lora_rank=2")


def save_llama(folder, **sizes):
    """A Llama with a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, **sizes})).save_pretrained(folder)
    texts = (json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines())
    train_tokenizer(texts, 290, 64).save_pretrained(folder)


@pytest.fixture
def llama(room):
    """A run that goes on from a Llama."""
    save_llama("llama")
    run = {**TEXT, "model": {"initial_checkpoint": "llama"}}
    Path(TEXT_RUN).write_text(yaml.safe_dump(run))
    return room


def changed(folder, before):
    after = weights(folder)
    assert after.keys() == before.keys()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


def test_frozen_backbone_stays_as_it_was(llama, capsys):
    call(causal_lm.main, TEXT_RUN, *FROZEN, "--output_dir=run")
    before = DCAForCausalLM.from_residual("llama").state_dict()
    assert changed(Path("run"), before) == {name for name in before if name.endswith(("delta", "gate"))}
    trained = sum(weight.numel() for name, weight in before.items() if name.endswith(("delta", "gate")))
    assert f"{trained:,} parameters are trained, and " in capsys.readouterr().out
    assert "| `freeze_backbone` | True |" in Path("run/README.md").read_text()
    assert yaml.safe_load(Path("run/run.yaml").read_text())["training"]["freeze_backbone"] is True


def test_adapters_are_added_to_the_weights(llama, capsys):
    call(causal_lm.main, TEXT_RUN, *ADAPTERS, "--output_dir=run")
    before = DCAForCausalLM.from_residual("llama", residual_scheme="standard").state_dict()
    projections = {name for name in before if name.endswith("_proj.weight")}
    assert len(projections) == 14 and changed(Path("run"), before) == projections
    for name in projections:
        assert torch.linalg.matrix_rank(weights(Path("run"))[name] - before[name], rtol=1e-3) <= 2, name
    trained = sum(2 * sum(before[name].shape) for name in projections)
    assert f"{trained:,} parameters are trained, and " in capsys.readouterr().out
    assert "| `lora_rank` | 2 |" in Path("run/README.md").read_text()
    # What was evaluated is what was saved.
    told = json.loads(Path("run/all_results.json").read_text())["eval_loss"]
    call(evaluate.main, "run", "--output=figures.json")
    assert json.loads(Path("figures.json").read_text())["eval_loss"] == pytest.approx(told, rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained("run")
    assert type(model) is DCAForCausalLM and all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_beside_dca(llama):
    call(causal_lm.main, TEXT_RUN, "--lora_rank=1", "--output_dir=run", "--max_steps=2")
    before = DCAForCausalLM.from_residual("llama").state_dict()
    assert changed(Path("run"), before) == {name for name in before if name.endswith("_proj.weight")}


@pytest.mark.parametrize("arguments", [FROZEN, ADAPTERS], ids=["frozen", "adapters"])
def test_resumed_run_ends_with_the_same_weights(llama, arguments):
    call(causal_lm.main, TEXT_RUN, *arguments, "--output_dir=run")
    whole = weights(Path("run"))
    for checkpoint in ("checkpoint-2", "checkpoint-6"):
        call(causal_lm.main, TEXT_RUN, *arguments, "--output_dir=run", f"--resume_from_checkpoint=run/{checkpoint}")
        assert changed(Path("run"), whole) == set()


def test_best_model_at_the_end_is_loaded_into_the_adapters(llama):
    options = ("--eval_strategy=steps", "--eval_steps=2", "--load_best_model_at_end", "--learning_rate=3.0")
    call(causal_lm.main, TEXT_RUN, *ADAPTERS, *options, "--output_dir=run")
    history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    best = min(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert json.loads(Path("run/all_results.json").read_text())["eval_loss"] == pytest.approx(best, rel=1e-5)


CHECKPOINTING = ("--gradient_checkpointing", '--gradient_checkpointing_kwargs={"use_reentrant": true}')


def test_all_blocks_are_trained_with_checkpointing(llama):
    call(causal_lm.main, TEXT_RUN, *FROZEN, *CHECKPOINTING, "--output_dir=run")
    call(causal_lm.main, TEXT_RUN, *FROZEN, "--output_dir=other")
    for name, weight in weights(Path("other")).items():
        torch.testing.assert_close(weights(Path("run"))[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [(), CHECKPOINTING], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("arguments", [FROZEN, ADAPTERS], ids=["frozen", "adapters"])
def test_the_head_of_a_classifier_is_trained_too(room, arguments, options):
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=standard", "--residual_scheme=standard", "--max_steps=1")
    run = {**IMAGES, "model": {"initial_checkpoint": "standard"}}
    Path(IMAGE_RUN).write_text(yaml.safe_dump(run))
    call(image_classification.main, IMAGE_RUN, *arguments, *options, "--output_dir=run")
    scheme = {"residual_scheme": "standard"} if arguments is ADAPTERS else {}
    before = type(AutoModelForImageClassification.from_pretrained("standard")).from_residual("standard", **scheme)
    ends = ("_proj.weight",) if arguments is ADAPTERS else ("delta", "gate")
    expected = {name for name in before.state_dict() if name.endswith(ends) or name.startswith("classifier.")}
    assert changed(Path("run"), before.state_dict()) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*FROZEN, "--lora_rank=2"], "`freeze_backbone` and `lora_rank` are both set"),
        ([*FROZEN, "--residual_scheme=standard"], "`residual_scheme` is 'standard', which adds nothing to train"),
        ([*FROZEN, "--baseline=standard"], "`baseline` is 'standard', which adds nothing to train"),
        (["--lora_rank=0"], "`lora_rank` is 0; it must be at least 1"),
        (["--lora_rank=2.5"], "2.5"),
        (
            ["--lora_rank=2", "--initial_checkpoint=adapted/checkpoint-2"],
            "lacks 14 weights, for example model.layers.0",
        ),
        (["--initial_checkpoint=base"], "'base', which lacks 1 weights, for example lm_head.weight"),
        (["--output_dir=adapted", "--resume_from_checkpoint", "--lora_rank=3"], "with 2 as `lora_rank`, not 3"),
        (["--output_dir=adapted", "--resume_from_checkpoint"], "with 2 as `lora_rank`, not None"),
        (["--output_dir=adapted", "--resume_from_checkpoint", *FROZEN], "not True, and its checkpoints depend on it"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(llama, capsys, adapted, arguments, words):
    shutil.copytree(adapted, "adapted")
    DCAForCausalLM(DCAConfig(**{key: LLAMA[key] for key in list(LLAMA)[:4]})).model.save_pretrained("base")
    for file in Path("llama").glob("tokenizer*"):
        shutil.copy(file, "base")
    if words.startswith(("lacks", "'base'")):  # which is seen when the model is made
        assert words in failure(capsys, causal_lm.main, TEXT_RUN, *arguments, "--output_dir=run")
    else:
        assert words in refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run of a DCA model with adapters, and its checkpoints."""
    folder = tmp_path_factory.mktemp("adapted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_room(folder)
        save_llama("llama")
        Path(TEXT_RUN).write_text(yaml.safe_dump({**TEXT, "model": {"initial_checkpoint": "llama"}}))
        call(causal_lm.main, TEXT_RUN, "--lora_rank=2", "--output_dir=adapted", "--max_steps=3")
    return folder / "adapted"


@pytest.mark.parametrize("field", ["--freeze_backbone", "--lora_rank=2"])
def test_a_model_that_was_never_trained_is_not_left_so(room, capsys, field):
    assert "would stay random: set `initial_checkpoint`" in refusal(capsys, causal_lm.main, TEXT_RUN, field)


def test_adapters_need_their_package(llama, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package peft" in refusal(capsys, causal_lm.main, TEXT_RUN, *ADAPTERS)


@pytest.mark.parametrize("arguments", [FROZEN, ADAPTERS], ids=["frozen", "adapters"])
def test_models_that_are_shared_out_are_refused(llama, capsys, monkeypatch, arguments):
    monkeypatch.setattr("training.run.tuning.uses_fsdp", lambda training: True)
    assert "does not support sharded models" in refusal(capsys, causal_lm.main, TEXT_RUN, *arguments)


def test_unmerged_checkpoint_is_not_evaluated(llama, adapted, capsys):
    shutil.copytree(adapted, "adapted")
    assert "lacks 14 weights" in failure(capsys, evaluate.main, "adapted/checkpoint-3")


# The study of a real language model


SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "gated_mlp": True}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is asked of a GPU alone is there."""
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)


def study_of(name, room):
    shutil.copytree(ROOT / "configuration" / "retrofit", room / "configuration" / "retrofit")
    return read_study(Path("configuration", "retrofit", f"{name}.yaml"))


@pytest.fixture
def source(room):
    """A tiny model in the place of SmolLM2."""
    LlamaConfig(**LLAMA).save_pretrained("runs/retrofit/smollm2-source")
    save_llama("runs/retrofit/smollm2-source", max_position_embeddings=512)
    return room


@pytest.mark.parametrize("name", ["smollm2", "smollm2-gpu"])
def test_study_compares_like_with_like(source, on_a_gpu, name):
    study = study_of(name, source)
    assert study.baseline == "as-it-is"
    apart = {"output_dir", "seed", "learning_rate", "freeze_backbone", "lora_rank"}
    kinds = set()
    for member in study.members:
        training = {key: value for key, value in member.run.named["training"].items() if key not in apart}
        kinds.add(json.dumps([training, member.run.named["data"]], sort_keys=True))
        assert member.group == f"lr={member.run.training.learning_rate:g}"
    assert len(kinds) == 1
    asked = {
        each.variant: (each.run.config.residual_scheme, each.run.training.freeze_backbone, each.run.training.lora_rank)
        for each in study.members
    }
    assert asked == {
        "as-it-is": ("standard", False, None),
        "dca": ("dca", False, None),
        "dca-frozen": ("dca", True, None),
        "lora": ("standard", False, 3),
    }
    assert len({member.group for member in study.members}) == 2


def test_gpu_study_has_a_hundred_times_the_tokens(source, on_a_gpu):
    small, large = study_of("smollm2", source), read_study(Path("configuration/retrofit/smollm2-gpu.yaml"))
    tokens = []
    for study in (small, large):
        run = study.members[0].run
        tokens.append(run.training.max_steps * run.training.per_device_train_batch_size * run.data.block_size)
    assert tokens[1] == 100 * tokens[0]


def test_adapters_of_the_study_are_about_as_many_as_dca_adds(source):
    runs = {member.variant: member.run for member in study_of("smollm2", source).members}
    trained = {}
    for variant in ("lora", "dca-frozen"):
        scheme = runs[variant].config.residual_scheme
        with torch.device("meta"):
            model = DCAForCausalLM(DCAConfig(**SMOLLM2, residual_scheme=scheme))
            tune(model, runs[variant].training)
        trained[variant] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == {"lora": 915_840, "dca-frozen": 873_792}
    page = (ROOT / "configuration" / "retrofit" / "smollm2.yaml").read_text()
    assert all(f"{number:,}" in page for number in trained.values())


def test_every_variant_of_the_study_trains(source):
    study = study_of("smollm2", source)
    losses = {}
    for member in study.members[:4]:
        small = [
            "--dataset=text.jsonl",
            "--eval_dataset=held_out.jsonl",
            "--max_steps=2",
            "--eval_steps=1",
            "--block_size=32",
        ]
        call(causal_lm.main, *member.arguments, *small, "--logging_steps=1", "--report_to=none", "--use_cpu")
        history = json.loads((member.folder / "trainer_state.json").read_text())["log_history"]
        losses[member.variant] = [entry["loss"] for entry in history if "loss" in entry]
        assert member.is_whole()
    assert len(losses) == 4
    first = [each[0] for each in losses.values()]
    # The same model on the same batch, whatever of it is trained.
    assert first == pytest.approx([first[0]] * 4, rel=1e-5)


def test_demo_trains_what_was_added_and_tells_the_loss_before_and_after(source):
    shutil.copytree(ROOT / "configuration" / "retrofit", source / "configuration" / "retrofit")
    call(retrofit.main, "runs/retrofit/smollm2-source", "runs/smollm2", "--last_k=2")
    small = ["--dataset=text.jsonl", "--eval_dataset=held_out.jsonl", "--max_steps=3", "--block_size=32", "--use_cpu"]
    call(causal_lm.main, "configuration/retrofit/demo.yaml", *small, "--report_to=none")
    folder = Path("runs/retrofit/demo")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry][0] == 0
    assert "eval_loss" in json.loads((folder / "all_results.json").read_text())
    before, after = (DCAForCausalLM.from_pretrained(each).state_dict() for each in ("runs/smollm2", folder))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"delta", "gate"}
