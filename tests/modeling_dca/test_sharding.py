"""Stacks that are sharded by batch or sequence: two processes compute what one does, values and gradients."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from modeling_dca import ALL_GRN_FUNCTIONS, DCAConfig, generalized_residual
from modeling_dca.sharding import sequence_parallel_plan, shard_by_sequence
from tests.modeling_dca.test_parallel import batch, build_model, train, two_processes


IMPLEMENTATION = ALL_GRN_FUNCTIONS["cpu"]
SHAPE, ENTRIES, OUTPUTS = (4, 6, 16), 4, 3

# How the entries are sharded, and what the outputs are then.
PLACEMENTS = {
    "batch": (Shard(0), Shard(0)),
    "sequence": (Shard(1), Shard(1)),
    "sequence, counted from the end": (Shard(-2), Shard(1)),
    "features": (Shard(2), Replicate()),
    "not at all": (Replicate(), Replicate()),
    "parts of a sum": (Partial(), Replicate()),
}


def example(length=SHAPE[1], gated=True):
    generator = torch.Generator().manual_seed(0)
    shape = (SHAPE[0], length, SHAPE[2])
    sizes = [shape] * ENTRIES + [(OUTPUTS, ENTRIES, SHAPE[2]), (OUTPUTS, SHAPE[2])] + [shape[-1:]] * OUTPUTS
    *stack, delta, gate, n1, n2, n3 = (torch.randn(size, generator=generator) for size in sizes)
    return stack, 0.1 * delta, gate if gated else None, [n1, n2, n3]


def results_of(stack, delta, gate, norms, way):
    """All that a call returns, whole, with the gradients of a loss that differs from token to token."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*stack, delta, gate, *norms) if tensor is not None]
    rest = iter(leaves)
    stack, delta, gate = [next(rest) for _ in stack], next(rest), None if gate is None else next(rest)
    norms = list(rest)
    if way == "normalized":
        outputs, later = IMPLEMENTATION.normalized(stack, delta, gate, norms, 1e-6)
    else:
        outputs, later = IMPLEMENTATION.chained(stack, delta, gate)
    results = [*outputs, *(2 * entry for entry in later)]
    loss = sum(((i + 1) * result.sin()).sum() for i, result in enumerate(results))
    loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return outputs, grads


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compute_sharded(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, (placement, expected) in PLACEMENTS.items():
        for way in ("chained", "normalized"):
            for plain_parameters in (False, True):
                for length in (6, 5):
                    stack, delta, gate, norms = example(length)
                    stack = [distribute_tensor(entry, mesh, [Replicate()]) for entry in stack]
                    if name == "parts of a sum":
                        stack = [DTensor.from_local(entry.to_local() / 2, mesh, [placement]) for entry in stack]
                    else:
                        stack = [entry.redistribute(placements=[placement]) for entry in stack]
                    if not plain_parameters:
                        delta, gate, *norms = (
                            distribute_tensor(each, mesh, [Replicate()]) for each in (delta, gate, *norms)
                        )
                    outputs, grads = results_of(stack, delta, gate, norms, way)
                    assert all(output.placements == (expected,) for output in outputs), name
                    whole_grads = [None if grad is None else whole(grad) for grad in grads]
                    if name == "parts of a sum":
                        whole_grads[:ENTRIES] = [None] * ENTRIES  # of parts, not of the entry
                    found[name, way, plain_parameters, length] = [whole(output) for output in outputs], whole_grads
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_compute_on_their_shards_what_one_does(tmp_path):
    two_processes(compute_sharded, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 8 * len(PLACEMENTS)
        for (name, way, plain, length), (outputs, grads) in found.items():
            expected, expected_grads = results_of(*example(length), way)
            for output, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5, msg=f"{name}, {way}, {plain}")
            for i, (grad, wanted) in enumerate(zip(grads, expected_grads, strict=True)):
                if grad is not None:
                    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4, msg=f"{name}, {way}, {plain}, {i}")
                else:
                    assert wanted is None or name == "parts of a sum"


MODELS = {
    "DCA": {"last_k": None},
    "k = 1, grouped queries, gated MLP, normed heads": {
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "gated_mlp": True, "qk_norm": True},
    },
    "GRN-v3, tied, biases": {
        "residual_scheme": "grn_v3",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "GRN-v1, learned positions, sandwich": {
        **{"residual_scheme": "grn_v1", "position_embedding": "learned", "norm_placement": "sandwich"},
    },
    "standard": {"residual_scheme": "standard", "last_k": None},
    "checkpointing": {"last_k": 1},
}


def train_sharded(rank, folder):
    for name, options in MODELS.items():
        model = build_model(**options)
        model = shard_by_sequence(model, init_device_mesh("cpu", (2,)))
        if name == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        taken = []
        model.model.residual.register_forward_pre_hook(lambda module, stack, taken=taken: taken.extend(stack))
        parameters = train(model, batch(), model)
        assert {entry.to_local().shape for entry in taken} == {(4, 4, 16)}, name  # half of the sequence
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        torch.save(parameters, f"{folder}/{name}, {rank}.pt")


def test_two_processes_that_share_the_sequence_train_as_one(tmp_path):
    two_processes(train_sharded, tmp_path)
    for name, options in MODELS.items():
        model = build_model(**options)
        start = {key: value.clone() for key, value in model.named_parameters()}
        expected = train(model, batch(), model)
        for rank in range(2):
            parameters = torch.load(tmp_path / f"{name}, {rank}.pt")
            assert parameters.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(parameters[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
                assert not torch.equal(parameters[key], start[key]), (name, key)


def compile_sharded(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    stack, delta, gate, _ = example()
    stack = [distribute_tensor(entry, mesh, [Shard(1)]).requires_grad_() for entry in stack]
    parameters = [distribute_tensor(each, mesh, [Replicate()]).requires_grad_() for each in (delta, gate)]

    def loss(*tensors):
        outputs, later = IMPLEMENTATION.chained(tensors[:ENTRIES], *tensors[ENTRIES:])
        return sum(result.square().sum() for result in (*outputs, *later))

    leaves = (*stack, *parameters)
    eager = torch.autograd.grad(loss(*leaves).full_tensor(), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    for grad, expected in zip(torch.autograd.grad(compiled.full_tensor(), leaves), eager, strict=True):
        torch.testing.assert_close(grad.full_tensor(), expected.full_tensor(), rtol=1e-4, atol=1e-4)


def test_sharded_stacks_are_compiled(tmp_path):
    two_processes(compile_sharded, tmp_path)


def refuse(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    stack, delta, gate, _ = example()
    stack[0] = distribute_tensor(stack[0], mesh, [Shard(1)])
    with pytest.raises(TypeError, match="Entry 1 of `stack` is a Tensor, but others are DTensors: make it one, too"):
        IMPLEMENTATION(stack, delta, gate)
    with pytest.raises(ValueError, match="`num_key_value_heads` is 1, which is not a multiple of the 2 processes"):
        shard_by_sequence(build_model(num_key_value_heads=1), mesh)
    with pytest.raises(ValueError, match="DCAModel has no `lm_head`: only a `DCAForCausalLM` is sharded by sequence"):
        shard_by_sequence(build_model().model, mesh)
    # Without an implementation of its own, the reference takes them, too.
    stack = [distribute_tensor(entry, mesh, [Shard(1)]) for entry in example()[0]]
    delta, gate = (distribute_tensor(each, mesh, [Replicate()]) for each in (delta, gate))
    for output, expected in zip(generalized_residual(stack, delta, gate), IMPLEMENTATION(stack, delta, gate)):
        torch.testing.assert_close(output.full_tensor(), expected.full_tensor(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_sharded_is_refused(tmp_path):
    two_processes(refuse, tmp_path)
    for options, message in (
        ({"qk_norm": "all_heads"}, "`qk_norm` is 'all_heads', which needs all heads"),
        ({"position_embedding": "sincos"}, "`position_embedding` is 'sincos'"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_parallel_plan(DCAConfig(hidden_size=16, num_attention_heads=2, **options))


def test_the_plan_has_all_modules_with_parameters_and_no_others():
    for options in MODELS.values():
        model = build_model(**options)
        modules = {re.sub(r"layers\.\d+", "layers.*", name): module for name, module in model.named_modules()}
        plan = sequence_parallel_plan(model.config)
        assert plan.keys() <= modules.keys()
        assert {name for name, module in modules.items() if module._parameters} <= plan.keys()
