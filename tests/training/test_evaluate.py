"""The evaluation of checkpoints: that of a run gives the run's own figures, and others go through the same code."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.training.tiny import (
    IMAGE_RUN,
    TEXT_RUN,
    call,
    failure,
    image,
    need_image_processors,
    write_images,
    write_jsonl,
    write_room,
)
from training import causal_lm, evaluate, image_classification
from training.results.metrics import Perplexity
from training.run import evaluation
from training.text.blocks import PackedBlocks
from training.text.documents import load_text
from training.text.fields import TextDataArguments


pytestmark = pytest.mark.usefixtures("offline")

FIGURES = {
    "text": ("eval_loss", "eval_perplexity", "eval_bits_per_byte"),
    "image": ("eval_loss", "eval_accuracy"),
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def checkpoints(comparison, tmp_path_factory):
    """A room with `run` (and its baseline in it), `images` of two classes and `image-run`, and models of transformers."""
    room = tmp_path_factory.mktemp("checkpoints")
    write_room(room)
    write_images(room / "images", count=60)
    shutil.copytree(comparison[0] / "run", room / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        call(image_classification.main, IMAGE_RUN, "--output_dir=image-run", "--max_steps=12", "--seed=3")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(room / "run")
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES)).save_pretrained(room / "llama")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        room / "gpt2"
    )
    for name in ("llama", "gpt2"):
        tokenizer.save_pretrained(room / name)
    labels = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **labels, **SIZES))
    vit.save_pretrained(room / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(room / "vit")
    return room


@pytest.fixture
def in_room(checkpoints, monkeypatch):
    monkeypatch.chdir(checkpoints)
    return checkpoints


def figures(*arguments, output="figures.json"):
    call(evaluate.main, *arguments, f"--output={output}", "--overwrite")
    with open(output) as file:
        return json.load(file)


@pytest.mark.parametrize(
    ("kind", "run", "arguments"),
    [
        ("text", "run", []),
        ("text", "run/standard", []),
        ("text", "run", ["--batch_size=4", "--device=cpu"]),  # (which the run had, too)
        ("image", "image-run", []),
    ],
)
def test_run_is_evaluated_to_its_own_figures(in_room, kind, run, arguments):
    if kind == "image":
        need_image_processors()
    found, own = figures(run, *arguments), json.loads((in_room / run / "all_results.json").read_text())
    assert [found[key] for key in FIGURES[kind]] == [own[key] for key in FIGURES[kind]]
    assert found["model"] == ("DCAForCausalLM" if kind == "text" else "DCAForImageClassification")
    assert found["batch_size"] == 4


def test_checkpoint_of_a_run_is_evaluated_on_the_data_of_the_run(in_room):
    early, last = figures("run/checkpoint-2"), figures("run")
    assert early["data"] == last["data"] and early["data"]["eval_dataset"] == "held_out.jsonl"
    assert early["eval_loss"] > last["eval_loss"]


def test_run_in_half_precision_is_evaluated_as_it_was_trained(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--bf16", "--use_cpu", "--max_steps=2")
    own = json.loads((room / "run" / "all_results.json").read_text())
    found = figures("run")
    assert [found[key] for key in FIGURES["text"]] == [own[key] for key in FIGURES["text"]] and found["bf16"]
    whole = figures("run", "--dtype=float32")
    assert whole["eval_loss"] != own["eval_loss"] and "bf16" not in whole
    assert whole["eval_loss"] == pytest.approx(own["eval_loss"], abs=0.02)
    assert figures("run", "--dtype=bfloat16")["dtype"] == "bfloat16"


def held_out_blocks(folder, length):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, documents = load_text(TextDataArguments(dataset="text.jsonl", eval_dataset="held_out.jsonl"))
    blocks = PackedBlocks(documents, "text", tokenizer, length, 300)
    return torch.tensor([block["input_ids"].tolist() for block in blocks]), blocks.tokens_per_byte()


@torch.no_grad()
@pytest.mark.parametrize(("name", "model_class"), [("llama", LlamaForCausalLM), ("gpt2", GPT2LMHeadModel)])
def test_language_model_of_transformers(in_room, capsys, name, model_class):
    data = ("--dataset=text.jsonl", "--eval_dataset=held_out.jsonl", "--block_size=12")
    found = figures(name, *data, "--batch_size=5")
    blocks, tokens_per_byte = held_out_blocks(name, 12)
    logits = model_class.from_pretrained(name).eval()(blocks).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["eval_bits_per_byte"] == pytest.approx(loss / math.log(2) * tokens_per_byte, rel=1e-5)
    assert found["model"] == model_class.__name__ and found["examples"] == len(blocks) > 20
    assert f"| held-out perplexity            | {math.exp(loss):.4g}"[:-1] in capsys.readouterr().out


@torch.no_grad()
def test_image_classifier_of_transformers(in_room):
    need_image_processors()
    found = figures("vit", "--dataset=images", "--eval_dataset=images")
    model = ViTForImageClassification.from_pretrained("vit").eval()
    values = torch.tensor([list(image(value).getdata()) for value in range(60)]).view(60, 1, 8, 8) / 127.5 - 1
    logits, labels = model(values).logits, torch.arange(60) % 2
    assert found["eval_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert found["examples"] == 60


def test_all_of_a_file_is_evaluated_on(in_room):
    write_jsonl(in_room / "other.jsonl", ["deep cross attention " * 40])
    found = figures("run", "--eval_dataset=other.jsonl")
    blocks = PackedBlocks(
        *(load_text(TextDataArguments(dataset="other.jsonl", eval_dataset="other.jsonl"))[1:]),
        *("text", AutoTokenizer.from_pretrained("run"), 16, 300),
    )
    assert found["examples"] == len(list(blocks)) and found["data"]["block_size"] == 16
    assert found["data"]["dataset"] == found["data"]["eval_dataset"] == "other.jsonl"


def test_other_data_is_held_out_of_by_its_own_fields(in_room):
    found = figures("run", "--dataset=text.jsonl", "--eval_fraction=0.5")
    assert found["data"]["eval_dataset"] is None and found["data"]["eval_fraction"] == 0.5
    other = figures("run", "--dataset=text.jsonl", "--eval_fraction=0.5", "--split_seed=2")
    assert [each["data"]["split_seed"] for each in (found, other)] == [42, 2]
    assert found["eval_loss"] != other["eval_loss"]


def test_figures_are_not_overwritten_unasked(in_room, capsys):
    (in_room / "mine.json").write_text("{}")
    line = failure(capsys, evaluate.main, "run", "--output=mine.json")
    assert "`output` is 'mine.json'" in line and "--overwrite" in line
    assert (in_room / "mine.json").read_text() == "{}"
    assert figures("run", output="new/figures.json")["eval_loss"] > 0  # (with --overwrite, in a folder that is made)


def change(folder, file, **fields):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **fields}))


def copy_without(room, name, *files):
    shutil.rmtree(room / "copy", ignore_errors=True)
    shutil.copytree(room / name, room / "copy")
    for file in files:
        (room / "copy" / file).unlink()
    return room / "copy"


TEXT_DATA = ("--dataset=text.jsonl", "--eval_dataset=held_out.jsonl")


def test_checkpoint_without_a_tokenizer(in_room, capsys):
    copy_without(in_room, "llama", "tokenizer.json", "tokenizer_config.json")
    assert "'copy', a folder without a tokenizer" in failure(capsys, evaluate.main, "copy", *TEXT_DATA)
    assert figures("copy", *TEXT_DATA, "--tokenizer=llama")["eval_loss"] == figures("llama", *TEXT_DATA)["eval_loss"]


def test_checkpoint_without_an_image_processor(in_room, capsys):
    need_image_processors()
    copy_without(in_room, "vit", "preprocessor_config.json")
    line = failure(capsys, evaluate.main, "copy", "--dataset=images")
    assert "'copy' cannot be evaluated" in line and "processor" in line


def test_checkpoint_that_lacks_weights(in_room, capsys):
    folder = copy_without(in_room, "llama")
    LlamaForCausalLM.from_pretrained("llama").model.save_pretrained(folder)
    change(folder, "config.json", architectures=["LlamaForCausalLM"])
    line = failure(capsys, evaluate.main, "copy", *TEXT_DATA)
    assert "'copy' lacks 1 weights of a LlamaForCausalLM, for example lm_head.weight" in line


def test_tokenizer_of_more_tokens_than_the_model_knows(in_room, capsys):
    folder = copy_without(in_room, "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=290, **SIZES)).save_pretrained(folder)
    line = failure(capsys, evaluate.main, "copy", *TEXT_DATA)
    assert "`vocab_size` is 290" in line and "300 tokens" in line


def test_model_of_another_task(in_room, capsys):
    model = BertForSequenceClassification(BertConfig(vocab_size=300, **SIZES))
    model.save_pretrained(in_room / "bert")
    line = failure(capsys, evaluate.main, "bert")
    assert "'bert' is a BertForSequenceClassification" in line and "language models and image classifiers" in line


def test_classes_that_are_not_those_of_the_model(in_room, capsys):
    need_image_processors()
    write_images(in_room / "others", classes=("a", "b", "c"))
    line = failure(capsys, evaluate.main, "vit", "--eval_dataset=others")
    assert "3 classes" in line and "'vit' has 2" in line


@torch.no_grad()
def test_classes_go_by_their_names_where_the_model_knows_them(in_room, capsys):
    need_image_processors()
    folder = copy_without(in_room, "vit")
    change(folder, "config.json", id2label={0: "odd", 1: "even"}, label2id={"odd": 0, "even": 1})
    values = torch.tensor([np.asarray(image(value)).tolist() for value in range(60)]).view(60, 1, 8, 8) / 127.5 - 1
    logits, labels = ViTForImageClassification.from_pretrained("vit").eval()(values).logits, torch.arange(60) % 2
    # So do those of a part of the classes.
    shutil.copytree(in_room / "images" / "odd", in_room / "half" / "odd")
    for data, part in (("images", labels >= 0), ("half", labels == 1)):
        for name, classes in (("vit", labels), ("copy", 1 - labels)):
            expected = cross_entropy(logits[part], classes[part]).item()
            assert figures(name, f"--eval_dataset={data}")["eval_loss"] == pytest.approx(expected, rel=1e-5)
    # Of other names, one cannot know.
    change(folder, "config.json", id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    capsys.readouterr()
    straight = figures("vit", "--eval_dataset=images")["eval_loss"]
    assert figures("copy", "--eval_dataset=images")["eval_loss"] == straight
    assert "are matched by number" in capsys.readouterr().out


def test_split_that_is_evaluated_on_is_loaded_alone(in_room, monkeypatch):
    need_image_processors()
    for split, count in (("train", 4), ("test", 6)):
        write_images(in_room / "splits" / split, count=count)
        (in_room / "texts" / split).mkdir(parents=True)
        write_jsonl(in_room / "texts" / split / "a.jsonl", ["deep cross attention " * 40])
    # Nothing of the other split can be read.
    for file in (in_room / "splits" / "train" / "odd").iterdir():
        file.write_bytes(b"")
    (in_room / "texts" / "train" / "a.jsonl").write_text("not JSON")
    assert figures("vit", "--dataset=splits", "--eval_split=test")["examples"] == 6
    assert figures("llama", "--dataset=texts", "--eval_split=test")["examples"] > 0
    # It is named instead of what a run had held out.
    found = figures("run", "--eval_split=train[:20]")
    assert found["data"]["eval_dataset"] is None and found["data"]["eval_split"] == "train[:20]"


def test_run_from_before_the_split_had_a_seed_is_evaluated_on_what_it_held_out(room):
    (room / TEXT_RUN).write_text((room / TEXT_RUN).read_text().replace("  eval_dataset: held_out.jsonl\n", ""))
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--split_seed=5", "--max_steps=2", "--eval_fraction=0.3")
    own = json.loads((room / "run" / "all_results.json").read_text())
    record = (room / "run" / "run.yaml").read_text()
    assert "split_seed: 5" in record and "  seed: 1" in record
    (room / "run" / "run.yaml").write_text(record.replace("  split_seed: 5\n", "").replace("  seed: 1", "  seed: 5"))
    found = figures("run")
    assert found["data"]["split_seed"] == 5 and found["eval_loss"] == own["eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["'nowhere' is not a local folder", "Hub"]),
        (["text.jsonl"], ["'text.jsonl'"]),
        ([], ["CHECKPOINT"]),
        (["run", "--batch_size=0"], ["`batch_size` is 0"]),
        (["run", "--dtype=int8"], ["`dtype` is 'int8'", "bfloat16"]),
        (["run", "--device=xla"], ["`device` is 'xla'", "'cpu'"]),
        (["run", "--image_column=x"], ["--image_column"]),
        (["run", "--batch_size=many"], ["batch_size", "many"]),
        (["gpt2", *TEXT_DATA, "--block_size=17"], ["`block_size` is 17", "'gpt2' takes at most 16"]),
        (["run", "--eval_dataset=nothing.jsonl"], ["'nothing.jsonl' does not exist"]),
        (["run", "--output=text.jsonl/figures.json"], ["`output` is 'text.jsonl/figures.json'", "cannot be written"]),
    ],
)
def test_what_cannot_be_evaluated_is_refused(in_room, capsys, arguments, words):
    line = failure(capsys, evaluate.main, *arguments)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["--text_column", "--image_column", "--batch_size"]),
        (["run", "--help"], ["--text_column", "(default: held_out.jsonl)", "(default: 4)"]),
        (["image-run", "--help"], ["--image_column", "(default: images)"]),
    ],
)
def test_help(in_room, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        call(evaluate.main, *arguments)
    printed = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and not [word for word in words if word not in printed]


def test_metric_is_that_of_the_project(in_room, monkeypatch):
    monkeypatch.setattr(Perplexity, "_compute", lambda self, **inputs: {"perplexity": 7.0, "bits_per_byte": 8.0})
    found = figures("llama", *TEXT_DATA)
    assert found["eval_perplexity"] == 7 and found["eval_bits_per_byte"] == 8


def test_several_gpus_are_refused(in_room, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.TrainingArguments, "n_gpu", 2)
    line = failure(capsys, evaluate.main, "run")
    assert "2 GPUs" in line and "CUDA_VISIBLE_DEVICES=0" in line
