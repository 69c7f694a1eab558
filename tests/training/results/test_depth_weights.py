"""What blocks draw from each earlier output, and lose without it, against computations by hand, and the pictures."""

import copy
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.tiny import IMAGE_RUN, call, failure, need_image_processors, snapshot, write_images
from training import depth_weights as command
from training import image_classification
from training.results import figures
from training.results.depth_weights import depth_weights, losses_without, measure_depth_weights, measure_draws
from training.results.figures import draw_depth_spreads, draw_depth_weights, draw_loss_curves, draw_without
from training.run import depth_weights as writing
from training.text.blocks import PackedBlocks
from training.text.documents import load_text
from training.text.fields import TextDataArguments
from training.variants.registry import VARIANTS


LAYERS = 4
# The last batch is smaller: each token counts the same.
BATCHES = [torch.arange(24).reshape(3, 8), torch.arange(5, 13).reshape(1, 8)]


def model_of(scheme, last_k=None, seed=0, vocab_size=30):
    """A model whose generalized residuals are not the plain sum."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
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


@torch.no_grad()
def whole_weight(residual, index, position, tokens):
    """What each feature of each token `(tokens, features)` is multiplied by, and the entry's size, in float64."""
    tokens = tokens.double()
    whole = (1 + residual.delta[index, position].double()).expand_as(tokens)
    if residual.gate is not None:
        seen = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        whole = whole + (seen @ residual.gate[index].double()).relu()[:, None]
    return whole, tokens.square().mean().sqrt().item()


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
        for position, entry in enumerate(entries):
            tokens = torch.cat([sum(batch[output] for output in entry).flatten(0, 1) for batch in outputs])
            whole, size = whole_weight(residual, index, position, tokens)
            assert each["weight"][position] == pytest.approx(whole.mean().item(), rel=1e-4)
            assert each["size"][position] == pytest.approx(size, rel=1e-5)
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


def vision_model():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DCAForImageClassification(DCAVisionConfig(**sizes, num_labels=3))
    for name, parameter in model.named_parameters():
        if name.endswith(("delta", "gate")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
def test_depth_weights_of_an_image_classifier():
    model, images = vision_model(), torch.randn(5, 3, 8, 8)
    weights = measure_depth_weights(model, [{"pixel_values": images[:3]}, {"pixel_values": images[3:]}])
    assert [(each["block"], each["input"]) for each in weights] == [(b, name) for b in (1, 2) for name in "qkv"]
    stacks = []
    hook = model.base_model.layers[1].register_forward_pre_hook(lambda layer, stack: stacks.append(stack))
    model(pixel_values=images)
    hook.remove()
    for each in weights:
        residual = model.base_model.layers[each["block"] - 1].residual
        assert each["outputs"] == [(i, i) for i in range(each["block"])]
        for position in range(each["block"]):
            tokens = stacks[0][position].flatten(0, 1)
            whole, size = whole_weight(residual, "qkv".index(each["input"]), position, tokens)
            assert each["weight"][position] == pytest.approx(whole.mean().item(), rel=1e-4)
            assert each["size"][position] == pytest.approx(size, rel=1e-5)
    assert sum(gate > 0.01 for each in weights for gate in each["gate"]) > len(weights) / 2


# Without an entry


class SlowResidual(torch.nn.Module):
    """A generalized residual in float64, by the formula, whose weights of some entries are 0."""

    def __init__(self, whole, removed):
        super().__init__()
        self.whole, self.removed = whole, removed
        self.delta, self.gate = whole.delta, whole.gate

    def forward(self, *stack):
        results = []
        for index in range(len(self.delta)):
            total = torch.zeros_like(stack[0])
            for i, f in enumerate(stack):
                weight, _ = whole_weight(self.whole, index, i, f.flatten(0, -2))
                total = total + (0 if i in self.removed else 1) * weight.view_as(f) * f
            results.append(total)
        return *results, stack


def loss_of(model, removed=()):
    """The loss of a model in float64, where residuals, by their name (a block's number or "output"), lack entries."""
    model = copy.deepcopy(model).double().eval()
    for block, module in [*enumerate(model.base_model.layers, start=1), ("output", model.base_model)]:
        module.residual = SlowResidual(module.residual, [index for name, index in removed if name == block])
    return held_out_loss(model)


@torch.no_grad()
def held_out_loss(model):
    if isinstance(model, DCAForImageClassification):
        images = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).to(model.dtype)
        return model(pixel_values=images, labels=torch.tensor([0, 1, 2, 1])).loss.item()
    return model(BATCHES[0], labels=BATCHES[0]).loss.item()


def entries_of(block, output, last_k):
    """The index of the entry that holds an output in a block's stack, and all outputs that it holds."""
    return next((i, held) for i, held in enumerate(entries_by_hand(block, last_k)) if output in held)


@pytest.mark.parametrize(
    ("scheme", "last_k"), [("dca", None), ("dca", 1), ("dca", 2), ("grn_v3", None), ("grn_v1", None), ("vision", None)]
)
def test_loss_without_an_entry(scheme, last_k):
    model = vision_model() if scheme == "vision" else model_of(scheme, last_k).eval()
    blocks = len(model.base_model.layers)
    before, rows = losses_without(model, range(blocks + 1), lambda: held_out_loss(model))
    assert before == pytest.approx(loss_of(model), rel=1e-4)
    keys = [(row["without"], row["block"]) for row in rows]
    assert keys == [
        (output, name)
        for output in range(blocks + 1)
        for name in [*range(output + 1, blocks + 1), *(["all"] if output < blocks else []), "output"]
    ]
    for row in rows:
        of = range(row["without"] + 1, blocks + 1) if row["block"] == "all" else [row["block"]]
        found = [(name, *entries_of(blocks + 1 if name == "output" else name, row["without"], last_k)) for name in of]
        assert row["outputs"] == (min(held[0] for *_, held in found), max(held[-1] for *_, held in found))
        expected = loss_of(model, [(name, index) for name, index, _ in found])
        assert row["loss"] == pytest.approx(expected, rel=1e-4) and row["lost"] == row["loss"] - before
    assert len({round(row["loss"], 6) for row in rows}) > len(rows) / 2  # (merged entries go once)
    assert not [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert held_out_loss(model) == before


def test_loss_without_an_entry_is_that_of_b_at_zero():
    model = model_of("grn_v2").eval()
    _, rows = losses_without(model, [1], lambda: held_out_loss(model))
    losses = {row["block"]: row["loss"] for row in rows}
    for changed, residuals in (
        (3, [model.model.layers[2].residual]),
        ("all", [layer.residual for layer in model.model.layers[1:]]),
        ("output", [model.model.residual]),
    ):
        before = [residual.delta.detach().clone() for residual in residuals]
        for residual in residuals:
            residual.delta.data[:, 1] = -1
        assert losses[changed] == pytest.approx(held_out_loss(model), rel=1e-5)
        for residual, delta in zip(residuals, before):
            residual.delta.data = delta


def test_other_blocks_keep_what_one_does_without():
    model, stacks, outputs = model_of("dca").eval(), [], []
    hooks = [model.model.layers[3].register_forward_pre_hook(lambda layer, stack: stacks.append(stack))]
    hooks += [layer.register_forward_hook(lambda *args: outputs.append(args[2][-1])) for layer in model.model.layers]
    losses_without(model, [1], lambda: held_out_loss(model))
    for hook in hooks:
        hook.remove()
    assert len(stacks) == 6  # whole, blocks 2 to 4, all of them, the output
    for stack, added in zip(stacks, np.array_split(np.arange(len(outputs)), 6)):
        assert all(torch.equal(entry, outputs[i]) for entry, i in zip(stack[1:], added))
        assert torch.equal(stack[1], stacks[0][1]) and stack[1].any()


def test_merged_outputs_are_left_out_once():
    model, measured = model_of("dca", last_k=1).eval(), []
    _, rows = losses_without(model, range(LAYERS + 1), lambda: measured.append(1) or held_out_loss(model))
    # The output of a model of 4 blocks has 3 entries, and block 4 has output 0, outputs 1 and 2, and output 3.
    assert len(measured) == 1 + (1 + 2 + 3 + 3) + 3 + 3  # whole, blocks, all blocks but those of one block, the output
    assert len({row["loss"] for row in rows if row["block"] == 4}) == 3


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


def test_a_scheme_has_one_colour_in_all_pictures():
    for names in (["standard", "DCA"], ["DCA", "standard", "2-DCA"], ["Llama", "dca"], ["ViT", "ViT + DCA", "GRN-v1"]):
        for name, style in figures.styles_of(names).items():
            assert style["color"] == figures.COLORS[figures.scheme_of(name)] and style["linestyle"] == "-"
    assert figures.scheme_of("GRN-v2") == "grn_v2"
    # Variants that are no scheme by name take none of a scheme's that is there, and no two look alike.
    names = ["standard", "DCA", "DCA with a dead gate", "dca", *(f"variant {i}" for i in range(20))]
    styles = figures.styles_of(names)
    assert list(styles) == names and styles["DCA"]["color"] == figures.COLORS["dca"]
    assert styles["dca"]["color"] not in (styles["DCA"]["color"], styles["standard"]["color"])
    looks = [(style["color"], style["linestyle"]) for style in styles.values()]
    assert len(set(looks)) == len(looks)


def test_title_of_losses_says_how_they_end(tmp_path, drawn):
    history = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "eval_loss": 4.5}]
    other = [{"step": 2, "loss": 3.0, "eval_loss": 3.25}]
    draw_loss_curves({"standard": history, "dca": other}, tmp_path / "loss.png")
    assert drawn[0].get_title() == "Held-out loss at the end: dca 3.250, standard 4.500"
    lines = {line.get_label(): line.get_color() for line in drawn[0].lines}
    assert (
        lines["dca, held out"] == figures.COLORS["dca"] and lines["standard, training"] == figures.COLORS["standard"]
    )


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


# How the features are spread, and several models


@pytest.mark.parametrize("times_size", [False, True])
@pytest.mark.parametrize(("scheme", "last_k"), [("dca", None), ("dca", 1), ("grn_v2", None), ("grn_v1", None)])
def test_depth_weights_of_two_models(scheme, last_k, times_size):
    models = [model_of(scheme, last_k, seed) for seed in (0, 1)]
    batches = [{"input_ids": batch} for batch in BATCHES]
    found = depth_weights([measure_draws(model, batches) for model in models], times_size)
    outputs = [[outputs_of_blocks(model, batch) for batch in BATCHES] for model in models]
    names = ["q", "k", "v"] if scheme == "dca" else ["q, k, v"]
    assert [(each["block"], each["input"]) for each in found] == [
        (block, name) for block in range(1, LAYERS + 1) for name in names
    ]
    for each in found:
        entries = entries_by_hand(each["block"], last_k)
        assert each["outputs"] == [(entry[0], entry[-1]) for entry in entries]
        for position, entry in enumerate(entries):
            pooled, sizes = [], []
            for model, of_batches in zip(models, outputs):
                residual = model.model.layers[each["block"] - 1].residual
                tokens = torch.cat([sum(batch[output] for output in entry).flatten(0, 1) for batch in of_batches])
                whole, size = whole_weight(residual, names.index(each["input"]), position, tokens)
                pooled += (whole.mean(0) * (size if times_size else 1)).tolist()
                sizes.append(size)
            assert each["weight"][position] == pytest.approx(np.mean(pooled), rel=1e-4)
            if scheme != "grn_v1":  # (which has one number for all features)
                band = [each["low"][position], each["high"][position]]
                assert band == pytest.approx(np.percentile(pooled, [5, 95]), rel=1e-4, abs=1e-6)
            assert each["size"][position] == pytest.approx(np.sqrt(np.mean(np.square(sizes))), rel=1e-5)


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


@pytest.mark.parametrize("times_size", [False, True])
def test_what_the_map_shows(tmp_path, drawn, times_size):
    batches = [{"input_ids": batch} for batch in BATCHES]
    weights = depth_weights([measure_draws(model_of("dca", last_k=1), batches)], times_size)
    draw_depth_weights(json.loads(json.dumps(weights)), tmp_path / "map.png", times_size)
    panels = drawn[0]
    assert panels.shape == (1, 3)  # one map for each input
    for panel, name in zip(panels[0], "qkv"):
        assert panel.get_title() == {"q": "queries", "k": "keys", "v": "values"}[name]
        (image,) = panel.images
        assert sum(image.get_clim()) / 2 == pytest.approx(0 if times_size else 1)
        shown = image.get_array()
        for each in weights:
            if each["input"] == name:
                row = shown[each["block"] - 1]
                for output in range(LAYERS):
                    values = [
                        value
                        for (first, last), value in zip(each["outputs"], each["weight"])
                        if first <= output <= last
                    ]
                    assert row[output] == pytest.approx(values[0]) if values else row.mask[output]


def test_title_of_a_map_says_where_to_look(tmp_path, drawn):
    weights = depth_weights([measure_draws(model_of("dca", last_k=1), [{"input_ids": BATCHES[0]}])])
    cells = [
        (abs(value - 1), value, each["input"], each["block"], outputs)
        for each in weights
        for outputs, value in zip(each["outputs"], each["weight"])
    ]
    _, value, name, block, (first, last) = max(cells)
    draw_depth_weights(weights, tmp_path / "map.png")
    title = drawn[0][0, 0].figure.get_suptitle()
    output = "the model's input" if last == 0 else f"output {first}" if first == last else f"outputs {first} to {last}"
    assert title.endswith(
        f"{ {'q': 'queries', 'k': 'keys', 'v': 'values'}[name] } of block {block} draw {value:.2f} times {output}"
    )
    fresh = DCAForCausalLM(DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    draw_depth_weights(depth_weights([measure_draws(fresh, [{"input_ids": BATCHES[0]}])]), tmp_path / "map.png")
    assert drawn[1][0, 0].figure.get_suptitle().endswith("All weights are 1")


def test_maps_of_48_layers_are_legible(tmp_path, drawn):
    """At the width of a README, and with no more labels than there is room for."""
    weights = [
        {
            "block": block,
            "input": name,
            "outputs": [(i, i) for i in range(block)],
            **{key: [1.0] * block for key in ("weight", "low", "high", "b", "gate", "size")},
        }
        for block in range(1, 49)
        for name in "qkv"
    ]
    draw_depth_weights(weights, tmp_path / "map.png")
    draw_depth_spreads(weights, tmp_path / "spreads.png")
    for panels in drawn:
        assert panels.flat[0].figure.get_figwidth() <= 10
        assert all(len(axis.get_ticklocs()) <= 14 for axes in panels.flat for axis in (axes.xaxis,))
    for name in ("map", "spreads"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert max(picture.size) <= 3000


def test_map_of_the_record_of_an_earlier_run(tmp_path, drawn):
    """It has `b` and `gate` alone."""
    weights = measure_depth_weights(model_of("dca"), [{"input_ids": BATCHES[0]}])
    earlier = [{key: each[key] for key in ("block", "input", "outputs", "b", "gate")} for each in weights]
    for name, each in (("now", weights), ("earlier", earlier)):
        draw_depth_weights(json.loads(json.dumps(each)), tmp_path / f"{name}.png")
    for now, before in zip(*(panels[0] for panels in drawn)):
        np.testing.assert_allclose(now.images[0].get_array(), before.images[0].get_array(), rtol=1e-6)


@pytest.mark.parametrize(("scheme", "last_k"), [("dca", 1), ("grn_v2", None), ("grn_v1", None)])
def test_picture_of_the_spreads(tmp_path, drawn, scheme, last_k):
    weights = depth_weights([measure_draws(model_of(scheme, last_k), [{"input_ids": BATCHES[0]}])])
    draw_depth_spreads(json.loads(json.dumps(weights)), tmp_path / "spreads.png")
    assert_picture(tmp_path / "spreads.png", height=300)
    panels = drawn[0].flat
    for block, axes in enumerate(panels, start=1):
        own = [each for each in weights if each["block"] == block]
        points = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert axes.get_title() == f"block {block}" and len(points) == len(axes.collections) == len(own)
        for each, line, bars in zip(own, points, axes.collections):
            assert line.get_label() == each["input"]
            np.testing.assert_allclose(line.get_ydata(), each["weight"], rtol=1e-5)
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, np.stack([each["low"], each["high"]], axis=1), rtol=1e-5)
            assert np.abs(line.get_xdata() - np.arange(len(each["outputs"]))).max() < 0.5
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["-".join(map(str, sorted({*span}))) for span in own[0]["outputs"]]
    places = [tuple(line.get_xdata()) for line in panels[-1].lines if not line.get_label().startswith("_")]
    assert len(set(places)) == len(places) == len(own)


def test_picture_of_many_blocks_and_of_one(tmp_path, drawn):
    for blocks in (1, 6):
        config = DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2)
        weights = depth_weights([measure_draws(DCAForCausalLM(config), [{"input_ids": BATCHES[0]}])])
        draw_depth_spreads(weights, tmp_path / "spreads.png")
        with Image.open(tmp_path / "spreads.png") as picture:
            assert max(picture.size) <= 3000
        shown = [axes for axes in drawn[-1].flat if axes.figure is not None]
        assert [axes.get_title() for axes in shown] == [f"block {block}" for block in range(1, blocks + 1)]


@pytest.mark.parametrize("outputs", [range(LAYERS + 1), [2], [LAYERS]])
def test_picture_of_what_is_lost(tmp_path, drawn, outputs):
    model = model_of("dca", last_k=1).eval()
    _, rows = losses_without(model, outputs, lambda: held_out_loss(model))
    draw_without(json.loads(json.dumps(rows)), tmp_path / "without.png")
    with Image.open(tmp_path / "without.png") as picture:
        assert min(picture.size) > 200
    (image,) = drawn[0].images
    names = [label.get_text() for label in drawn[0].get_yticklabels()]
    columns = [label.get_text() for label in drawn[0].get_xticklabels()]
    shown = image.get_array()
    assert columns == [str(output) for output in outputs] and np.ma.count(shown) == len(rows)
    most = max((row for row in rows if row["without"] != 0), key=lambda row: row["lost"])
    if most["lost"] > 0:
        assert drawn[0].get_title().endswith(f": {most['lost']:.3g} nats")
        assert f"without output {most['without']}\n" in drawn[0].get_title()
    else:
        assert drawn[0].get_title() == "Nothing is lost without an output"
    for row in rows:
        name = {"all": "all blocks", "output": "the model's output"}.get(row["block"], f"block {row['block']}")
        assert shown[names.index(name), columns.index(str(row["without"]))] == pytest.approx(row["lost"])


def test_picture_where_nothing_is_lost(tmp_path):
    rows = [{"without": 0, "block": 1, "outputs": (0, 0), "loss": 1.0, "lost": lost} for lost in (0.0, float("nan"))]
    draw_without(rows, tmp_path / "without.png")
    assert (tmp_path / "without.png").exists()


# The command

NAMES = ("depth_weights.json", "depth_weights.png", "depth_spreads.png")
DATA = ("--eval_dataset=held_out.jsonl", "--block_size=8", "--device=cpu")


@pytest.fixture(scope="module")
def saved_once(comparison, tmp_path_factory):
    """A folder with checkpoints, and with that of a finished run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = AutoTokenizer.from_pretrained(comparison[0] / "run")
    for name, model in (
        ("first", model_of("dca", seed=0, vocab_size=300)),
        ("second", model_of("dca", seed=1, vocab_size=300)),
        ("k", model_of("dca", last_k=1, vocab_size=300)),
        ("v2", model_of("grn_v2", vocab_size=300)),
        ("v3", model_of("grn_v3", vocab_size=300)),
        ("standard", model_of("standard", vocab_size=300)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "empty").mkdir()
    shutil.copytree(comparison[0] / "run", folder / "run")
    return folder


@pytest.fixture
def saved(room, saved_once):
    """The current folder, with texts and the checkpoints."""
    shutil.copytree(saved_once, room, dirs_exist_ok=True)
    return room


def held_out_batches(checkpoint, block_size):
    """The blocks of the held-out text, one after another."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = load_text(TextDataArguments(dataset="held_out.jsonl", eval_dataset="held_out.jsonl"))[1]
    blocks = PackedBlocks(documents, "text", tokenizer, block_size, vocab_size=300)
    return [torch.tensor([block["input_ids"].tolist()]) for block in blocks]


def content_of(file):
    return json.loads(Path(file).read_text())


def test_command_writes_figures_and_numbers(saved, figures, capsys):
    before = {name: snapshot(saved / name) for name in ("first", "second")}
    call(command.main, "first", "second", "--output_dir=new/result", *DATA)
    printed = capsys.readouterr().out
    assert ", ".join(NAMES) in printed and "held-out examples of held_out.jsonl" in printed
    assert sorted(path.name for path in Path("new/result").iterdir()) == sorted(NAMES)
    content = content_of("new/result/depth_weights.json")
    assert [each["checkpoint"] for each in content["checkpoints"]] == ["first", "second"]
    assert content["percentiles"] == [0.05, 0.95] and content["times_size"] is False
    batches = [{"input_ids": batch} for batch in held_out_batches("first", 8)]
    assert {each["examples"] for each in content["checkpoints"]} == {len(batches)}
    models = [model_of("dca", seed=seed, vocab_size=300) for seed in (0, 1)]
    expected = depth_weights([measure_draws(model, batches) for model in models])
    for found, each in zip(content["weights"], expected, strict=True):
        assert found.keys() == each.keys() and found["outputs"] == [list(span) for span in each["outputs"]]
        for key in ("weight", "low", "high", "b", "gate", "size"):
            assert found[key] == pytest.approx(each[key], rel=1e-4, abs=1e-6)
    assert_picture("new/result/depth_weights.png")
    assert_picture("new/result/depth_spreads.png", height=300)
    assert {name: snapshot(saved / name) for name in before} == before

    # Its own files are replaced.
    picture = Path("new/result/depth_weights.png").read_bytes()
    call(command.main, "v2", "--output_dir=new/result", "--times_size", *DATA)
    content = content_of("new/result/depth_weights.json")
    assert [each["checkpoint"] for each in content["checkpoints"]] == ["v2"] and content["times_size"] is True
    for each in content["weights"]:
        assert each["weight"] == pytest.approx(np.multiply(each["b"], each["size"]), rel=1e-5)  # v2 has no gate
    assert Path("new/result/depth_weights.png").read_bytes() != picture


def test_command_measures_a_run_on_its_own_held_out_data(saved, capsys):
    """On all of it, with the loss that the run ended with."""
    call(command.main, "--output_dir=result", "run", "--without=all")
    record = content_of("result/depth_weights.json")["checkpoints"][0]
    assert record["data"]["eval_dataset"] == "held_out.jsonl" and record["data"]["block_size"] == 16
    content = content_of("result/without.json")
    own = content_of("run/all_results.json")["eval_loss"]
    assert content["loss"] == content["losses"][0] == own and content["checkpoints"] == [record]
    assert [(row["without"], row["block"]) for row in content["without"]] == [
        *((0, block) for block in (1, 2, "all", "output")),
        *((1, block) for block in (2, "all", "output")),
        (2, "output"),
    ]
    assert all(row["lost"] == row["loss"] - own for row in content["without"])
    assert sorted(path.name for path in Path("result").iterdir()) == sorted([*NAMES, "without.json", "without.png"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["without output", *["-" * 14], "0", "1", "2"]
    lost = {row["block"]: f"{row['lost']:+.4f}" for row in content["without"] if row["without"] == 0}
    assert [cell.strip() for cell in rows[2].split("|")[3:5]] == [lost["all"], lost["output"]]


def test_losses_of_several_checkpoints_without_an_entry(saved):
    call(command.main, "first", "second", "--output_dir=result", "--without=1", *DATA)
    content, blocks = content_of("result/without.json"), torch.cat(held_out_batches("first", 8))
    models = [model_of("dca", seed=seed, vocab_size=300).eval() for seed in (0, 1)]

    @torch.no_grad()
    def loss_of(model):
        return model(blocks, labels=blocks).loss.item()

    before = [loss_of(model) for model in models]
    assert content["losses"] == pytest.approx(before, rel=1e-5)
    assert [row["block"] for row in content["without"]] == [2, 3, 4, "all", "output"]
    found = [losses_without(model, [1], lambda model=model: loss_of(model))[1] for model in models]
    for row, *each in zip(content["without"], *found, strict=True):
        assert row["losses"] == pytest.approx([one["loss"] for one in each], rel=1e-5)
        assert row["lost"] == pytest.approx(np.mean(row["losses"]) - np.mean(before), abs=1e-6)


def test_losses_are_kept_when_weights_are_measured_again(saved):
    call(command.main, "first", "--output_dir=result", "--without=4", *DATA)
    kept = Path("result/without.json").read_bytes()
    call(command.main, "second", "--output_dir=result", *DATA)
    assert Path("result/without.json").read_bytes() == kept


def test_command_reads_an_image_classifier(room):
    need_image_processors()
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=vision", "--max_steps=2")
    call(command.main, "vision", "--output_dir=result", "--without=0")
    weights, losses = content_of("result/depth_weights.json")["weights"], content_of("result/without.json")
    assert len(weights) == 6 and len(losses["without"]) == 4
    assert losses["loss"] == content_of("vision/all_results.json")["eval_loss"]
    # The map of its card is of the same images.
    recorded = content_of("vision/depth_weights.json")
    assert [each["weight"] for each in recorded] == [pytest.approx(each["weight"], rel=1e-5) for each in weights]


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        (["standard"], ["'standard' has no generalized residuals"]),
        (["first", "standard"], ["'standard' has no generalized residuals"]),
        (["first", "k"], ["'k' has other generalized residuals than 'first'"]),
        (["first", "second", "v2"], ["'v2' has other generalized residuals than 'first'"]),
        (["v2", "v3"], ["'v3' has other generalized residuals than 'v2'"]),  # of the same shapes
        (["empty"], ["'empty' cannot be evaluated"]),
        (["damaged"], ["'damaged' cannot be evaluated"]),
        (["altered"], ["'altered' is a LastFourForCausalLM"]),
        (["first", "gone"], ["'gone' is not a local folder"]),
        (["bert"], ["'bert' is a BertModel"]),
        (["llama"], ["'llama' has no generalized residuals"]),
        (["first", "--without=5"], ["`without` is '5'", "to 4 (the last block)", "'all'"]),
        (["first", "--without=-1"], ["`without` is '-1'"]),
        (["first", "--without=last"], ["`without` is 'last'"]),
        (["first", "--output=x.json"], ["Unrecognized arguments: --output"]),
        (["first", "--metrics", "f1"], ["Unrecognized arguments: --metrics"]),
        (["first", "--timessize"], ["--timessize"]),
        ([], ["CHECKPOINT"]),
    ],
    ids=lambda value: "-".join(value) if len(value) > 1 else value[0] if value else "none",
)
def test_checkpoints_that_cannot_be_measured(saved, capsys, checkpoints, words):
    if checkpoints == ["damaged"]:
        Path("first").rename("damaged")
        Path("damaged/model.safetensors").write_bytes(b"no weights")
    if checkpoints == ["altered"]:
        config = DCAConfig(vocab_size=30, hidden_size=16, num_hidden_layers=6, num_attention_heads=2)
        VARIANTS["last_4"].model(DCAForCausalLM)(config).save_pretrained("altered")
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    if checkpoints == ["bert"]:
        BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained("bert")
    if checkpoints == ["llama"]:
        LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).save_pretrained("llama")
    line = failure(capsys, command.main, *checkpoints, "--output_dir=result", *DATA)
    assert not [word for word in words if word not in line], line
    assert not Path("result").exists()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("result", "mine", "which cannot be created (File exists)"),
        ("result/depth_weights.png", "mine", "which has a depth_weights.png that this command did not write"),
        ("result/depth_spreads.png", "mine", "which has a depth_spreads.png that this command did not write"),
        ("result/depth_weights.json", "mine", "which has a depth_weights.json that this command did not write"),
        ("result/depth_weights.json", "{}", "which has a depth_weights.json that this command did not write"),
        (
            "result/depth_weights.json",
            "[]",
            "which has a depth_weights.json that this command did not write",
        ),  # a run's
        ("result/depth_weights.json", "3", "which has a depth_weights.json that this command did not write"),
        ("result/depth_weights.json/mine", "", "which has a depth_weights.json that this command did not write"),
        ("result/without.json", "{}", "which has a without.json that this command did not write"),
        ("result/without.png", "mine", "which has a without.png that this command did not write"),
    ],
    ids=["file", "map", "spreads", "text", "other", "run", "number", "folder", "other_losses", "picture_of_losses"],
)
def test_what_is_in_the_way_is_kept(saved, capsys, file, content, reason):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(content)
    before = snapshot(saved)
    line = failure(capsys, command.main, "first", "--output_dir=result", "--without=0", *DATA)
    assert f"`output_dir` is 'result', {reason}" in line
    assert snapshot(saved) == before


@pytest.mark.parametrize("writer", ["write_whole", "draw_depth_weights", "draw_depth_spreads", "draw_without"])
def test_full_disk(saved, figures, capsys, monkeypatch, writer):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ("first", "--output_dir=result", "--without=4", *DATA)
    with monkeypatch.context() as patch:
        patch.setattr(writing, writer, full)
        line = failure(capsys, command.main, *arguments)
    assert "`output_dir` is 'result', which cannot be written: No space left on device." in line
    # What was left is no obstacle when there is space again.
    call(command.main, *arguments)
    assert_picture("result/depth_weights.png")
