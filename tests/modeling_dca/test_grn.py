"""
Generalized residuals: the maths against a slow rendering, the live gate, the stack of k-DCA, and the implementation for
the CPU against the maths.
"""

import math

import numpy as np
import pytest
import torch
from reference_dca import generalized_residuals, to_array, visible_stack
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_dca import ALL_GRN_FUNCTIONS, generalized_residual, grn_cpu, push
from modeling_dca.grn import GATE_NORM_EPS, find_implementation


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
    a row than `2 * (entries + width) + 6` (the width once for the gate and once for its norm).
    """
    stack, delta, gate = as_float64(stack, delta, gate)
    magnitude = generalized_residuals(
        [np.abs(entry) for entry in stack], np.abs(delta), None if gate is None else np.abs(gate)
    )
    steps = 2 * len(stack) + 2 * stack[0].shape[-1] + 6
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
@pytest.mark.parametrize("name", ["auto", "eager", "cpu"])
def test_every_implementation_is_the_plain_sum_at_the_start(scheme, name):
    stack, delta, gate = random_inputs(scheme, 4, dtype=torch.float32)
    delta = torch.zeros_like(delta)
    gate = None if gate is None else torch.zeros_like(gate)
    implementation = find_implementation(name, torch.device("cpu"))
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
    # d/dw of sum_i (w . n(f_i)) * f_i, as on the side where the gate is open; torch.relu would give zeros.
    seen = [entry / (entry.square().mean(-1, keepdim=True) + GATE_NORM_EPS).sqrt() for entry in stack]
    for output, grad in enumerate(upstream):
        expected = sum(((grad * f).sum(-1, keepdim=True) * n).sum((0, 1)) for f, n in zip(stack, seen))
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


#: Up to how many elements the implementation for the CPU computes a stack at once: never, or always.
ELEMENTS_AT_ONCE = {"entry by entry": -1, "at once": 2**30}


@pytest.fixture(params=ELEMENTS_AT_ONCE)
def on_cpu(request, monkeypatch):
    """The implementation for the CPU, in both of its ways."""
    monkeypatch.setattr(grn_cpu, "MAX_ELEMENTS_AT_ONCE", ELEMENTS_AT_ONCE[request.param])
    return ALL_GRN_FUNCTIONS["cpu"]


def random_like(tensors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype) for tensor in tensors]


def results_of(implementation, stack, delta, gate, output_grads):
    """What an implementation returns, and the gradients of the entries, of `delta` and of `gate`."""
    inputs = [tensor.detach().requires_grad_() for tensor in (*stack, delta, gate) if tensor is not None]
    outputs = implementation(inputs[: len(stack)], *inputs[len(stack) :])
    return [*outputs, *torch.autograd.grad(outputs, inputs, output_grads)]


def magnitudes(stack, delta, gate=None):
    """
    [`generalized_residual`] of inputs none of which is negative, with gradients in which every sign is positive: a norm gets
    smaller as its entry grows, which here counts as growing.
    """
    weights = [(1 + delta[:, i]).expand(len(delta), entry.shape[-1]) for i, entry in enumerate(stack)]
    results = [0.0] * len(delta)
    for weight, entry in zip(weights, stack):
        if gate is not None:
            scale = torch.rsqrt(entry.square().mean(-1, keepdim=True) + GATE_NORM_EPS)
            open_gates = torch.nn.functional.linear(entry, gate) * (2 * scale.detach() - scale)
        for o in range(len(delta)):
            factor = weight[o] if gate is None else weight[o] + open_gates[..., o, None]
            results[o] = results[o] + factor * entry
    return tuple(results)


def assert_equals_reference(implementation, stack, delta, gate):
    """
    Outputs and gradients are those of the reference in float64, but for the errors of float32 and one rounding.

    As in `float32_error`, these errors are so many times half an epsilon of the same formula with every sign positive.
    """
    inputs = [tensor for tensor in (*stack, delta, gate) if tensor is not None]
    output_grads = random_like(implementation(stack, delta, gate))
    results = results_of(implementation, stack, delta, gate, output_grads)

    def reference(function, change):
        entries, *parameters = [
            [change(tensor.double()) for tensor in group] for group in (stack, inputs[len(stack) :], output_grads)
        ]
        (delta, *gate), grads = parameters
        return results_of(function, entries, delta, gate[0] if gate else None, grads)

    # Sums over the features (for the gate and for its norm), the tokens, the entries and the outputs, and the products in them.
    steps = sum(stack[0].shape) + stack[0].shape[-1] + 2 * len(stack) + 2 * len(delta) + 8
    expected = reference(generalized_residual, lambda x: x)
    for result, exact, magnitude in zip(results, expected, reference(magnitudes, torch.abs), strict=True):
        error = magnitude * steps * torch.finfo(torch.promote_types(output_type(stack), torch.float32)).eps / 2
        info = torch.finfo(result.dtype)
        rounding = info.eps / 2 * (exact.abs() + error).clamp(min=info.smallest_normal)
        assert result.shape == exact.shape and ((result.double() - exact).abs() <= error + rounding).all()
    assert [result.dtype for result in results[len(delta) :]] == [tensor.dtype for tensor in inputs]


def output_type(stack):
    return max((entry.dtype for entry in stack), key=lambda dtype: torch.finfo(dtype).bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entries", [1, 2, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_equals_the_reference(on_cpu, scheme, entries, dtype):
    assert_equals_reference(on_cpu, *random_inputs(scheme, entries, (3, 4), dtype, width=16))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (0,), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("width", [1, 5, 33])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_takes_any_shape(on_cpu, scheme, width, shape):
    assert_equals_reference(on_cpu, *random_inputs(scheme, 3, shape, torch.float32, width))


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("elementwise", [True, False])
def test_cpu_takes_any_number_of_outputs(on_cpu, outputs, gated, elementwise):
    stack, _, _ = random_inputs("dca", 4, dtype=torch.float32)
    delta, gate = random_like([torch.empty(outputs, 4, WIDTH if elementwise else 1), torch.empty(outputs, WIDTH)])
    assert_equals_reference(on_cpu, stack, delta, gate if gated else None)


def test_cpu_takes_a_hundred_entries(on_cpu):
    assert_equals_reference(on_cpu, *random_inputs("dca", 100, dtype=torch.float32))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [[0], [0, 1], [2]])
def test_cpu_takes_mixed_types_under_autocast(on_cpu, wide, parameter_dtype):
    stack, delta, gate = random_inputs("dca", 5, (4, 8), torch.bfloat16, width=16)
    stack = [entry.float() if i in wide else entry for i, entry in enumerate(stack)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_reference(on_cpu, stack, delta.to(parameter_dtype), gate.to(parameter_dtype))


def test_cpu_takes_tensors_that_are_not_contiguous(on_cpu):
    _, delta, gate = random_inputs("dca", 3, dtype=torch.float32)
    stack = [entry.mT for entry in random_like([torch.empty(2, WIDTH, 3)] * 3)]
    assert not stack[0].is_contiguous()
    assert_equals_reference(on_cpu, stack, delta, gate)
    # The gradient of a sum is one number, seen as a tensor.
    inputs = [tensor.requires_grad_() for tensor in (*stack, delta, gate)]
    grads = [
        torch.autograd.grad(sum(output.sum() for output in function(stack, delta, gate)), inputs)
        for function in (on_cpu, generalized_residual)
    ]
    for grad, expected in zip(*grads):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_gradients_are_deterministic(on_cpu, scheme):
    inputs = random_inputs(scheme, 6, (40, 20), torch.float32, width=64)
    output_grads = random_like(on_cpu(*inputs))
    first, second = (results_of(on_cpu, *inputs, output_grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("scheme", ["grn_v3", "dca"])
def test_cpu_has_the_one_sided_derivative_of_a_zero_gate(on_cpu, scheme):
    stack, delta, gate = random_inputs(scheme, 3)
    assert_equals_reference(on_cpu, stack, delta, torch.zeros_like(gate))
    # One token at which the gate is exactly at zero, one where it is open and one where it is closed.
    stack = [torch.tensor([[1.0, -1.0], [2.0, 1.0], [-2.0, 1.0]]) for _ in range(2)]
    delta, gate = torch.zeros(1, 2, 2), torch.ones(1, 2)
    *_, gate_grad = results_of(on_cpu, stack, delta, gate, [torch.tensor([[1.0, 0.0]] * 3)])
    # Sum over the entries and tokens of (g . f) * n(f), the closed one left out.
    first, second = math.sqrt(1 + GATE_NORM_EPS), math.sqrt(2.5 + GATE_NORM_EPS)
    torch.testing.assert_close(
        gate_grad, torch.tensor([[2 * (1 / first + 4 / second), 2 * (-1 / first + 2 / second)]])
    )


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_the_gate_does_not_grow_with_the_entry(name):
    # An entry of zeros has a norm, too; and one of any size is weighted as one of size 1.
    (entry, *_), delta, gate = random_inputs("dca", 1, shape=(4,), dtype=torch.float32)
    small = ALL_GRN_FUNCTIONS[name]([entry], delta, gate)
    for scale in (10.0, 1e6, 1e18):
        for result, value in zip(ALL_GRN_FUNCTIONS[name]([entry * scale], delta, gate), small):
            torch.testing.assert_close(result / scale, value, rtol=1e-5, atol=1e-5)
    zeros = torch.zeros_like(entry).requires_grad_()
    results = ALL_GRN_FUNCTIONS[name]([zeros], delta, gate)
    assert all((result == 0).all() for result in results)
    # Its gates are at exactly 0, where they count as open: what they add to the gradient goes with g . f, which is 0.
    (grad,) = torch.autograd.grad(sum(result.sum() for result in results), [zeros])
    torch.testing.assert_close(grad, (1 + delta).sum((0, 1)).expand_as(grad))


def test_a_token_that_is_nan_leaves_the_others_alone(on_cpu):
    stack, delta, gate = random_inputs("dca", 3, (4,), torch.float32)
    output_grads = random_like(on_cpu(stack, delta, gate))
    expected = results_of(on_cpu, stack, delta, gate, output_grads)
    stack[1] = stack[1].clone()
    stack[1][2] = torch.nan
    results = results_of(on_cpu, stack, delta, gate, output_grads)
    others = torch.tensor([0, 1, 3])
    for result, value in zip(results[:6], expected):
        assert torch.equal(result[others], value[others])
    assert all(result[2].isnan().all() for result in results[:3])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_second_derivatives_are_those_of_the_reference(on_cpu, scheme):
    stack, delta, gate = random_inputs(scheme, 2, (2,))
    inputs = [tensor.requires_grad_() for tensor in (stack[0], delta, gate) if tensor is not None]

    def derivatives(chained, create_graph=True):
        # Two blocks, the second entry depends on the first, and of what the first block hands on not all is used.
        outputs, later = chained((inputs[0], inputs[0].sin()), *inputs[1:])
        more, _ = chained((later[1], outputs[0]), *inputs[1:])
        loss = sum(output.square().sum() for output in (*outputs, *more))
        grads = torch.autograd.grad(loss, inputs, create_graph=create_graph)
        if not create_graph:
            return grads
        return *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    ours = derivatives(on_cpu.chained)
    expected = derivatives(lambda stack, *parameters: (generalized_residual(stack, *parameters), stack))
    for result, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-10)
    for result, value in zip(derivatives(on_cpu.chained, create_graph=False), expected):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unused", [(), (0,), (1, 2), (0, 1, 2)])
def test_chain_gives_the_gradients_of_the_reference(on_cpu, unused):
    first, *parameters = random_like(
        [torch.empty(2, WIDTH), *(torch.empty(3, t, WIDTH) for t in range(1, 5)), torch.empty(3, WIDTH)]
    )
    inputs = [tensor.double().requires_grad_() for tensor in (first, *parameters)]

    def network(chained):
        stack, result = (inputs[0],), 0
        for delta in inputs[1:-1]:
            outputs, stack = chained(stack, delta, inputs[-1])
            used = [output for o, output in enumerate(outputs) if o not in unused or delta is inputs[-2]]
            new = torch.tanh(sum(used)) if used else torch.cos(stack[-1])
            result = result + new.square().sum()
            stack = (*stack, new)
        return torch.autograd.grad(result, inputs, materialize_grads=True)

    grads = network(on_cpu.chained)
    expected = network(lambda stack, *parameters: (generalized_residual(stack, *parameters), stack))
    for grad, value in zip(grads, expected):
        torch.testing.assert_close(grad, value, rtol=1e-12, atol=1e-12)


def test_every_entry_has_one_gradient_in_a_chain(on_cpu):
    # Where a tensor has several users, autograd writes the gradient of each and adds them up.
    stack, delta, gate = random_inputs("dca", 3)
    leaves = [entry.requires_grad_() for entry in stack]
    results = []
    for _ in range(3):
        outputs, stack = on_cpu.chained(stack, delta, gate)
        results += outputs
    seen, nodes, uses = set(), [result.grad_fn for result in results], []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            uses += edges
            nodes += [function for function, _ in edges]
    of_leaves = [function.variable for function, _ in uses if hasattr(function, "variable")]
    assert len(of_leaves) == len(leaves) and len(set(uses)) == len(uses)


def test_only_the_stack_and_the_parameters_are_kept_for_the_backward_pass(on_cpu):
    stack, delta, gate = random_inputs("dca", 3, (8, 4), torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in (*stack, delta, gate)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda x: x):
        on_cpu(stack, delta, gate)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in inputs)


@pytest.mark.parametrize("scheme", ["grn_v2", "dca"])
def test_operators_are_right_for_the_compiler(scheme):
    stack, delta, gate = random_inputs(scheme, 3, (2, 4), torch.float32)
    output_grads = random_like([torch.empty_like(stack[0])] * len(delta))
    forward, backward = ALL_GRN_FUNCTIONS["cpu"].operators
    needed = [True] * (4 if gate is None else 5)
    torch.library.opcheck(forward, (stack, delta, gate))
    torch.library.opcheck(backward, (output_grads, [], stack, delta, gate, needed))
    torch.library.opcheck(backward, (output_grads, random_like(stack), stack, delta, gate, needed))


def test_cpu_refuses_tensors_elsewhere():
    stack, delta, gate = random_inputs("dca", 2)
    message = "'cpu' cannot run: the tensors are on meta, and it is for those of the CPU"
    with pytest.raises(ValueError, match=message):
        ALL_GRN_FUNCTIONS["cpu"]([entry.to("meta") for entry in stack], delta.to("meta"), gate.to("meta"))


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_shapes_that_do_not_belong_together_are_refused(name):
    stack, delta, gate = random_inputs("dca", 2)
    for wrong, message in [
        (([], delta, gate), "`stack` is empty"),
        (([stack[0], stack[1][:1]], delta, gate), r"Entry 1 of `stack` has shape \(1, 3, 5\).* \(2, 3, 5\)"),
        ((stack[:1], delta, gate), r"`delta` has shape \(3, 2, 5\).* must be \(outputs, 1, 5\) or \(outputs, 1, 1\)"),
        ((stack, delta[..., :2], gate), r"`delta` has shape \(3, 2, 2\)"),
        ((stack, delta, gate[:1]), r"`gate` has shape \(1, 5\), but must be \(outputs, width\) = \(3, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ALL_GRN_FUNCTIONS[name](*wrong)


def test_auto_is_the_best_that_the_device_allows(monkeypatch, caplog):
    assert find_implementation("auto", torch.device("cpu")) is ALL_GRN_FUNCTIONS["cpu"]
    assert find_implementation("eager", torch.device("cpu")) is generalized_residual
    assert find_implementation("auto", torch.device("meta")) is generalized_residual
    assert not caplog.records
    monkeypatch.setattr(ALL_GRN_FUNCTIONS["cpu"], "obstacle", lambda device: f"nothing runs on {device} today")
    for _ in range(2):
        assert find_implementation("auto", torch.device("cpu")) is generalized_residual
    (record,) = caplog.records
    message = "The generalized residuals are computed by the slower reference: nothing runs on cpu today."
    assert (record.levelname, record.message) == ("WARNING", message)


def random_outputs(number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(2, WIDTH, generator=generator, dtype=dtype) for _ in range(number)]


@pytest.mark.parametrize("last_k", [1, 2, 3, None])
def test_stack_equals_its_definition(last_k):
    outputs = random_outputs(9)
    stack, max_entries = (outputs[0],), None if last_k is None else last_k + 2
    for t in range(1, 9):
        # Here the stack is what block `t` sees: f_0 to f_{t-1}.
        expected = visible_stack(outputs[:t], last_k)
        assert len(stack) == len(expected) == (t if last_k is None else min(t, last_k + 2))
        for entry, value in zip(stack, expected):
            torch.testing.assert_close(entry, value, rtol=1e-14, atol=1e-14)
        if last_k is None or t <= last_k + 1:
            # Nothing is merged yet: the entries are the outputs themselves, not copies.
            assert all(entry is output for entry, output in zip(stack, outputs))
        else:
            assert stack[0] is outputs[0]
            assert all(a is b for a, b in zip(stack[2:], outputs[t - last_k : t]))
        stack = push(stack, outputs[t], max_entries)


def test_stack_of_the_standard_scheme_is_the_running_sum():
    outputs = random_outputs(6)
    stack, total = (outputs[0],), outputs[0]
    for output in outputs[1:]:
        stack = push(stack, output, max_entries=1)
        total = total + output
        assert len(stack) == 1
        assert torch.equal(stack[0], total)


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
    stack = (outputs[0],)
    before = [output.clone() for output in outputs]
    for t, output in enumerate(outputs[1:], start=1):
        with CountOperations() as operations:
            stack = push(stack, output, max_entries)
        full = max_entries is not None and t + 1 > max_entries
        assert operations.names == (["add"] if full else [])
    # Earlier blocks have kept the entries for their backward pass: none may be written over.
    assert all(torch.equal(output, value) for output, value in zip(outputs, before))


@pytest.mark.parametrize("max_entries", [1, 3])
def test_merged_entry_is_summed_in_the_type_of_the_model_input(max_entries):
    # In bfloat16, 256 + 1 is 256: a long sum of small outputs would stop growing.
    stack = (torch.full((2,), 256.0),)
    for _ in range(12):
        stack = push(stack, torch.ones(2, dtype=torch.bfloat16), max_entries)
    if max_entries == 1:
        assert stack[0].dtype == torch.float32 and (stack[0] == 268).all()
    else:
        assert stack[1].dtype == torch.float32 and (stack[1] == 11).all()
        assert stack[2].dtype == torch.bfloat16
