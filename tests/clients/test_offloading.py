"""accelerate: a model of which a part stays on the disk computes the same."""

import pytest
import torch
from accelerate import disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModelForCausalLM


IDS = torch.arange(2, 20).reshape(2, 9)


@torch.no_grad()
@pytest.mark.parametrize("way", ["device map", "disk_offload", "load_checkpoint_and_dispatch"])
def test_parts_on_the_disk(checkpoint, tmp_path, way):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = model(IDS).logits
    if way == "device map":
        places = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
        places |= {"lm_head": "disk"}
        places |= {f"model.layers.{index}": ("disk", "cpu")[index % 2] for index in range(len(model.model.layers))}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path).eval()
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    elif way == "disk_offload":
        disk_offload(model, tmp_path, execution_device="cpu")
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    else:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(model.config)
        model = load_checkpoint_and_dispatch(model, f"{checkpoint}/model.safetensors", device_map={"": "cpu"}).eval()
    assert torch.equal(model(IDS).logits, expected)
