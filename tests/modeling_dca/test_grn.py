"""Generalized residuals: the maths against a slow rendering, the live gate, and the stack of k-DCA."""

import numpy as np
import pytest
import torch
from reference_dca import generalized_residuals, to_array, visible_stack
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_dca import ALL_GRN_FUNCTIONS, ResidualStack, generalized_residual


#: Of each scheme: outputs, whether `delta` has an element per feature, whether there is a gate.
SCHEMES = {"grn_v1": (1, False, False), "grn_v2": (1, True, False), "grn_v3": (1, True, True), "dca": (3, True, True)}
WIDTH = 5


def random_inputs(scheme, entries, shape=(2, 3), dtype=torch.float64, width=WIDTH):
    outputs, elementwise, gated = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(entries)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    stack = [normal(*shape, width) for _ in range(entries)]
    delta = normal(outputs, entries, width if elementwise else 1)
    gate = normal(outputs, width) if gated else None
    return stack, delta, gate


def as_float64(stack, delta, gate):
    return [to_array(entry) for entry in stack], to_array(delta), None if gate is None else to_array(gate)


def float32_error(stack, delta, gate):
    """
    How far a result may be from the exact one that was computed in float32: each product and sum errs by half an
    epsilon of something no larger than the same formula with every sign positive, and there are fewer of them in
    a row than `2 * entries + width + 2`.
    """
    stack, delta, gate = as_float64(stack, delta, gate)
    magnitude = generalized_residuals(
        [np.abs(entry) for entry in stack], np.abs(delta), None if gate is None else np.abs(gate)
    )
    steps = 2 * len(stack) + stack[0].shape[-1] + 2
    return np.stack(magnitude) * steps * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("entries", range(1, 7))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_formula(scheme, entries, shape):
    inputs = random_inputs(scheme, entries, shape)
    results = generalized_residual(*inputs)
    expected = generalized_residuals(*as_float64(*inputs))
    assert len(results) == SCHEMES[scheme][0]
    for result, value in zip(results, expected):
        assert result.shape == (*shape, WIDTH) and result.dtype == torch.float64
        np.testing.assert_allclose(to_array(result), value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["auto", *ALL_GRN_FUNCTIONS.valid_keys()])
def test_every_implementation_is_the_plain_sum_at_the_start(scheme, name):
    stack, delta, gate = random_inputs(scheme, 4, dtype=torch.float32)
    delta = torch.zeros_like(delta)
    gate = None if gate is None else torch.zeros_like(gate)
    implementation = ALL_GRN_FUNCTIONS["eager" if name == "auto" else name]
    for result in implementation(stack, delta, gate):
        torch.testing.assert_close(result, stack[0] + stack[1] + stack[2] + stack[3])


@pytest.mark.parametrize("parameter_dtype", ["same", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_is_rounded_once(scheme, dtype, parameter_dtype):
    stack, delta, gate = random_inputs(scheme, 6, shape=(8, 16), dtype=dtype, width=16)
    if parameter_dtype != "same":
        delta, gate = delta.to(parameter_dtype), None if gate is None else gate.to(parameter_dtype)
    results = generalized_residual(stack, delta, gate)
    expected = generalized_residuals(*as_float64(stack, delta, gate))
    errors = float32_error(stack, delta, gate)
    for result, value, error in zip(results, expected, errors):
        assert result.dtype == dtype
        # Half an epsilon of the value that is rounded, or of the smallest normal number where that is larger.
        rounding = torch.finfo(dtype).eps / 2 * np.maximum(np.abs(value) + error, torch.finfo(dtype).smallest_normal)
        assert (np.abs(to_array(result) - value) <= rounding + error).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mixed_types_under_autocast(scheme):
    # So a stack looks in mixed-precision training: the embeddings are in float32, what linear layers return is not.
    stack, delta, gate = random_inputs(scheme, 5, shape=(4, 8), dtype=torch.float32, width=16)
    stack = [stack[0], *(entry.bfloat16() for entry in stack[1:])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = generalized_residual(stack, delta, gate)
    expected = generalized_residuals(*as_float64(stack, delta, gate))
    for result, value, error in zip(results, expected, float32_error(stack, delta, gate)):
        assert result.dtype == torch.float32
        assert (np.abs(to_array(result) - value) <= error).all()


@pytest.mark.parametrize("entries", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme, entries):
    stack, delta, gate = random_inputs(scheme, entries)
    inputs = [tensor.requires_grad_() for tensor in (*stack, delta, gate) if tensor is not None]
    if gate is not None:
        # Finite differences, of step 1e-6, mean nothing across the kink of the gate.
        pre_activations = torch.stack(stack) @ gate.mT
        assert pre_activations.abs().min() > 1e-4 and (pre_activations < 0).any() and (pre_activations > 0).any()

    def of_all(*inputs):
        return generalized_residual(inputs[:entries], inputs[entries], None if gate is None else inputs[entries + 1])

    assert torch.autograd.gradcheck(of_all, inputs)


@pytest.mark.parametrize("scheme", ["grn_v3", "dca"])
def test_gradient_of_a_zero_gate_is_the_one_sided_derivative(scheme):
    stack, delta, gate = random_inputs(scheme, 3)
    gate = torch.zeros_like(gate).requires_grad_()
    results = generalized_residual(stack, delta, gate)
    upstream = [torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).double() for result in results]
    torch.autograd.backward(results, upstream)
    # d/dw of sum_i (w . f_i) * f_i, as on the side where the gate is open; torch.relu would give zeros.
    for output, grad in enumerate(upstream):
        expected = sum(((grad * entry).sum(-1, keepdim=True) * entry).sum((0, 1)) for entry in stack)
        torch.testing.assert_close(gate.grad[output], expected, rtol=1e-13, atol=1e-13)


def test_gradient_of_a_zero_gate_equals_the_change_on_the_open_side():
    # One token and one entry, so that there is a direction, f itself, in which the gate opens: a finite difference.
    (entry,), delta, gate = random_inputs("grn_v3", 1, shape=())
    gate = torch.zeros_like(gate).requires_grad_()
    generalized_residual([entry], delta, gate)[0].sum().backward()
    step = 1e-3 * entry
    with torch.no_grad():
        change = (generalized_residual([entry], delta, gate + step)[0] - (1 + delta[0, 0]) * entry).sum()
    torch.testing.assert_close((gate.grad[0] * step).sum(), change, rtol=1e-10, atol=0)
    assert change.abs() > 1e-6


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("scheme", ["grn_v3", "dca"])
def test_one_step_moves_a_zero_gate(scheme, optimizer_class):
    stack, delta, gate = random_inputs(scheme, 3)
    gate = torch.nn.Parameter(torch.zeros_like(gate))
    optimizer = optimizer_class([gate], lr=0.1)
    sum(result.square().sum() for result in generalized_residual(stack, delta, gate)).backward()
    optimizer.step()
    assert (gate != 0).all()


def random_outputs(number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(2, WIDTH, generator=generator, dtype=dtype) for _ in range(number)]


@pytest.mark.parametrize("last_k", [1, 2, 3, None])
def test_stack_equals_its_definition(last_k):
    outputs = random_outputs(9)
    stack = ResidualStack(outputs[0], None if last_k is None else last_k + 2)
    for t in range(1, 9):
        # Here the stack is what block `t` sees: f_0 to f_{t-1}.
        expected = visible_stack(outputs[:t], last_k)
        assert len(stack.entries) == len(expected) == (t if last_k is None else min(t, last_k + 2))
        for entry, value in zip(stack.entries, expected):
            torch.testing.assert_close(entry, value, rtol=1e-14, atol=1e-14)
        if last_k is None or t <= last_k + 1:
            # Nothing is merged yet: the entries are the outputs themselves, not copies.
            assert all(entry is output for entry, output in zip(stack.entries, outputs))
        else:
            assert stack.entries[0] is outputs[0]
            assert all(a is b for a, b in zip(stack.entries[2:], outputs[t - last_k : t]))
        stack.append(outputs[t])


def test_stack_of_the_standard_scheme_is_the_running_sum():
    outputs = random_outputs(6)
    stack = ResidualStack(outputs[0], max_entries=1)
    total = outputs[0]
    for output in outputs[1:]:
        stack.append(output)
        total = total + output
        assert len(stack.entries) == 1
        assert torch.equal(stack.entries[0], total)


class CountOperations(TorchDispatchMode):
    """Collects the names of all operations on tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_entries", [1, 3, 4, None])
def test_an_output_costs_at_most_one_addition(max_entries):
    outputs = random_outputs(9)
    stack = ResidualStack(outputs[0], max_entries)
    before = [output.clone() for output in outputs]
    for t, output in enumerate(outputs[1:], start=1):
        with CountOperations() as operations:
            stack.append(output)
        full = max_entries is not None and t + 1 > max_entries
        assert operations.names == (["add"] if full else [])
    # Earlier blocks have kept the entries for their backward pass: none may be written over.
    assert all(torch.equal(output, value) for output, value in zip(outputs, before))


@pytest.mark.parametrize("max_entries", [1, 3])
def test_merged_entry_is_summed_in_the_type_of_the_model_input(max_entries):
    # In bfloat16, 256 + 1 is 256: a long sum of small outputs would stop growing.
    stack = ResidualStack(torch.full((2,), 256.0), max_entries)
    for _ in range(12):
        stack.append(torch.ones(2, dtype=torch.bfloat16))
    if max_entries == 1:
        assert stack.entries[0].dtype == torch.float32 and (stack.entries[0] == 268).all()
    else:
        assert stack.entries[1].dtype == torch.float32 and (stack.entries[1] == 11).all()
        assert stack.entries[2].dtype == torch.bfloat16


def test_stack_follows_the_blocks_to_another_device():
    stack = ResidualStack(torch.ones(2), max_entries=3)
    stack.append(torch.ones(2))
    stack.append(torch.ones(2, device="meta"))
    stack.append(torch.ones(2, device="meta"))
    assert [entry.device.type for entry in stack.entries] == ["meta"] * 3
