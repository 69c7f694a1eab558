"""
What PyTorch offers besides the backward pass of eager mode - `torch.func`, derivatives in forward mode, batched gradients,
selective checkpointing, `torch.jit.trace`, frozen parameters, changes in place - does with every implementation of
generalized residuals what it does with the reference.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from test_grn import SCHEMES, CountOperations, random_inputs, random_like
from test_modeling_dca import assert_close, random_ids, tiny_model
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from modeling_dca import ALL_GRN_FUNCTIONS, GeneralizedResidual, generalized_residual, grn_cpu, grn_triton


@pytest.fixture(params=["cpu", "triton"])
def fused(request):
    implementation = ALL_GRN_FUNCTIONS[request.param]
    if obstacle := implementation.obstacle(torch.device("cpu")):
        pytest.skip(obstacle)
    return implementation


def three_blocks(function):
    """A function of a batch, `delta`s and a gate in which each block's outputs become an entry of the next one's stack."""

    def network(inputs, deltas, gate):
        stack = (inputs,)
        for delta in deltas:
            if hasattr(function, "chained"):
                outputs, stack = function.chained(stack, delta, gate)
            else:
                outputs = function(stack, delta, gate)
            stack = (*stack, torch.sin(sum((o + 1) * output for o, output in enumerate(outputs))))
        return stack[-1]

    return network


def network_inputs(dtype=torch.float64):
    tensors = random_like([torch.empty(4, 5), *(torch.empty(3, t, 5) for t in range(1, 4)), torch.empty(3, 5)], seed=3)
    inputs, *deltas, gate = (tensor.to(dtype) / 4 for tensor in tensors)
    return inputs, deltas, gate


TRANSFORMS = {
    "grad": lambda f, x, d, g: grad(lambda *a: f(*a).square().sum(), (0, 1, 2))(x, d, g),
    "vmap": lambda f, x, d, g: vmap(f, (0, None, None))(x, d, g),
    "vmap over the parameters": lambda f, x, d, g: vmap(f, (None, 0, 0))(
        x, [torch.stack((each, 2 * each)) for each in d], torch.stack((g, -g))
    ),
    "gradients by example": lambda f, x, d, g: vmap(grad(lambda *a: f(*a).square().sum(), (0, 1, 2)), (0, None, None))(
        x, d, g
    ),
    "jvp": lambda f, x, d, g: jvp(f, (x, d, g), (2 * x, [each.cos() for each in d], g.sin())),
    "vjp": lambda f, x, d, g: vjp(f, x, d, g)[1](torch.ones_like(x)),
    "jacrev": lambda f, x, d, g: jacrev(f, (0, 2))(x, d, g),
    "hessian": lambda f, x, d, g: hessian(lambda gate: f(x, d, gate).square().sum())(g),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(fused, transform):
    inputs = network_inputs()
    results = [TRANSFORMS[transform](three_blocks(function), *inputs) for function in (fused, generalized_residual)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_torch_func_over_inputs_that_need_gradients(fused):
    # The gradients of `torch.func` have gradients themselves.
    def second(function):
        inputs, deltas, gate = network_inputs()
        gate.requires_grad_()
        first = grad(lambda x: three_blocks(function)(x, deltas, gate).square().sum())(inputs)
        return torch.autograd.grad(first.square().sum(), gate)

    torch.testing.assert_close(second(fused), second(generalized_residual), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dual", ["stack", "delta", "gate"])
def test_derivatives_in_forward_mode(fused, dual):
    def tangent(function):
        inputs, deltas, gate = network_inputs()
        with forward_ad.dual_level():
            if dual == "stack":
                inputs = forward_ad.make_dual(inputs, inputs.cos())
            elif dual == "delta":
                deltas[1] = forward_ad.make_dual(deltas[1], deltas[1].cos())
            else:
                gate = forward_ad.make_dual(gate, gate.cos())
            return forward_ad.unpack_dual(three_blocks(function)(inputs, deltas, gate)).tangent

    ours, expected = tangent(fused), tangent(generalized_residual)
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(fused, create_graph):
    def grads(function):
        inputs, deltas, gate = network_inputs()
        leaves = [tensor.requires_grad_() for tensor in (inputs, *deltas, gate)]
        output = three_blocks(function)(inputs, deltas, gate)
        (batch,) = random_like([torch.empty(6, *output.shape, dtype=torch.float64)])
        first = torch.autograd.grad(output, leaves, batch, is_grads_batched=True, create_graph=create_graph)
        if not create_graph:
            return first
        return *first, *torch.autograd.grad(sum(each.square().sum() for each in first), leaves)

    torch.testing.assert_close(grads(fused), grads(generalized_residual), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians_and_hessians_of_torch_autograd(vectorize):
    fused = ALL_GRN_FUNCTIONS["cpu"]
    inputs, deltas, gate = network_inputs()
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):

        def result(function, derivative=derivative):
            def of_gate(gate):
                output = three_blocks(function)(inputs, deltas, gate)
                return output if derivative is torch.autograd.functional.jacobian else output.square().sum()

            return derivative(of_gate, gate, vectorize=vectorize)

        torch.testing.assert_close(result(fused), result(generalized_residual), rtol=1e-11, atol=1e-11)


def test_a_tensor_of_another_class_stays_one(fused):
    class Marked(torch.Tensor):
        pass

    inputs, deltas, gate = network_inputs()
    output = three_blocks(fused)(inputs.as_subclass(Marked), deltas, gate)
    assert type(output) is Marked
    assert_close(output.as_subclass(torch.Tensor), three_blocks(generalized_residual)(inputs, deltas, gate), 1e-12)


def models(**options):
    """The model of the default implementation, that of Triton, and that of the reference, with the same weights."""
    names = ["auto", "eager"] if grn_triton.obstacle(torch.device("cpu")) else ["auto", "triton", "eager"]
    return [tiny_model(grn_implementation=name, **options) for name in names]


@pytest.mark.parametrize("last_k", [None, 1])
def test_gradients_by_example_of_a_model(last_k):
    results = []
    for model in models(last_k=last_k):

        def loss(parameters, tokens, model=model):
            return functional_call(
                model, parameters, (tokens[None],), {"labels": tokens[None], "use_cache": False}
            ).loss

        results.append(vmap(grad(loss), (None, 0))(dict(model.named_parameters()), random_ids(2, 6)))
    for result in results[:-1]:
        for name, value in results[-1].items():
            assert_close(result[name], value, 1e-5)


def test_compiled_gradients_of_a_function(fused):
    def loss(inputs, deltas, gate, function):
        return three_blocks(function)(inputs, deltas, gate).square().sum()

    compiled = torch.compile(grad(loss, (0, 1, 2)), fullgraph=True, backend="aot_eager")
    results = [compiled(*network_inputs(), function) for function in (fused, generalized_residual)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_model_is_made_of_plain_operations():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    for model in models(num_hidden_layers=3):
        traced = torch.jit.trace(Logits(model), random_ids(2, 7))
        assert "PythonOp" not in str(traced.inlined_graph)
        other_ids = random_ids(3, 9)
        assert_close(traced(other_ids), model(other_ids).logits, 1e-5)


def save_products(ctx, operator, *args, **kwargs):
    saved = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def gradients(model):
    model.zero_grad()
    model(random_ids(2, 7), labels=random_ids(2, 7), use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "policy", [*CheckpointPolicy, save_products], ids=lambda policy: getattr(policy, "name", None) or policy.__name__
)
def test_selective_checkpointing(policy):
    function = policy if callable(policy) else lambda *args, **kwargs: policy
    context_fn = partial(create_selective_checkpoint_contexts, function)
    for model in models(num_hidden_layers=3):
        expected = gradients(model.train())
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
        # (The norms are plain PyTorch there, and round otherwise.)
        for result, value in zip(gradients(model), expected):
            assert_close(result, value, 1e-5)


def test_a_policy_of_selective_checkpointing_names_our_operators(monkeypatch):
    implementation = ALL_GRN_FUNCTIONS["cpu"]
    model = tiny_model(grn_implementation="cpu").train()
    residuals = model.config.num_hidden_layers
    for saved, calls in ((True, residuals), (False, 2 * residuals)):

        def policy(ctx, operator, *args, saved=saved, **kwargs):
            ours = operator is implementation.operators[0]
            return CheckpointPolicy.MUST_SAVE if ours and saved else CheckpointPolicy.MUST_RECOMPUTE

        context_fn = partial(create_selective_checkpoint_contexts, policy)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn})
        counted = []
        monkeypatch.setattr(
            grn_cpu, "output_dtype", lambda stack, counted=counted: counted.append(1) or stack[0].dtype
        )
        output = model(random_ids(2, 7), labels=random_ids(2, 7), use_cache=False).loss
        before = len(counted)
        output.backward()
        # The kernel asks for the type once, forward and backward; the last residual is not checkpointed.
        backward = residuals + 1
        assert (before, len(counted) - before - backward) == (residuals + 1, calls - residuals)


def test_flops_are_those_of_the_reference(fused):
    for scheme in SCHEMES:
        for frozen in ((), (0,), (1, -1), (0, 1, 2)):
            counts = []
            for function in (fused, generalized_residual):
                stack, delta, gate = random_inputs(scheme, 3, dtype=torch.float32)
                inputs = [tensor.requires_grad_() for tensor in (*stack, delta, gate) if tensor is not None]
                for i in frozen:
                    inputs[i].requires_grad_(False)
                with FlopCounterMode(display=False) as counter:
                    sum(output.sum() for output in function(stack, delta, gate)).backward()
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1], (scheme, frozen)
            assert (counts[0] > 0) == SCHEMES[scheme][2]


FROZEN = [(), ("delta",), ("gate",), ("delta", "gate"), (0,), (0, 1, 2), (1, "delta"), (0, 1, 2, "gate")]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_frozen_gets_no_gradient(fused, monkeypatch, scheme, frozen):
    kernel, kinds = fused.kernels[1], []

    def backward(*args):
        results = kernel(*args)
        kinds.append(len(results))
        return results

    monkeypatch.setattr(fused, "kernels", (fused.kernels[0], backward))

    def learn(function):
        stack, delta, gate = random_inputs(scheme, 3, dtype=torch.float32)
        named = {0: stack[0], 1: stack[1], 2: stack[2], "delta": delta} | ({} if gate is None else {"gate": gate})
        learned = {name: tensor.requires_grad_() for name, tensor in named.items() if name not in frozen}
        outputs, later = function(stack, delta, gate)
        for entry, original in zip(later, stack):
            assert entry.requires_grad == original.requires_grad
        torch.autograd.backward([*outputs, later[1].sin()], random_like([*outputs, later[1]], 5)) if (
            later[1].requires_grad
        ) else torch.autograd.backward(outputs, random_like(outputs, 5))
        return {name: tensor.grad for name, tensor in learned.items()}

    ours = learn(fused.chained)
    expected = learn(lambda stack, *parameters: (generalized_residual(stack, *parameters), stack))
    torch.testing.assert_close(ours, expected)
    # One gradient for each that needs one; if no entry is kept for any of them, the reference costs nothing.
    assert kinds == ([] if SCHEMES[scheme][2] is False and "delta" in frozen else [len(expected)])


def test_nothing_is_computed_for_what_is_frozen():
    stack, delta, gate = random_inputs("dca", 4, dtype=torch.float32)
    output_grads = random_like([stack[0]] * 3)

    def operations(*needed):
        with CountOperations() as counter:
            grn_cpu.backward(output_grads, [], stack, delta, gate, needed)
        return counter.names

    def products(names):
        return names.count("mm"), names.count("addmm_")

    # For each entry: its pre-activations, what the gate learns from it, and what it gets through the gate.
    everything = operations(*[True] * 6)
    assert products(everything) == (4, 4 + 4)
    no_delta = operations(*[True] * 4, False, True)
    assert everything.count("sum") - no_delta.count("sum") == 4  # over the tokens
    assert products(operations(*[True] * 5, False)) == (4, 4)
    assert products(operations(False, *[True] * 5)) == (4, 4 + 3)
    assert products(operations(False, False, False, True, False, False)) == (1, 1)
    delta_alone = operations(*[False] * 4, True, False)
    assert products(delta_alone) == (0, 0) and (delta_alone.count("sum"), delta_alone.count("addcmul_")) == (4, 0)


def test_frozen_models_train_what_is_left():
    for model in models():
        model.requires_grad_(False)
        model.model.layers[1].mlp.requires_grad_(True)
        output = model(random_ids(2, 7), labels=random_ids(2, 7), use_cache=False)
        output.loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode", "no gradient needed"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("changed", ["outputs", "entries", "originals"])
@pytest.mark.parametrize("frozen", [False, True])
def test_changes_in_place(fused, changed, scheme, mode, frozen):
    """The results, or the error, of the reference: that is, where the backward pass would read what was changed."""

    def work(function):
        stack, delta, gate = random_inputs(scheme, 3)
        leaves = [tensor.requires_grad_(mode != "no gradient needed") for tensor in stack]
        if mode == "grad" and not frozen:
            leaves += [tensor.requires_grad_() for tensor in (delta, gate) if tensor is not None]
        context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
        with context():
            stack = [entry * 2 for entry in stack]
            if hasattr(function, "chained"):
                outputs, later = function.chained(stack, delta, gate)
            else:
                outputs, later = function(stack, delta, gate), tuple(stack)
            for tensor in {"outputs": outputs, "entries": later, "originals": stack}[changed][:2]:
                tensor.mul_(3)
            result = sum(output.sin().sum() for output in outputs) + sum(entry.cos().sum() for entry in later)
        results = [*outputs, *later, *stack]
        if mode == "grad":
            try:
                results += torch.autograd.grad(result, leaves)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                return "error"
        return [tensor.detach().clone() for tensor in results]

    ours, expected = work(fused), work(generalized_residual)
    kept = mode == "grad" and changed != "outputs" and (not frozen or SCHEMES[scheme][2])
    assert (expected == "error") == kept
    torch.testing.assert_close(ours, expected) if not kept else None
    assert (ours == "error") == kept


def test_hooks_may_change_the_inputs_of_a_block_in_place():
    def change(module, args, outputs):
        outputs[0].mul_(0.5)
        outputs[1][:, 0].add_(1)

    results = []
    for model in models():
        for module in model.modules():
            if isinstance(module, GeneralizedResidual) and module.num_blocks < model.config.num_hidden_layers:
                module.register_forward_hook(change)
        results.append(gradients(model.train()))
    for result in results[:-1]:
        for ours, expected in zip(result, results[-1]):
            assert_close(ours, expected, 1e-5)


def test_outputs_of_inference_mode_are_inputs_afterwards(fused):
    stack, delta, gate = random_inputs("dca", 3, dtype=torch.float32)
    with torch.inference_mode():
        stack = [*stack, fused(stack, delta, gate)[0]]
    delta = torch.cat((delta, delta[:, :1]), dim=1)
    for output, value in zip(fused(stack, delta, gate), generalized_residual(stack, delta, gate)):
        assert_close(output, value, 1e-6)
    for function in (fused, generalized_residual):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(stack, delta.requires_grad_(), gate)


def test_fake_tensors(fused):
    stack, delta, gate = random_inputs("dca", 3, dtype=torch.bfloat16)
    with torch._subclasses.FakeTensorMode() as mode:
        *stack, delta, gate = inputs = [mode.from_tensor(tensor).requires_grad_() for tensor in (*stack, delta, gate)]
        outputs = fused(stack, delta, gate)
        assert [(output.shape, output.dtype) for output in outputs] == [((2, 3, 5), torch.bfloat16)] * 3
        grads = torch.autograd.grad([output.sum() for output in outputs], inputs)
        assert [each.shape for each in grads] == [each.shape for each in inputs]


def test_implementations_are_pickled_and_copied_by_name(fused):
    assert pickle.loads(pickle.dumps(fused)) is fused
    assert copy.deepcopy({"implementation": fused})["implementation"] is fused
