"""The Triton kernels of generalized residuals against the reference: interpreted on the CPU, and on a GPU."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_grn import SCHEMES, magnitudes, random_inputs
from test_modeling_dca import assert_close, random_ids, tiny_model

import modeling_dca
from modeling_dca import generalized_residual, grn, grn_triton
from modeling_dca.grn import GATE_NORM_EPS, find_implementation
from modeling_dca.grn_triton import generalized_residual_triton


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if obstacle := grn_triton.obstacle(torch.device(request.param)):
        pytest.skip(obstacle)
    return request.param


def test_there_is_a_device_to_test_on():
    """What imports the kernels before `tests/conftest.py` has them interpreted would have all of these tests skipped."""
    pytest.importorskip("triton")
    assert torch.cuda.is_available() or grn_triton.obstacle(torch.device("cpu")) is None


def to_device(device, stack, delta, gate):
    return [entry.to(device) for entry in stack], delta.to(device), None if gate is None else gate.to(device)


def random_like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
        for tensor in tensors
    ]


def changed(inputs, function):
    stack, delta, gate = inputs
    return [function(entry) for entry in stack], function(delta), None if gate is None else function(gate)


def results_of(implementation, inputs, output_grads, entry_grads=()):
    """Outputs, and the gradients of all inputs, where later users of the entries have sent `entry_grads` back."""
    stack, delta, gate = changed(inputs, lambda tensor: tensor.detach().requires_grad_())
    leaves = [tensor for tensor in (*stack, delta, gate) if tensor is not None]
    if hasattr(implementation, "chained"):
        outputs, later = implementation.chained(stack, delta, gate)
    else:
        outputs, later = implementation(stack, delta, gate), [entry.view_as(entry) for entry in stack]
    results, grads = [*outputs, *later[: len(entry_grads)]], [*output_grads, *entry_grads]
    return [*outputs, *torch.autograd.grad(results, leaves, grads)]


def assert_equals_reference(inputs, with_entry_grads=True, output_grads=None):
    """
    Each result is computed in float32 (or float64) and rounded once. A product or sum errs by half an epsilon of
    something no larger than the same formula with every sign positive, and there are at most `steps` of them in a row.
    """
    stack, delta, gate = inputs
    outputs = generalized_residual_triton(*inputs)
    output_grads = random_like(outputs) if output_grads is None else output_grads
    entry_grads = random_like(stack, seed=2) if with_entry_grads else []
    results = results_of(generalized_residual_triton, inputs, output_grads, entry_grads)
    grads = [[grad.double() for grad in grads] for grads in (output_grads, entry_grads)]
    exact = changed(inputs, torch.Tensor.double)
    expected = results_of(generalized_residual, exact, *grads)
    positive = [[grad.abs() for grad in list_of_grads] for list_of_grads in grads]
    errors = results_of(magnitudes, changed(exact, torch.abs), *positive)
    steps = stack[0][..., 0].numel() + 2 * stack[0].shape[-1] + 4 * len(stack) * len(outputs)
    compute_dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    like = [tensor for tensor in (*outputs, *stack, delta, gate) if tensor is not None]
    assert len(results) == len(expected) == len(errors) == len(like)
    for result, value, magnitude, tensor in zip(results, expected, errors, like):
        assert result.dtype == tensor.dtype and result.shape == tensor.shape
        error = steps * torch.finfo(compute_dtype).eps * magnitude
        rounded = torch.finfo(tensor.dtype)
        # (Where a GPU rounds to bfloat16, the interpreter cuts off.)
        cut_off = grn_triton.INTERPRETED and tensor.dtype == torch.bfloat16
        rounding = rounded.eps / (1 if cut_off else 2) * (value.abs() + error).clamp(min=rounded.smallest_normal)
        assert ((result.double() - value).abs() <= error + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_reference(device, scheme, dtype):
    # Several blocks and ranges of tokens, of which the last is not full, as are the groups of entries.
    inputs = to_device(device, *random_inputs(scheme, 5, (70,), dtype, width=16))
    assert_equals_reference(inputs)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("entries", [1, 2, 5, 9])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_reference_for_any_number_of_entries(device, scheme, entries, shape):
    inputs = to_device(device, *random_inputs(scheme, entries, shape, torch.float32))
    assert_equals_reference(inputs, with_entry_grads=entries != 2)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# What the interpreter takes long for, but for what is seen with fewer entries at once.
@pytest.mark.parametrize(
    ("scheme", "entries", "at_once"),
    [
        *[("dca", 33, 128), ("grn_v3", 8, 8), ("grn_v3", 10, 8)],
        *[slow("dca", 100, 128), slow("grn_v3", 128, 128), slow("grn_v3", 130, 128)],
    ],
)
def test_equals_the_reference_for_many_entries(device, monkeypatch, scheme, entries, at_once):
    # Some are more than one launch takes.
    assert grn_triton.MAX_ENTRIES == 128
    monkeypatch.setattr(grn_triton, "MAX_ENTRIES", at_once)
    assert_equals_reference(to_device(device, *random_inputs(scheme, entries, (3,), torch.float32)))


@pytest.mark.parametrize(("entries", "at_once"), [(3, 128), (18, 8), slow(260, 128)])
def test_half_precision_is_rounded_once(device, monkeypatch, entries, at_once):
    # Three launches add to the outputs of 260 entries, 128 at once.
    monkeypatch.setattr(grn_triton, "MAX_ENTRIES", at_once)
    inputs = to_device(device, *random_inputs("grn_v3", entries, (3,), torch.bfloat16))
    assert_equals_reference(inputs)


@pytest.mark.parametrize("width", [1, 33, 600, 4100])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_reference_for_any_width(device, scheme, width):
    assert_equals_reference(to_device(device, *random_inputs(scheme, 3, (7,), torch.float32, width)))


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("outputs", [2, 5])
def test_equals_the_reference_for_any_number_of_outputs(device, outputs, gated, elementwise):
    (*stack, gate, delta) = random_like(
        [*[torch.empty(2, 70, 5)] * 3, torch.empty(outputs, 5), torch.empty(outputs, 3, 5)]
    )
    delta = delta if elementwise else delta[..., :1]
    assert_equals_reference(to_device(device, stack, delta, gate if gated else None))


def test_equals_the_reference_over_many_blocks_and_ranges(device):
    assert_equals_reference(to_device(device, *random_inputs("dca", 3, (700,), torch.float32)))


@pytest.mark.parametrize("wide", [[0], [0, 1], [2], [1, 3, 4], [4]], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("scheme", ["grn_v1", "dca"])
def test_mixed_types(device, scheme, dtypes, wide):
    # Under autocast the model's input and k-DCA's merged entry are in float32, and what linear layers return is not.
    stack, delta, gate = random_inputs(scheme, 5, (2, 5), dtypes[0])
    stack = [entry.to(dtypes[i not in wide]) for i, entry in enumerate(stack)]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_equals_reference(to_device(device, stack, delta, gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_of_another_type(device, dtype):
    stack, delta, gate = random_inputs("dca", 5, (6,), torch.float32)
    stack = [entry.to(dtype) for entry in stack]
    assert_equals_reference(to_device(device, stack, delta.half(), gate.bfloat16()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty_batch(device, scheme):
    inputs = to_device(device, *random_inputs(scheme, 3, (2, 0), torch.bfloat16))
    assert_equals_reference(inputs)
    *_, gradient = results_of(generalized_residual_triton, inputs, random_like(generalized_residual_triton(*inputs)))
    assert (gradient == 0).all()


def test_tensors_that_are_not_contiguous_or_aligned(device):
    stack, delta, gate = to_device(device, *random_inputs("dca", 4, (2, 3), torch.float32))
    shuffled = [stack[0].mT.contiguous().mT, stack[1].repeat(1, 2, 1)[:, ::2], stack[2].expand(2, 3, 5)]
    shuffled.append(torch.empty(31, device=device)[1:].view(2, 3, 5).copy_(stack[3]))
    assert not shuffled[0].is_contiguous() and not shuffled[1].is_contiguous() and shuffled[3].data_ptr() % 16
    assert all(grn_triton.aligned(entry).data_ptr() % 16 == 0 for entry in shuffled)
    delta, gate = delta.repeat(1, 1, 2)[..., ::2], gate.mT.contiguous().mT
    # The gradient of a sum is one number, seen as a tensor.
    grads = [torch.ones((), device=device).expand(2, 3, 5) for _ in range(3)]
    assert_equals_reference((shuffled, delta, gate), output_grads=grads)


@pytest.mark.parametrize("unused", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
def test_chain_gives_the_gradients_of_the_reference(device, unused):
    first, *deltas, gate = random_like(
        [torch.empty(2, 5), *(torch.empty(3, t, 5) for t in range(1, 4)), torch.empty(3, 5)]
    )
    inputs = [tensor.double().to(device).requires_grad_() for tensor in (first, *deltas, gate)]

    def network(chained):
        stack, result = (inputs[0],), 0
        for delta in inputs[1:-1]:
            outputs, stack = chained(stack, delta, inputs[-1])
            used = [output for o, output in enumerate(outputs) if o not in unused or delta is inputs[-2]]
            new = torch.tanh(sum(used)) if used else torch.cos(stack[-1])
            result = result + new.square().sum()
            stack = (*stack, new)
        return torch.autograd.grad(result, inputs, materialize_grads=True)

    grads = network(generalized_residual_triton.chained)
    expected = network(lambda stack, *parameters: (generalized_residual(stack, *parameters), stack))
    for grad, value in zip(grads, expected):
        torch.testing.assert_close(grad, value, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_zero_gate(device):
    stack, delta, gate = to_device(device, *random_inputs("dca", 3, dtype=torch.float32))
    inputs = stack, delta, torch.zeros_like(gate)
    assert_equals_reference(inputs)
    *_, gate_grad = results_of(generalized_residual_triton, inputs, random_like(generalized_residual_triton(*inputs)))
    assert (gate_grad != 0).all()
    # One token at which the gate is exactly at zero, one where it is open and one where it is closed.
    stack = [torch.tensor([[1.0, -1.0], [2.0, 1.0], [-2.0, 1.0]], device=device) for _ in range(2)]
    inputs = stack, torch.zeros(1, 2, 2, device=device), torch.ones(1, 2, device=device)
    output_grads = [torch.tensor([[1.0, 0.0]] * 3, device=device)]
    *_, gate_grad = results_of(generalized_residual_triton, inputs, output_grads)
    # Sum over the entries and tokens of (g . f) * n(f), the closed one left out.
    norm = math.sqrt(2.5 + GATE_NORM_EPS)
    expected = [2 * (1 / math.sqrt(1 + GATE_NORM_EPS) + 4 / norm), 2 * (-1 / math.sqrt(1 + GATE_NORM_EPS) + 2 / norm)]
    torch.testing.assert_close(gate_grad.cpu(), torch.tensor([expected]))


@pytest.mark.parametrize("width", [5, 600])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_that_is_nan_leaves_the_others_alone(device, scheme, width):
    inputs = to_device(device, *random_inputs(scheme, 3, (4,), torch.float32, width))
    outputs = generalized_residual_triton(*inputs)
    output_grads = random_like(outputs)
    expected = results_of(generalized_residual_triton, inputs, output_grads)
    inputs[0][1][2, 0] = torch.nan
    results = results_of(generalized_residual_triton, inputs, output_grads)
    others = torch.tensor([0, 1, 3], device=device)
    for result, value in zip(results[: len(outputs) + 3], expected):
        assert torch.equal(result[others], value[others])
    # The gate's pre-activation is NaN, and with it the whole of the token.
    gated = SCHEMES[scheme][2]
    assert all(result[2].isnan().all() if gated else result[2, 0].isnan() for result in results[: len(outputs)])


@pytest.mark.parametrize("place", ["entry", "output gradient", "entry gradient"])
def test_what_lies_behind_the_tensors_is_not_read(device, place):
    """A tile is larger than the data: what is next in memory, here NaN, must not count."""
    inputs = to_device(device, *random_inputs("dca", 3, (3,), torch.float32))

    def in_front_of_nan(tensors):
        spaces = [torch.full((4096,), torch.nan, device=device) for _ in tensors]
        return [space[: tensor.numel()].view_as(tensor).copy_(tensor) for space, tensor in zip(spaces, tensors)]

    output_grads, entry_grads = random_like(generalized_residual_triton(*inputs)), random_like(inputs[0])
    expected = results_of(generalized_residual_triton, inputs, output_grads, entry_grads)
    inputs = in_front_of_nan(inputs[0]), *in_front_of_nan(inputs[1:])
    results = results_of(
        generalized_residual_triton, inputs, in_front_of_nan(output_grads), in_front_of_nan(entry_grads)
    )
    assert all(torch.equal(result, value) for result, value in zip(results, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_deterministic(device, dtype):
    inputs = to_device(device, *random_inputs("dca", 3, (70,), dtype, width=16))
    output_grads = random_like(generalized_residual_triton(*inputs))
    first, second = (results_of(generalized_residual_triton, inputs, output_grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_derivatives(device):
    stack, delta, gate = to_device(device, *random_inputs("dca", 2, (2,)))
    inputs = [tensor.requires_grad_() for tensor in (*stack, delta, gate)]
    assert torch.autograd.gradgradcheck(
        lambda *inputs: generalized_residual_triton(inputs[:2], *inputs[2:]), inputs, fast_mode=True
    )


@pytest.mark.parametrize("scheme", ["grn_v2", "dca"])
def test_operators_are_right_for_the_compiler(device, scheme):
    stack, delta, gate = to_device(device, *random_inputs(scheme, 3, (2, 4), torch.float32))
    delta, gate = delta.bfloat16(), None if gate is None else gate.half()
    output_grads = random_like([torch.empty_like(stack[0])] * len(delta))
    forward, backward = generalized_residual_triton.operators
    needed = [True] * (4 if gate is None else 5)
    torch.library.opcheck(forward, (stack, delta, gate))
    torch.library.opcheck(backward, (output_grads, random_like(stack), stack, delta, gate, needed))


def logits_and_gradients(device, model, autocast):
    input_ids = random_ids(2, 7).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        outputs = model(input_ids, labels=input_ids, use_cache=False)
    outputs.loss.backward()
    return [outputs.logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("last_k", [None, 2])
@pytest.mark.parametrize("autocast", [False, True])
def test_model_is_that_of_the_reference(device, autocast, last_k, checkpointing):
    results = []
    for name in ("triton", "eager"):
        model = tiny_model(grn_implementation=name, last_k=last_k).to(device).train()
        if checkpointing and name == "triton":
            model.gradient_checkpointing_enable()
        results.append(logits_and_gradients(device, model, autocast))
    # Under autocast, what differs in the last bit of float32 can be rounded to neighbours in bfloat16.
    for result, value in zip(*results):
        assert_close(result.cpu(), value.cpu(), 8 * torch.finfo(torch.bfloat16).eps if autocast else 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_model_is_that_of_the_reference(device, autocast):
    backend = "inductor" if device == "cuda" else "aot_eager"  # compiling for the CPU takes long
    models = [tiny_model(grn_implementation=name, num_hidden_layers=2).to(device) for name in ("triton", "eager")]
    compiled = torch.compile(models[0], fullgraph=True, backend=backend)
    results = [logits_and_gradients(device, compiled, autocast), logits_and_gradients(device, models[1], autocast)]
    for result, value in zip(*results):
        assert_close(result.cpu(), value.cpu(), 8 * torch.finfo(torch.bfloat16).eps if autocast else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [512, 768, 1024, 2048])
def test_sizes_of_real_models_on_a_gpu(width, dtype):
    """All programs at once, in several waves: equal to the reference, and twice the same."""
    inputs = stack, _, gate = to_device("cuda", *random_inputs("dca", 13, (4, 1025), dtype, width))
    for entry in stack:
        # Next to the kink of the gate, gradients are either of two: for zeros it is at the kink in any arithmetic.
        entry[((entry.double() @ gate.double().mT).abs() < 0.01).any(-1)] = 0
    assert_equals_reference(inputs)
    output_grads = random_like(generalized_residual_triton(*inputs))
    first, second = (results_of(generalized_residual_triton, inputs, output_grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    entry = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16, device="cuda")
    entry[-1] = 1
    delta, gate = torch.ones(1, 1, 1024, device="cuda"), torch.zeros(1, 1024, device="cuda")
    output, entry_grad, delta_grad, gate_grad = results_of(
        generalized_residual_triton, ([entry], delta, gate), [entry]
    )
    assert (output[-1] == 2).all() and output.count_nonzero() == 1024
    # Here w = 0, and (g . f) * w with it; for the gate it is (g . f) * n(f).
    assert (entry_grad[-1] == 2).all() and entry_grad.count_nonzero() == 1024
    assert (delta_grad == 1).all()
    torch.testing.assert_close(gate_grad, torch.full_like(gate_grad, 1024 / math.sqrt(1 + GATE_NORM_EPS)))


@pytest.mark.gpu
def test_few_variants_of_the_kernels_are_compiled():
    def variants():
        kernels = grn_triton.forward_kernel, grn_triton.backward_kernel
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    for entries in range(1, 9):
        for tokens in (1, 16, 33):
            inputs = to_device("cuda", *random_inputs("dca", entries, (tokens,), torch.float32, width=24))
            results_of(generalized_residual_triton, inputs, random_like(generalized_residual_triton(*inputs)))
        if entries == 4:
            before = variants()
    assert variants() == before + 2  # the next power of two, forward and backward


COMPILE = """
import pathlib, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modeling_dca import grn_triton

MEASURED = list(map(int, sys.argv[1:]))

def resources(compiled):
    # The registers of a thread, and the bytes of what does not fit into them.
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    pathlib.Path("kernel.cubin").write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups()

class Compile:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps, **options):
        names = self.kernel.arg_names
        signature, constants, attributes = {}, {}, {}

        def signature_of(argument, path):
            if isinstance(argument, tuple):
                return tuple(signature_of(item, (*path, i)) for i, item in enumerate(argument))
            if isinstance(argument, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return "*" + {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}[str(argument.dtype)[6:]]
            if argument is None or names[path[0]] in options:
                constants[path] = argument
                return "constexpr"
            return "fp32" if isinstance(argument, float) else "i32"

        for i, argument in enumerate([*arguments, *(options[name] for name in names[len(arguments) :])]):
            signature[names[i]] = signature_of(argument, (i,))
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 227 * 1024
        print(self.kernel.__name__, *resources(compiled) if MEASURED else ())

grn_triton.forward_kernel = Compile(grn_triton.forward_kernel)
grn_triton.backward_kernel = Compile(grn_triton.backward_kernel)
grn_triton.norm_backward_kernel = Compile(grn_triton.norm_backward_kernel)
for dtypes, outputs, elementwise, gated, width in [([torch.bfloat16] * 13, 3, True, True, width) for width in MEASURED] or [
    ([torch.float32] + 4 * [torch.bfloat16], 3, True, True, 512),
    ([torch.float32, torch.bfloat16] * 2, 3, True, True, 24),
    ([torch.bfloat16], 1, True, False, 1024),
    ([torch.float32] * 3, 1, False, False, 5),
    ([torch.float64] * 3, 2, True, True, 64),
    ([torch.float32] * 3, 5, True, True, 4096),
]:
    stack = [torch.zeros(70, width, dtype=dtype) for dtype in dtypes]
    delta = torch.zeros(outputs, len(stack), width if elementwise else 1)
    gate = torch.zeros(outputs, width) if gated else None
    dtype = grn_triton.output_dtype(stack)
    norms = outputs * [torch.zeros(width, dtype=dtype)] if dtype != torch.float64 else ()
    grn_triton.forward(stack, delta, gate, norms, 1e-6)
    output_grads = [torch.zeros(70, width, dtype=dtype)] * outputs
    if norms:
        grn_triton.norm_backward(output_grads, output_grads[0], output_grads, norms, 1e-6)
    for frozen in [(), (-1,), (-2,), (-1, -2)] if width == 24 else [()]:
        needed = [True] * (len(stack) + (2 if gated else 1))
        for i in frozen:
            needed[i] = False
        grn_triton.backward(output_grads, stack if width > 64 else [], stack, delta, gate, needed)
"""


def compile_kernels(folder, *widths):
    """What the script above prints; of `widths`, the kernels of DCA in bfloat16 and their resources."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(Path(modeling_dca.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment |= {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command = [sys.executable, "-c", COMPILE, *widths]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler does not; that needs no GPU."""
    printed = compile_kernels(tmp_path).split()
    names = ("forward_kernel", "norm_backward_kernel", "backward_kernel")
    assert [printed.count(name) for name in names] == [7, 5, 22]


@pytest.mark.slow
def test_kernels_of_dca_fit_into_the_registers(tmp_path):
    """On Hopper, at the widths of real models; but for the backward pass at 4,096, which keeps some bytes elsewhere."""
    widths = (576, 1024, 2048, 4096)
    lines = [line.split() for line in compile_kernels(tmp_path, *map(str, widths)).splitlines()]
    print(*zip((width for width in widths for _ in range(3)), lines), sep="\n")
    assert [name for name, *_ in lines] == ["forward_kernel", "norm_backward_kernel", "backward_kernel"] * len(widths)
    assert [int(stack) for _, _, stack in lines[:-1]] == [0] * 11


def test_obstacles(monkeypatch, caplog):
    inputs = random_inputs("dca", 2, dtype=torch.float32)
    monkeypatch.setattr(grn_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    message = (
        "'triton' cannot run: the tensors are on cpu, and Triton needs a GPU; \"auto\" uses the best one that can."
    )
    if grn_triton.triton is not None:
        assert grn_triton.obstacle(torch.device("cuda")) is None
        with pytest.raises(ValueError, match=message):
            generalized_residual_triton(*inputs)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        too_old = "the GPU has compute capability 7.5, and Triton needs 8.0"
        assert grn_triton.obstacle(torch.device("cuda")) == too_old
        assert find_implementation("auto", torch.device("cuda")) is generalized_residual
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            f"The generalized residuals are computed by the slower reference: {too_old}."
        ]
    monkeypatch.setattr(grn_triton, "triton", None)
    for device in ("cpu", "cuda"):
        assert grn_triton.obstacle(torch.device(device)) == "Triton is not installed"
    with pytest.raises(ValueError, match="'triton' cannot run: Triton is not installed; \"auto\" uses"):
        generalized_residual_triton(*inputs)


def test_the_module_is_imported_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # makes the import fail
import torch
import modeling_dca
from modeling_dca.grn_triton import obstacle
print(obstacle(torch.device("cuda")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "Triton is not installed", result.stderr[-3000:]


def test_rocm_gets_the_reference_by_itself(monkeypatch):
    """The kernels were not tried there; who names them gets them."""
    monkeypatch.setattr(torch.version, "hip", "7.0")  # which is read when the module is imported
    spec = importlib.util.find_spec("modeling_dca.grn")
    on_rocm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(on_rocm)
    device = torch.device("cuda")
    assert on_rocm.find_implementation("auto", device) is on_rocm.generalized_residual
    monkeypatch.setattr(grn, "BEST_GRN_FUNCTIONS", on_rocm.BEST_GRN_FUNCTIONS)
    assert find_implementation("auto", device) is generalized_residual
    assert find_implementation("triton", device).name == "triton"
