"""The norms: Llama's and Gemma's numbers, what is kept for the backward pass, and what may look into them."""

import pytest
import torch
from test_grn import CountOperations
from test_modeling_dca import assert_close, tiny_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_dca.norm import DCARMSNorm, DCAZeroCenteredRMSNorm, RMSNormFunction, rms_norm


PAIRS = [(DCARMSNorm, LlamaRMSNorm), (DCAZeroCenteredRMSNorm, GemmaRMSNorm)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_norms_of_llama_and_gemma(ours, theirs, dtype, weight_dtype):
    ours, theirs = ours(64, eps=1e-5), theirs(64, eps=1e-5)
    assert torch.equal(ours.weight, theirs.weight) and ours.extra_repr() == theirs.extra_repr()
    for module in (ours, theirs):
        module.weight = nn.Parameter(torch.linspace(-1, 2, 64).to(weight_dtype))
    inputs, grad = random(2, 5, 64, dtype=dtype).requires_grad_(), random(2, 5, 64, seed=1)
    results = []
    for module in (ours, theirs):
        output = module(inputs)
        results.append([output, *torch.autograd.grad(output, (inputs, module.weight), grad.to(output.dtype))])
    with torch.no_grad():
        assert torch.equal(ours(inputs), results[0][0])
    for our, their in zip(*results):
        # Their gradients round what is between to the type of the input, too: a few steps of the largest value.
        assert our.dtype == their.dtype
        assert_close(our, their, 4 * max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps))


@pytest.mark.parametrize(("norm_type", "value"), [("rms_norm", 1), ("zero_centered_rms_norm", 0)])
def test_initialization_finds_the_norms(norm_type, value):
    model = tiny_model(norm_type=norm_type)
    norms = [module for module in model.modules() if isinstance(module, (DCARMSNorm, DCAZeroCenteredRMSNorm))]
    assert len(norms) > 4
    for norm in norms:
        nn.init.constant_(norm.weight, 7.0)
        model._init_weights(norm)
        assert (norm.weight == value).all()


def test_the_norm_keeps_its_input_alone_and_has_second_derivatives():
    norm = DCARMSNorm(6).double()
    inputs = random(2, 6, dtype=torch.float64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda x: x):
        norm(inputs)
    assert sorted(kept) == sorted([inputs.data_ptr(), norm.weight.data_ptr()])

    def second_derivatives(function):
        (grad,) = torch.autograd.grad(function(inputs, norm.weight, 1e-6).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (inputs, norm.weight))

    for ours, autograds in zip(second_derivatives(RMSNormFunction.apply), second_derivatives(rms_norm)):
        assert_close(ours, autograds, 1e-6)


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_is_frozen_gets_no_gradient(frozen):
    norm, inputs = DCARMSNorm(6), random(2, 6).requires_grad_(frozen != "input")
    norm.weight.requires_grad_(frozen != "weight")
    total = norm(inputs).sum()
    with CountOperations() as operations:
        total.backward()
    # The gradient of the weight alone is a product of a row with a matrix, that of the input alone one with a column.
    assert ("mm" in operations.names, "mv" in operations.names) == (frozen == "input", frozen == "weight")
    learned = norm.weight if frozen == "input" else inputs
    (expected,) = torch.autograd.grad(rms_norm(inputs, norm.weight, 1e-6).sum(), learned)
    assert_close(learned.grad, expected, 1e-6)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_torch_fx_sees_the_operations_of_llama_and_gemma(ours, theirs):
    # So vLLM finds the norms that it has a kernel for.
    graphs = [torch.fx.symbolic_trace(module(8)) for module in (ours, theirs)]
    inputs = random(3, 8)
    assert_close(graphs[0](inputs), theirs(8)(inputs), 1e-6)
    names = [
        {node.target if isinstance(node.target, str) else node.target.__name__ for node in graph.graph.nodes}
        for graph in graphs
    ]
    assert {"pow", "mean", "rsqrt", "add", "mul", "weight"} <= names[0] & names[1] and "apply" not in names[0]


def test_torch_func_and_jit_see_plain_operations():
    norm, inputs = DCARMSNorm(8), random(3, 8)
    norm.weight = nn.Parameter(random(8, seed=1))
    parameters = dict(norm.named_parameters())

    def loss(parameters, row, function):
        return function(row, parameters["weight"]).sin().sum()

    def ours(row, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (row,))

    def plain(row, weight):
        return rms_norm(row, weight, 1e-6)

    for transform in (
        lambda function: torch.func.vmap(torch.func.grad(loss), (None, 0, None))(parameters, inputs, function),
        lambda function: torch.func.jacrev(lambda rows: function(rows, parameters["weight"]))(inputs),
        lambda function: torch.func.jvp(lambda rows: function(rows, parameters["weight"]), (inputs,), (inputs * 2,)),
        lambda function: torch.func.hessian(lambda row: loss(parameters, row, function))(inputs[0]),
    ):
        torch.testing.assert_close(transform(ours), transform(plain))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs, inputs * 2)
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual, norm.weight)).tangent for f in (ours, plain)]
    torch.testing.assert_close(*tangents)
    assert tangents[0] is not None

    leaf = inputs.clone().requires_grad_()
    batch = random(4, 3, 8, seed=2)
    for result, value in zip(
        torch.autograd.grad(norm(leaf), (leaf, norm.weight), batch, is_grads_batched=True),
        torch.autograd.grad(plain(leaf, norm.weight), (leaf, norm.weight), batch, is_grads_batched=True),
    ):
        torch.testing.assert_close(result, value)

    traced = torch.jit.trace(norm, leaf)
    more = random(5, 8, seed=3)
    torch.testing.assert_close(traced(more), norm(more))
    assert "PythonOp" not in str(traced.graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_norm_of_a_gpu(dtype):
    norm = DCARMSNorm(64, eps=1e-5).to("cuda", dtype)
    norm.weight.data = torch.linspace(-1, 2, 64).to("cuda", dtype)
    inputs, grad = random(2, 5, 64, dtype=dtype).cuda().requires_grad_(), random(2, 5, 64, seed=1, dtype=dtype).cuda()
    results = []
    for function in (norm, lambda inputs: rms_norm(inputs, norm.weight, 1e-5)):
        output = function(inputs)
        first = torch.autograd.grad(output, (inputs, norm.weight), grad, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), (inputs, norm.weight))
        results.append([output, *first, *second])
    for ours, plain in zip(*results):
        assert ours.dtype == plain.dtype
        assert_close(ours.cpu(), plain.cpu(), 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))
