"""Two processes train the same model as one does, whichever way they share the work."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from modeling_dca import DCAConfig, DCAForCausalLM, GeneralizedResidual


STEPS = 2


def build_model():
    set_seed(0)
    config = DCAConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=4, last_k=1, max_position_embeddings=16
    )
    model = DCAForCausalLM(config)
    for module in model.modules():
        if isinstance(module, GeneralizedResidual):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    return model


def train(model, input_ids, forward):
    """The parameters of a model, called as `forward`, after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        forward(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
        for name, parameter in model.named_parameters()
    }


def batch():
    return torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(1))


def work(rank, way, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = forward = build_model()
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
    if "FSDP2" in way:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        forward = DistributedDataParallel(model)
    if "compiled" in way:
        forward = torch.compile(forward, backend="aot_eager")
    parameters = train(model, batch()[2 * rank : 2 * rank + 2], forward)
    if rank == 0:
        torch.save(parameters, f"{folder}/parameters.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["DDP", "DDP, compiled", "FSDP2", "FSDP2, checkpointing"])
def test_two_processes_train_as_one(way, tmp_path):
    model = build_model()
    expected = train(model, batch(), model)
    torch.multiprocessing.spawn(work, (way, tmp_path), nprocs=2)
    parameters = torch.load(tmp_path / "parameters.pt")
    moved = 0
    for (name, start), after in zip(build_model().named_parameters(), expected.values(), strict=True):
        torch.testing.assert_close(parameters[name], after, rtol=1e-4, atol=1e-6)
        moved += not torch.equal(start, after)
    assert moved == len(expected)
