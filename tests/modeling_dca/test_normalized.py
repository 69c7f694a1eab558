"""
The normalised inputs of a block, which fused implementations form together with the generalized residuals: the numbers of
the residuals and of the norms by themselves, and a call of its own for each module that somebody looks at.
"""

import copy
from types import MethodType

import pytest
import torch
from test_grn import SCHEMES, random_inputs
from test_grn_triton import random_like
from test_modeling_dca import assert_close, random_ids, tiny_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_dca import ALL_GRN_FUNCTIONS, GeneralizedResidual, grn_fused
from modeling_dca.norm import DCARMSNorm, rms_norm


EPS = 1e-5


@pytest.fixture(params=["cpu", "triton", pytest.param("triton on cuda", marks=pytest.mark.gpu)])
def fused(request):
    name, _, device = request.param.partition(" on ")
    implementation = ALL_GRN_FUNCTIONS[name]
    if obstacle := implementation.obstacle(torch.device(device or "cpu")):
        pytest.skip(obstacle)
    return implementation, device or "cpu"


def norms_of(delta, dtype):
    weights = [torch.linspace(-1, 2, delta.shape[-1], dtype=torch.float64) + o for o in range(len(delta))]
    weights[0][0] = 0.0
    return [weight.to(delta.device, dtype) for weight in weights]


def separate(implementation):
    """`implementation.normalized`, as its name says, in two steps."""

    def normalized(stack, delta, gate, norms, eps):
        outputs, stack = implementation.chained(stack, delta, gate)
        return (outputs[0], *(rms_norm(output, norm, eps) for output, norm in zip(outputs, norms))), stack

    return normalized


def results_of(function, stack, delta, gate, norms, missing=()):
    """Results, and the gradients of all inputs where later users of the entries have sent some back, too."""
    stack, norms = ([tensor.detach().requires_grad_() for tensor in tensors] for tensors in (stack, norms))
    delta, gate = (tensor if tensor is None else tensor.detach().requires_grad_() for tensor in (delta, gate))
    leaves = [tensor for tensor in (*stack, delta, gate, *norms) if tensor is not None]
    results, later = function(stack, delta, gate, norms, EPS)
    outputs = [*results, *later]
    grads = random_like(outputs)
    used = [i for i in range(len(outputs)) if i not in missing]
    outputs, grads = ([tensors[i] for i in used] for tensors in (outputs, grads))
    return [*results, *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_residuals_and_norms_by_themselves(fused, scheme, dtype, masked):
    implementation, device = fused
    # Several blocks and two ranges of tokens, of which the last is not full; the interpreter takes its time for each block,
    # and a wider one holds fewer tokens.
    width = 16 if not masked else 40 if device == "cuda" else 12
    stack, delta, gate = random_inputs(scheme, 5, (2, 35), dtype, width)
    stack, (delta, gate) = (
        [tensor if tensor is None else tensor.to(device) for tensor in tensors] for tensors in (stack, (delta, gate))
    )
    delta = delta.expand(-1, -1, width).contiguous() if scheme != "grn_v1" else delta
    norms = norms_of(delta.expand(-1, -1, width), dtype)
    results, expected = (
        results_of(function, stack, delta, gate, norms)
        for function in (implementation.normalized, separate(implementation))
    )
    # (A norm that goes by itself rounds the gradients of its input to the type of that.)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and result.shape == value.shape
        assert_close(result.cpu(), value.cpu(), (4 if dtype == torch.bfloat16 else 64) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("alternating", [False, True])
def test_mixed_types(fused, dtypes, alternating):
    implementation, device = fused
    stack, delta, gate = random_inputs("dca", 6, (3, 4), torch.float32, 16)
    order = [0, 1] * 3 if alternating else [0] + [1] * 5
    stack = [entry.to(device, dtypes[i]) for entry, i in zip(stack, order)]
    delta, gate = delta.to(device), gate.to(device)
    for dtype in (torch.float32, torch.bfloat16):  # that of the outputs, and another
        results, expected = (
            results_of(function, stack, delta, gate, norms_of(delta, dtype))
            for function in (implementation.normalized, separate(implementation))
        )
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == value.dtype
            assert_close(result.cpu(), value.cpu(), 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 1, 2, 3), (4, 5, 6), (0, 3, 5)], ids=str)
def test_results_that_nobody_uses(fused, missing):
    implementation, device = fused
    stack, delta, gate = random_inputs("dca", 3, (2, 3), torch.float32, 8)
    stack, delta, gate = [entry.to(device) for entry in stack], delta.to(device), gate.to(device)

    def with_all_used(function):
        # What nobody uses has no gradient; `grad` wants a path to each input.
        def results(stack, delta, gate, norms, eps):
            zero = 0 * sum(tensor.sum() for tensor in (*stack, delta, gate, *norms))
            results, later = function(stack, delta, gate, norms, eps)
            return results, (*later[:-1], later[-1] + zero) if 6 not in missing else (later[0] + zero, *later[1:])

        return results

    results, expected = (
        results_of(with_all_used(function), stack, delta, gate, norms_of(delta, torch.float32), missing)
        for function in (implementation.normalized, separate(implementation))
    )
    for result, value in zip(results, expected, strict=True):
        assert_close(result.cpu(), value.cpu(), 1e-5)


def test_second_derivatives(fused):
    implementation, device = fused
    stack, delta, gate = random_inputs("dca", 3, (2, 3), torch.float32, 8)
    norms = norms_of(delta, torch.float32)
    results = []
    for function in (implementation.normalized, separate(implementation)):
        leaves = [tensor.to(device).requires_grad_() for tensor in (*stack, delta, gate, *norms)]
        outputs, later = function(leaves[:3], *leaves[3:5], leaves[5:], EPS)
        loss = sum(tensor.sin().sum() for tensor in (*outputs, *later))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
        for leaf in leaves:
            leaf.requires_grad_(False)
    for result, value in zip(*results, strict=True):
        assert_close(result.cpu(), value.cpu(), 1e-4)


def count_of_fused(monkeypatch):
    calls = []
    apply = grn_fused._Chained.apply
    monkeypatch.setattr(
        grn_fused._Chained,
        "apply",
        lambda self, eps, norms, *tensors: calls.append(norms) or apply(self, eps, norms, *tensors),
    )
    return calls


def replace_a_norm(layer):
    norm = LlamaRMSNorm(layer.config.hidden_size, eps=layer.config.norm_eps)
    norm.load_state_dict(layer.key_layernorm.state_dict())
    layer.key_layernorm = norm


SEEN = {
    "hook on a norm": lambda layer: layer.key_layernorm.register_forward_hook(lambda *_: None),
    "hook before a norm": lambda layer: layer.input_layernorm.register_forward_pre_hook(lambda *_: None),
    "hook on the gradient of a norm": lambda layer: layer.value_layernorm.register_full_backward_hook(lambda *_: None),
    "hook on the residual": lambda layer: layer.residual.register_forward_hook(lambda *_: None),
    "forward of an instance": lambda layer: setattr(
        layer.key_layernorm, "forward", MethodType(DCARMSNorm.forward, layer.key_layernorm)
    ),
    "another class": replace_a_norm,
    "a subclass": lambda layer: setattr(layer.residual, "__class__", type("Other", (GeneralizedResidual,), {})),
    "compiled by itself": lambda layer: layer.key_layernorm.compile(backend="eager"),
}


@pytest.mark.parametrize("what", SEEN)
def test_modules_that_somebody_looks_at_are_called(what, monkeypatch):
    calls = count_of_fused(monkeypatch)
    model = tiny_model(num_hidden_layers=3, grn_implementation="cpu")
    expected = model(random_ids(2, 5)).logits
    assert calls == [3, 3, 3, 0]
    SEEN[what](model.model.layers[1])
    calls.clear()
    result = model(random_ids(2, 5)).logits
    assert calls == [3, 0, 3, 0]
    if what in ("another class", "compiled by itself"):
        assert_close(result, expected, 1e-5)
    else:
        assert torch.equal(result, expected)


def test_each_norm_has_its_epsilon():
    model = tiny_model(num_hidden_layers=2, grn_implementation="cpu")
    ids = random_ids(2, 5)
    results = []
    for implementation in ("cpu", "eager"):
        model.config.grn_implementation = implementation
        before = model(ids).logits
        model.model.layers[1].key_layernorm.variance_epsilon = 1.0
        results.append(model(ids).logits)
        assert (results[-1] - before).abs().max() > 1e-3
        model.model.layers[1].key_layernorm.variance_epsilon = model.config.norm_eps
    assert_close(*results, 1e-5)


def test_a_hook_on_all_modules_sees_the_norms(monkeypatch):
    calls, seen = count_of_fused(monkeypatch), []
    model = tiny_model(num_hidden_layers=2, grn_implementation="cpu")
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(random_ids(2, 5))
    finally:
        handle.remove()
    assert seen.count(DCARMSNorm) == 2 * 4 + 1 and calls == [0, 0, 0]


def test_what_a_hook_writes_reaches_all_that_follows():
    model = tiny_model(num_hidden_layers=2, grn_implementation="cpu")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].key_layernorm.weight.mul_(3)
    model.model.layers[1].key_layernorm.register_forward_hook(lambda module, args, output: 3 * output)
    ids = random_ids(2, 5)
    assert_close(model(ids).logits, changed(ids).logits, 1e-5)


def test_selective_checkpointing_finds_the_operators():
    model = tiny_model(num_hidden_layers=2, grn_implementation="cpu").train()
    seen = []

    def policy(context, operator, *args, **kwargs):
        seen.append(operator)
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    results = []
    for options in (None, {"use_reentrant": False, "context_fn": contexts}):
        if options:
            model.gradient_checkpointing_enable(options)
        model.zero_grad()
        model(random_ids(2, 5), labels=random_ids(2, 5)).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert ALL_GRN_FUNCTIONS["cpu"].operators[0] in seen
    for result, value in zip(*results, strict=True):
        assert_close(result, value, 1e-5)


def test_kept_for_the_backward_pass():
    """The outputs and the stack, once each, and the parameters."""
    stack, delta, gate = random_inputs("dca", 4, (2, 3), torch.float32, 16)
    leaves = [tensor.requires_grad_() for tensor in (*stack, delta, gate, *norms_of(delta, torch.float32))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
        ALL_GRN_FUNCTIONS["cpu"].normalized(leaves[:4], *leaves[4:6], leaves[6:], EPS)
    assert sum(tensor.numel() for tensor in kept) == (4 + 3) * 6 * 16 + 3 * 4 * 16 + 2 * 3 * 16
