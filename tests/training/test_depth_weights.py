"""The learned weights of each earlier output, against a computation by hand, and their pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from training.depth_weights import measure_depth_weights
from training.figures import draw_depth_weights, draw_loss_curves


LAYERS = 4
# The last batch is smaller: each token counts the same.
BATCHES = [torch.arange(24).reshape(3, 8), torch.arange(5, 13).reshape(1, 8)]


def model_of(scheme, last_k=None):
    """A model whose generalized residuals are not the plain sum."""
    torch.manual_seed(0)
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
        layer.register_forward_hook(lambda layer, args, results: outputs.append(results[0]))
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
                gates[position] = (tokens @ residual.gate[index]).relu().mean()
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


def assert_picture(file):
    """A picture of a size that a card can show, with something in it."""
    with Image.open(file) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 500 <= picture.width <= 3000 and 400 <= picture.height <= 3000
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
