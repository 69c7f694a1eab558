"""
Whole models and large tensors on a GPU: what only a GPU shows. Where a test can, it also runs on the CPU at a tiny size, with
Triton's interpreter.
"""

from itertools import product

import pytest
import torch
from test_grn import random_inputs
from test_grn_triton import random_like, results_of, to_device
from test_modeling_dca import assert_close, generate, greedy, random_ids, randomize, tiny_model
from torch import nn

from modeling_dca import DCAConfig, DCAForCausalLM, grn_triton
from modeling_dca.grn_triton import generalized_residual_triton
from modeling_dca.modeling_dca import CACHE_NAME


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if obstacle := grn_triton.obstacle(torch.device(request.param)):
        pytest.skip(obstacle)
    return request.param


def model_on(device, implementation, dtype=torch.float32, **fields):
    """A model of the width of a real one on a GPU, and a tiny one on the CPU."""
    if device == "cpu":
        return tiny_model(dtype=dtype, num_hidden_layers=4, grn_implementation=implementation, **fields).train()
    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    config = DCAConfig(num_attention_heads=8, grn_implementation=implementation, **sizes, **fields)
    return randomize(DCAForCausalLM(config)).to(device, dtype).train()


def with_gates_at_zero(model):
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.zeros_(parameter)
    return model


def batches(device, count):
    shape, vocabulary = ((4, 256), 1000) if device == "cuda" else ((2, 7), 16)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(count)]


def compiled(device, model, **options):
    if device == "cpu":
        options = {"backend": "aot_eager"}  # compiling for the CPU takes long
    torch._dynamo.reset()  # the models share code, of which there may be few versions
    return torch.compile(model, fullgraph=True, **options)


def gradients(device, forward, model, autocast=False):
    (input_ids,) = batches(device, 1)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        loss = forward(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


CASES = [(*case, how) for case in product([False, True], [None, 2]) for how in ("", "checkpointing")]
CASES += [
    pytest.param(*case, marks=pytest.mark.gpu)
    for case in (
        (True, None, "compiled"),
        (True, 2, "compiled, checkpointing"),
        (False, None, "compiled, checkpointing"),
        (False, 2, "compiled"),
    )
]


@pytest.mark.parametrize(("autocast", "last_k", "how"), CASES)
def test_gradients_in_half_precision_are_as_exact_as_those_of_the_reference(device, autocast, last_k, how):
    """
    Both against those in float32: as vectors, since each of them is rounded in its own way. The gates are exactly at their
    kink: near it, the derivative of each token is either of two, and the errors of two models of equal precision differ by
    any factor.
    """
    dtype = torch.float32 if autocast else torch.bfloat16
    exact_model = with_gates_at_zero(model_on(device, "eager", last_k=last_k))
    exact = gradients(device, exact_model, exact_model)
    errors = []
    for implementation in ("triton", "eager"):
        model = with_gates_at_zero(model_on(device, implementation, dtype, last_k=last_k))
        if implementation == "triton" and "checkpointing" in how:
            model.gradient_checkpointing_enable()
        forward = compiled(device, model) if implementation == "triton" and "compiled" in how else model
        errors.append((gradients(device, forward, model, autocast) - exact).norm() / exact.norm())
    # (Where a GPU rounds to bfloat16, the interpreter cuts off.)
    assert 0 < errors[0] <= (4 if grn_triton.INTERPRETED else 1.5) * errors[1] < 1


# (Without a GPU, the full stack is compiled in the tests of the kernels.)
@pytest.mark.parametrize("last_k", [pytest.param(None, marks=pytest.mark.gpu), 2])
@pytest.mark.parametrize("mode", [None, pytest.param("reduce-overhead", marks=pytest.mark.gpu)])
def test_compiled_training_is_that_of_the_reference(device, mode, last_k):
    """Several steps of changing data; in the mode "reduce-overhead", the later ones are graphs that are replayed."""
    if mode is not None and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")

    def losses(implementation):
        model = model_on(device, implementation, last_k=last_k)
        forward = compiled(device, model, mode=mode) if implementation == "triton" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for input_ids in batches(device, 6):
            loss = forward(input_ids, labels=input_ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    results, expected = list(losses("triton")), list(losses("eager"))
    assert len({round(loss, 3) for loss in expected}) == 6
    assert results == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
def test_kernels_in_a_cuda_graph():
    """A graph that is captured once and replayed on other data, forward and backward."""
    inputs = to_device("cuda", *random_inputs("dca", 5, (300,), torch.float32, width=96))
    output_grads = random_like(generalized_residual_triton(*inputs))
    results_of(generalized_residual_triton, inputs, output_grads)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = results_of(generalized_residual_triton, inputs, output_grads)
    tensors = [*inputs[0], *inputs[1:], *output_grads]
    for tensor, value in zip(tensors, random_like(tensors, seed=7)):
        tensor.copy_(value)
    graph.replay()
    expected = results_of(generalized_residual_triton, inputs, output_grads)
    assert all(torch.equal(result, value) for result, value in zip(results, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("last_k", [None, 2])
def test_a_static_cache_is_compiled_and_decodes_the_same(last_k):
    model = tiny_model(last_k=last_k, grn_implementation="triton").cuda()
    input_ids = random_ids(2, 5).cuda()
    assert generate(model, input_ids, cache_implementation="static") == greedy(model, input_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "eager"])
def test_decoding_in_half_precision_equals_a_forward_pass(implementation):
    """One token at a time, of one sequence and of eight, as of all at once."""
    model = model_on("cuda", implementation, torch.bfloat16).eval()
    input_ids = torch.cat(batches("cuda", 2))[:, :33]
    with torch.no_grad():
        logits = model(input_ids).logits[:, -1]
        for rows in (slice(1), slice(8)):
            outputs = model(input_ids[rows, :-1], use_cache=True)
            last = model(input_ids[rows, -1:], **{CACHE_NAME: getattr(outputs, CACHE_NAME)}).logits[:, -1]
            assert_close(last.cpu(), logits[rows].cpu(), 0.05)


@pytest.mark.gpu
def test_a_stack_of_five_gigabytes():
    """
    Entries of less than 2^31 elements, but more of them in the outputs, which are one tensor: what comes of the last tokens is
    what comes of them alone.
    """
    width, tokens, last = 1024, 5 * 2**18, 70
    shape = (tokens, width)
    small = to_device("cuda", *random_inputs("dca", 2, (last,), torch.bfloat16, width))
    small_grads = random_like(generalized_residual_triton(*small))

    def at_the_end(tensor):
        large = torch.zeros(shape, dtype=tensor.dtype, device="cuda")
        large[-last:] = tensor
        return large

    stack = [at_the_end(entry) for entry in small[0]]
    output_grads = [at_the_end(grad) for grad in small_grads]
    assert sum(entry.nbytes for entry in stack) > 5 * 10**9 and 3 * stack[0].numel() > 2**31 > stack[0].numel()
    *of_tokens, delta_grad, gate_grad = results_of(generalized_residual_triton, (stack, *small[1:]), output_grads)
    *expected, small_delta_grad, small_gate_grad = results_of(generalized_residual_triton, small, small_grads)
    assert len(of_tokens) == len(expected) == 5
    for result, value in zip(of_tokens, expected):
        assert torch.equal(result[-last:], value)
        assert result[:-last].count_nonzero() == 0
    # Sums over tokens are taken in another order.
    torch.testing.assert_close(delta_grad, small_delta_grad, rtol=0.01, atol=0.05)
    torch.testing.assert_close(gate_grad, small_gate_grad, rtol=0.01, atol=0.05)
