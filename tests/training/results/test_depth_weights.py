"""The learned weights of each earlier output, against a computation by hand, and their pictures."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.tiny import call, failure, snapshot
from training import depth_weights as command
from training.results import depth_weights, figures
from training.results.depth_weights import learned_b, measure_depth_weights
from training.results.figures import draw_depth_weights, draw_learned_b, draw_loss_curves
from training.variants.registry import VARIANTS


LAYERS = 4
# The last batch is smaller: each token counts the same.
BATCHES = [torch.arange(24).reshape(3, 8), torch.arange(5, 13).reshape(1, 8)]


def model_of(scheme, last_k=None, seed=0):
    """A model whose generalized residuals are not the plain sum."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = DCAForCausalLM(DCAConfig(**sizes, residual_scheme=scheme, last_k=last_k, attention_dropout=0.5))
    for name, parameter in model.named_parameters():
        if name.endswith(("delta", "gate")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def outputs_of_blocks(model, batch):
    """f_0, f_1, ..., as the blocks return them."""
    outputs = [model.model.embed_tokens(batch)]
    hooks = [
        layer.register_forward_hook(lambda layer, args, results: outputs.append(results[-1]))
        for layer in model.model.layers
    ]
    model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return outputs


def entries_by_hand(block, last_k):
    """The outputs in each entry of a block's stack, by section 4 of method.md."""
    outputs = list(range(block))
    if last_k is None or block <= last_k + 1:
        return [[output] for output in outputs]
    return [[0], outputs[1 : block - last_k], *([output] for output in outputs[block - last_k :])]


@pytest.mark.parametrize("scheme", ["dca", "grn_v3", "grn_v2", "grn_v1"])
@pytest.mark.parametrize("last_k", [None, 1, 2])
def test_depth_weights(scheme, last_k):
    model = model_of(scheme, last_k)
    # As after training: the dropout must be off.
    weights = measure_depth_weights(model.train(), [{"input_ids": batch} for batch in BATCHES])
    names = ["q", "k", "v"] if scheme == "dca" else ["q, k, v"]
    assert [(each["block"], each["input"]) for each in weights] == [
        (block, name) for block in range(1, LAYERS + 1) for name in names
    ]
    outputs = [outputs_of_blocks(model, batch) for batch in BATCHES]
    for each in weights:
        residual = model.model.layers[each["block"] - 1].residual
        index = names.index(each["input"])
        entries = entries_by_hand(each["block"], last_k)
        assert each["outputs"] == [(entry[0], entry[-1]) for entry in entries]
        torch.testing.assert_close(torch.tensor(each["b"]), 1 + residual.delta[index].mean(dim=-1).detach())
        gates = torch.zeros(len(entries))
        if scheme in ("dca", "grn_v3"):
            for position, entry in enumerate(entries):
                tokens = torch.cat([sum(batch[output] for output in entry).flatten(0, 1) for batch in outputs])
                seen = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                gates[position] = (seen @ residual.gate[index]).relu().mean()
            assert gates.max() > 0
        torch.testing.assert_close(torch.tensor(each["gate"]), gates, rtol=1e-4, atol=1e-6)
    json.dumps(weights)  # they are saved so


def test_entry_in_the_middle_holds_the_merged_outputs():
    weights = measure_depth_weights(model_of("grn_v2", last_k=1), [{"input_ids": BATCHES[0]}])
    assert weights[-1]["outputs"] == [(0, 0), (1, 2), (3, 3)]


def test_standard_scheme_has_no_weights():
    assert measure_depth_weights(model_of("standard"), [{"input_ids": BATCHES[0]}]) == []


def test_measuring_leaves_the_model_as_it_was():
    model = model_of("dca").train()
    measure_depth_weights(model, [{"input_ids": BATCHES[0]}])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_depth_weights_of_an_image_classifier():
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    weights = measure_depth_weights(
        DCAForImageClassification(DCAVisionConfig(**sizes)), [{"pixel_values": torch.zeros(2, 3, 8, 8)}]
    )
    assert len(weights) == 6 and weights[-1]["b"] == [1.0, 1.0] and weights[-1]["gate"] == [0.0, 0.0]


def assert_picture(file, height=400):
    """A picture of a size that a card can show, with something in it."""
    with Image.open(file) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 500 <= picture.width <= 3000 and height <= picture.height <= 3000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.mark.parametrize(("scheme", "last_k"), [("dca", None), ("dca", 1), ("grn_v1", None)])
def test_picture_of_depth_weights(tmp_path, scheme, last_k):
    weights = measure_depth_weights(model_of(scheme, last_k), [{"input_ids": BATCHES[0]}])
    # As it is read back from its file, where pairs are lists.
    draw_depth_weights(json.loads(json.dumps(weights)), tmp_path / "weights.png")
    assert_picture(tmp_path / "weights.png")


def test_picture_of_weights_that_have_not_moved(tmp_path):
    model = DCAForCausalLM(DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    draw_depth_weights(measure_depth_weights(model, [{"input_ids": BATCHES[0]}]), tmp_path / "weights.png")
    assert_picture(tmp_path / "weights.png")


@pytest.mark.parametrize(
    "history",
    [
        [{"step": step, "loss": 5 / step} for step in range(1, 9)] + [{"step": 8, "eval_loss": 0.7}],
        [{"step": 1, "loss": 5.0}],
        [{"step": 1, "eval_loss": 5.0}],
        [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 5.0}, {"step": 2, "eval_loss": 5.0}],
    ],
)
def test_picture_of_losses(tmp_path, history):
    draw_loss_curves({"dca": history, "standard": history}, tmp_path / "loss.png")
    assert_picture(tmp_path / "loss.png")


# How the features are spread


def percentile(values, share):
    """By the definition that is linear between the values."""
    values = sorted(values)
    place = share * (len(values) - 1)
    below = min(int(place), len(values) - 2)
    return values[below] + (place - below) * (values[below + 1] - values[below])


@pytest.mark.parametrize(("scheme", "last_k"), [("dca", None), ("dca", 1), ("grn_v2", None), ("grn_v1", None)])
def test_spread_of_the_learned_b_over_two_models(scheme, last_k):
    models = [model_of(scheme, last_k, seed) for seed in (0, 1)]
    spreads = learned_b(models)
    names = ["q", "k", "v"] if scheme == "dca" else ["q, k, v"]
    assert [(each["block"], each["input"]) for each in spreads] == [
        (block, name) for block in range(1, LAYERS + 1) for name in names
    ]
    for each in spreads:
        entries = entries_by_hand(each["block"], last_k)
        assert each["outputs"] == [(entry[0], entry[-1]) for entry in entries]
        for position in range(len(entries)):
            deltas = [model.model.layers[each["block"] - 1].residual.delta.detach() for model in models]
            pooled = [1 + x for delta in deltas for x in delta[names.index(each["input"]), position].tolist()]
            assert len(pooled) == (2 if scheme == "grn_v1" else 2 * 16)
            found = [each[key][position] for key in ("low", "median", "high")]
            assert found == pytest.approx(np.percentile(pooled, [5, 50, 95]), rel=1e-5)
            assert found == pytest.approx([percentile(pooled, share) for share in (0.05, 0.5, 0.95)], rel=1e-5)
        assert {len(each[key]) for key in ("low", "median", "high")} == {len(entries)}


def test_spread_of_a_model_in_half_precision():
    model = model_of("dca")
    (low, *_), (wide, *_) = learned_b([model.to(torch.bfloat16)]), learned_b([model.float()])
    assert low == wide


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the pictures that are drawn."""
    panels, subplots = [], figures.plt.subplots

    def recorded(*args, **kwargs):
        figure, axes = subplots(*args, **kwargs)
        panels.append(axes)
        return figure, axes

    monkeypatch.setattr(figures.plt, "subplots", recorded)
    return panels


@pytest.mark.parametrize(("scheme", "last_k"), [("dca", 1), ("grn_v2", None), ("grn_v1", None)])
def test_picture_of_the_learned_b(tmp_path, drawn, scheme, last_k):
    spreads = learned_b([model_of(scheme, last_k)])
    draw_learned_b(json.loads(json.dumps(spreads)), tmp_path / "b.png")
    assert_picture(tmp_path / "b.png", height=300)
    panels = drawn[0].flat
    for block, axes in enumerate(panels, start=1):
        own = [each for each in spreads if each["block"] == block]
        assert axes.get_title() == f"block {block}" and len(axes.containers) == len(own)
        for each, bars in zip(own, axes.containers):
            line, _, (segments,) = bars.lines
            assert bars.get_label() == each["input"]
            np.testing.assert_allclose(line.get_ydata(), each["median"], rtol=1e-5)
            ends = np.array([segment[:, 1] for segment in segments.get_segments()])
            np.testing.assert_allclose(ends, np.stack([each["low"], each["high"]], axis=1), rtol=1e-5)
            assert np.abs(line.get_xdata() - np.arange(len(each["outputs"]))).max() < 0.5
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["-".join(map(str, sorted({*span}))) for span in own[0]["outputs"]]
    places = [tuple(bars.lines[0].get_xdata()) for bars in panels[-1].containers]
    assert len(set(places)) == len(places)


def test_picture_of_many_blocks_and_of_one(tmp_path, drawn):
    for blocks in (1, 6):
        config = DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2)
        draw_learned_b(learned_b([DCAForCausalLM(config)]), tmp_path / "b.png")
        with Image.open(tmp_path / "b.png") as picture:
            assert max(picture.size) <= 3000
        shown = [axes for axes in drawn[-1].flat if axes.figure is not None]
        assert [axes.get_title() for axes in shown] == [f"block {block}" for block in range(1, blocks + 1)]


# The command


@pytest.fixture
def saved(tmp_path, monkeypatch, offline):
    """The current folder, with checkpoints."""
    monkeypatch.chdir(tmp_path)
    for name, model in (
        ("first", model_of("dca", seed=0)),
        ("second", model_of("dca", seed=1)),
        ("k", model_of("dca", last_k=1)),
        ("v2", model_of("grn_v2")),
        ("v3", model_of("grn_v3")),
        ("standard", model_of("standard")),
    ):
        model.save_pretrained(name)
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_command_writes_figure_and_numbers(saved, capsys):
    before = {name: snapshot(saved / name) for name in ("first", "second")}
    call(command.main, "first", "second", "--output_dir=new/result")
    assert "learned_b.json and learned_b.png" in capsys.readouterr().out
    assert sorted(path.name for path in Path("new/result").iterdir()) == ["learned_b.json", "learned_b.png"]
    content = json.loads(Path("new/result/learned_b.json").read_text())
    assert content["checkpoints"] == ["first", "second"] and content["percentiles"] == [0.05, 0.5, 0.95]
    expected = learned_b([model_of("dca", seed=seed) for seed in (0, 1)])
    assert content["learned_b"] == json.loads(json.dumps(expected))
    assert_picture("new/result/learned_b.png", height=300)
    assert {name: snapshot(saved / name) for name in before} == before

    # Its own files are replaced.
    picture = Path("new/result/learned_b.png").read_bytes()
    call(command.main, "v2", "--output_dir=new/result")
    assert json.loads(Path("new/result/learned_b.json").read_text())["checkpoints"] == ["v2"]
    assert Path("new/result/learned_b.png").read_bytes() != picture


def test_command_reads_an_image_classifier(saved):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    DCAForImageClassification(DCAVisionConfig(**sizes)).save_pretrained("vision")
    call(command.main, "vision", "--output_dir=result")
    spreads = json.loads(Path("result/learned_b.json").read_text())["learned_b"]
    assert len(spreads) == 6 and spreads[-1]["median"] == spreads[-1]["low"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        (["standard"], ["'standard' has no generalized residuals"]),
        (["first", "standard"], ["'standard' has no generalized residuals"]),
        (["first", "k"], ["'k' has other generalized residuals than 'first'"]),
        (["first", "second", "v2"], ["'v2' has other generalized residuals than 'first'"]),
        (["v2", "v3"], ["'v3' has other generalized residuals than 'v2'"]),  # of the same shapes
        (["empty"], ["'empty' cannot be read"]),
        (["damaged"], ["'damaged' cannot be read"]),
        (["altered"], ["'altered' cannot be read"]),
        (["first", "gone"], ["'gone' is no folder"]),
        (["bert"], ["'bert' has no generalized residuals"]),
    ],
    ids=lambda value: "-".join(value) if len(value) > 1 else value[0],
)
def test_checkpoints_that_cannot_be_pooled(saved, capsys, checkpoints, words):
    if checkpoints == ["damaged"]:
        Path("first").rename("damaged")
        Path("damaged/model.safetensors").write_bytes(b"no weights")
    if checkpoints == ["altered"]:
        config = DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=6, num_attention_heads=2)
        VARIANTS["last_4"].model(DCAForCausalLM)(config).save_pretrained("altered")
    if checkpoints == ["bert"]:
        sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained("bert")
    line = failure(capsys, command.main, *checkpoints, "--output_dir=result")
    assert not [word for word in words if word not in line], line
    assert not Path("result").exists()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("result", "mine", "which cannot be made (File exists)"),
        ("result/learned_b.png", "mine", "where a learned_b.png is that is not of this command"),
        ("result/learned_b.json", "mine", "where a learned_b.json is that is not of this command"),
        ("result/learned_b.json", "{}", "where a learned_b.json is that is not of this command"),
        ("result/learned_b.json", "3", "where a learned_b.json is that is not of this command"),
        ("result/learned_b.json/mine", "", "where a learned_b.json is that is not of this command"),
    ],
    ids=["file", "picture", "text", "other_numbers", "number", "folder"],
)
def test_what_is_in_the_way_is_kept(saved, capsys, file, content, reason):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(content)
    before = snapshot(saved)
    line = failure(capsys, command.main, "first", "--output_dir=result")
    assert f"`output_dir` is 'result', {reason}" in line
    assert snapshot(saved) == before


@pytest.mark.parametrize("writer", ["write_whole", "draw_learned_b"])
def test_full_disk(saved, capsys, monkeypatch, writer):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(depth_weights, writer, full)
        line = failure(capsys, command.main, "first", "--output_dir=result")
    assert "`output_dir` is 'result', which cannot be written: No space left on device." in line
    # What was left is no obstacle when there is space again.
    call(command.main, "first", "--output_dir=result")
    assert_picture("result/learned_b.png", height=300)
