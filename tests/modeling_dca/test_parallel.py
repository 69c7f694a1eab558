"""Two processes train the same model as one does, whichever way they share the work, and compute what it computes."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from modeling_dca import DCAConfig, DCAForCausalLM, GeneralizedResidual


STEPS = 2


def build_model(**options):
    """A model whose generalized residuals are far from those of its start."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 16}
    model = DCAForCausalLM(DCAConfig(vocab_size=50, **{**sizes, "last_k": 1, **options}))
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


def two_processes(work, folder, *args):
    """Run `work(rank, folder, *args)` in two processes of one group, that start as copies of this one."""
    torch.multiprocessing.start_processes(in_group, (work, folder, *args), nprocs=2, start_method="fork")


def in_group(rank, work, folder, *args):
    torch.set_num_threads(1)  # threads do not live on in a fork
    # (Tensor parallelism reads the rank from the environment.)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(rank, folder, *args)
    torch.distributed.destroy_process_group()


def scheme_of(way):
    stacks = {"standard": {"residual_scheme": "standard", "last_k": None}, "full": {"last_k": None}}
    stacks["compiled"] = {"num_hidden_layers": 2, "use_cache": False}  # which takes long
    return stacks.get(way.split(", ")[-1], {})


def train_with_another(rank, folder, way):
    model = forward = build_model(**scheme_of(way))
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


@pytest.mark.parametrize(
    "way",
    [
        *("DDP", "DDP, compiled", "FSDP2", "FSDP2, full", "FSDP2, standard"),
        *("FSDP2, checkpointing", "FSDP2, checkpointing, full", "FSDP2, checkpointing, standard"),
    ],
)
def test_two_processes_train_as_one(way, tmp_path):
    model = build_model(**scheme_of(way))
    expected = train(model, batch(), model)
    two_processes(train_with_another, tmp_path, way)
    parameters = torch.load(tmp_path / "parameters.pt")
    moved = 0
    for (name, start), after in zip(build_model(**scheme_of(way)).named_parameters(), expected.values(), strict=True):
        torch.testing.assert_close(parameters[name], after, rtol=1e-4, atol=1e-6)
        moved += not torch.equal(start, after)
    assert moved == len(expected)


# What the plan for tensor parallelism depends on, or might; four heads share two keys and values.
SHAPES = {
    "DCA": {"last_k": None},
    "DCA, k = 1, grouped queries, gated MLP": {"num_attention_heads": 4, "num_key_value_heads": 2, "gated_mlp": True},
    "DCA, plain MLP, biases": {"gated_mlp": False, "mlp_bias": True, "attention_bias": True},
    "DCA, normed queries and keys": {"qk_norm": True, "num_attention_heads": 4, "num_key_value_heads": 2},
    "GRN-v3, tied embeddings": {"residual_scheme": "grn_v3", "tie_word_embeddings": True},
    "standard": {"residual_scheme": "standard", "last_k": None},
    "norms around the modules, soft caps": {
        "norm_placement": "sandwich",
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "attn_implementation": "eager",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "norms after the modules, of all heads": {"norm_placement": "post_module", "qk_norm": "all_heads"},
    "modules side by side, biases": {
        "parallel_blocks": True,
        "norm_type": "layer_norm",
        "mlp_bias": True,
        "attention_bias": True,
        "lm_head_bias": True,
        "logit_multiplier": 0.3,
    },
}


def infer_with_another(rank, folder):
    for name in SHAPES:
        model = DCAForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto")
        shards = [p._local_tensor if isinstance(p, DTensor) else p for p in model.parameters()]
        with torch.no_grad():
            logits = model(input_ids=batch(), use_cache=False).logits
            generated = model.generate(batch(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        torch.save((logits, generated, sum(shard.numel() for shard in shards)), f"{folder}/{name}/{rank}.pt")


def test_two_processes_that_share_the_weights_infer_as_one(tmp_path):
    for name, options in SHAPES.items():
        build_model(**options).save_pretrained(tmp_path / name)
    two_processes(infer_with_another, tmp_path)
    for name in SHAPES:
        model = DCAForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            expected = model(input_ids=batch()).logits
            expected_tokens = model.generate(batch(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
        for rank in range(2):
            logits, generated, held = torch.load(tmp_path / name / f"{rank}.pt")
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(generated, expected_tokens), name
            # Each has half of the weights of the blocks.
            assert held <= model.num_parameters() - linear // 2, name
