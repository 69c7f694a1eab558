"""What XLA, and so a TPU, compiles for the models: never more than for Llama and ViT, and nothing that waits for the host."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig


pytestmark = pytest.mark.xla

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,  # with fewer, `last_k` = 2 would be the full stack
    "num_attention_heads": 2,
    "use_cache": False,  # as in training
}
IMAGE_SHAPE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
IMAGE_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 4}


def text():
    tokens = torch.randint(0, 64, (2, 16))
    return {"input_ids": tokens, "labels": tokens}


def images():
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(0, 4, (2,))}


def train(model, batch, steps=6):
    """How many graphs were compiled by the end of each step, what fell back to the host, and the losses."""
    torch_xla = pytest.importorskip("torch_xla")
    from torch_xla.debug import metrics

    torch.manual_seed(0)
    model = model.to(torch_xla.device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch_xla.sync()
    metrics.clear_all()
    compiled, losses = [], []
    for _ in range(steps):
        loss = model(**{name: values.to(torch_xla.device()) for name, values in batch().items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch_xla.sync()
        losses.append(loss.detach())
        compiled.append((metrics.metric_data("CompileTime") or [0])[0])
    fallen_back = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return compiled, fallen_back, [loss.item() for loss in losses]


def train_on_cpu(model, batch, steps=6):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def llama():
    return train(LlamaForCausalLM(LlamaConfig(**SHAPE)), text)[0]


@pytest.fixture(scope="module")
def vit():
    return train(ViTForImageClassification(ViTConfig(**IMAGE_SHAPE)), images)[0]


def check(model, batch, baseline):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    compiled, fallen_back, losses = train(model, batch)
    assert compiled[-1] <= baseline[-1] and len(set(compiled[2:])) == 1, (compiled, baseline)
    assert fallen_back == []
    assert losses == pytest.approx(train_on_cpu(copy, batch), abs=1e-4)


@pytest.mark.parametrize(
    "scheme", [{"residual_scheme": scheme} for scheme in ("standard", "grn_v1", "grn_v2", "grn_v3", "dca")]
    + [{"last_k": 1}, {"last_k": 2}, {"residual_scheme": "grn_v2", "last_k": 2}],
    ids=str,
)  # fmt: skip
def test_language_models(llama, scheme):
    check(DCAForCausalLM(DCAConfig(**SHAPE, **scheme)), text, llama)


@pytest.mark.parametrize("positions", ["learned", "sincos", "none"])
def test_language_models_with_other_positions(llama, positions):
    check(DCAForCausalLM(DCAConfig(**SHAPE, position_embedding=positions)), text, llama)


@pytest.mark.parametrize("scheme", ["standard", "dca"])
def test_vision_models(vit, scheme):
    check(DCAForImageClassification(DCAVisionConfig(**IMAGE_SHAPE, residual_scheme=scheme)), images, vit)
