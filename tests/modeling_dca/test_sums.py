"""What k-DCA merges is not kept for the backward pass, and is made again there to the last bit."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel, set_seed

from modeling_dca import DCAConfig, DCAForCausalLM, DCAModel, GeneralizedResidual, push, sums
from tests.modeling_dca.test_parallel import two_processes


WIDTH, BATCH, LENGTH = 16, 2, 8
ENTRY_BYTES = BATCH * LENGTH * WIDTH * 4
CHECKPOINTING = {"use_reentrant": False}


def tokens():
    return torch.randint(50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def build(kind=DCAForCausalLM, layers=12, **options):
    set_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": layers}
    model = kind(DCAConfig(**sizes, **options)).train()
    for module in model.modules():
        if isinstance(module, GeneralizedResidual):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
    return model


def local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def kept_storages(model):
    """The bytes of each storage that is kept for the backward pass, but for the parameters."""
    own, kept = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = local(tensor).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(tokens(), use_cache=False).last_hidden_state
    del result
    return [size for address, size in kept.items() if address not in own]


@pytest.mark.parametrize("layers", [4, 8, 12, 20])
def test_with_checkpointing_all_keep_as_many_tensors(layers):
    llama = LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=64, num_attention_heads=2, num_hidden_layers=layers
    )
    models = [build(DCAModel, layers, last_k=last_k) for last_k in (None, 1, 2, 5)] + [LlamaModel(llama).train()]
    for model in models:
        model.gradient_checkpointing_enable(CHECKPOINTING)
        assert kept_storages(model).count(ENTRY_BYTES) == layers + 2


def keep_in_shards(rank, folder):
    found = []
    for last_k in (None, 1, 2):
        model = build(DCAModel, 8, last_k=last_k)
        model.gradient_checkpointing_enable(CHECKPOINTING)
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        found.append(kept_storages(model).count(ENTRY_BYTES))
    torch.save(found, f"{folder}/{rank}.pt")


def test_so_they_do_where_weights_are_shared_out(tmp_path):
    """FSDP hands blocks other tensors than those that the blocks before have returned."""
    two_processes(keep_in_shards, tmp_path)
    assert torch.load(tmp_path / "0.pt") == [10, 10, 10]


@pytest.mark.parametrize("last_k", [1, 2, 5])
@pytest.mark.parametrize("scheme", ["dca", "grn_v3", "grn_v2", "grn_v1"])
def test_without_checkpointing_k_dca_keeps_what_full_dca_does(last_k, scheme):
    full = kept_storages(build(DCAModel, residual_scheme=scheme))
    assert sum(kept_storages(build(DCAModel, residual_scheme=scheme, last_k=last_k))) == sum(full)


def gradients(model, autocast=False, passes=1):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    for number in range(passes):
        loss.backward(retain_graph=number + 1 < passes)
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("last_k", [1, 2, 5])
@pytest.mark.parametrize(
    ("options", "enable"),
    [
        ({}, None),
        ({}, CHECKPOINTING),
        ({}, {"use_reentrant": True}),
        ({"autocast": True}, None),
        ({"autocast": True}, CHECKPOINTING),
        ({"passes": 2}, None),
        ({"passes": 2}, CHECKPOINTING),
    ],
)
def test_gradients_are_those_with_the_sums_kept_to_the_last_bit(last_k, options, enable, monkeypatch):
    results = []
    for hooks in (sums.hooks_on_what_is_saved, None):
        monkeypatch.setattr(sums, "hooks_on_what_is_saved", hooks)
        model = build(layers=20, last_k=last_k)
        if enable is not None:
            model.gradient_checkpointing_enable(enable)
        results.append(gradients(model, **options))
    assert all(map(torch.equal, *results))


def test_gradients_of_gradients_go_through_the_sums(monkeypatch):
    results = []
    for hooks in (sums.hooks_on_what_is_saved, None):
        monkeypatch.setattr(sums, "hooks_on_what_is_saved", hooks)
        model = build(layers=6, last_k=1).double()
        model.set_attn_implementation("eager")
        parameters = list(model.parameters())
        loss = model(input_ids=tokens(), labels=tokens()).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters))
    for grad, expected in zip(*results):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_a_sum_is_made_again_in_the_order_of_push_and_each_part_of_it_twice_at_most(monkeypatch):
    outputs = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(60)]
    stack, merged = (torch.randn(3, WIDTH),), []
    for output in outputs:
        stack = push(stack, output, 4)
        stack[1]._merged_sum = note = sums.take_sum(stack)  # as a block's residual does
        merged.append(stack[1])
    assert len(note.entries) == 58
    added = []
    number_of_sum = torch.Tensor.__add__
    monkeypatch.setattr(torch.Tensor, "__add__", lambda *x: added.append(1) or number_of_sum(*x))
    with torch.no_grad():
        for count in range(58, 1, -1):
            for _ in range(2):
                assert torch.equal(note.again(note.entries[:count]), merged[count + 1])
            assert len(note.made) <= 58 // sums.EVERY + 1 + sums.EVERY
    assert len(added) <= 2 * 58


def test_two_sums_that_go_on_from_one_are_told_apart():
    stack = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(3)]
    stack = push(stack, torch.randn(3, WIDTH, requires_grad=True), 3)
    stack[1]._merged_sum = sums.take_sum(stack)
    ways = [push((*stack[:2], torch.randn(3, WIDTH, requires_grad=True)), stack[2], 3) for _ in range(2)]
    with torch.no_grad():
        for way, note in [(way, sums_of(way)) for way in ways]:
            assert len(note.entries) == 3 and torch.equal(note.again(note.entries), way[1])


def sums_of(stack):
    with torch.enable_grad():
        return sums.take_sum(stack)


def test_nothing_is_held_where_nothing_is_differentiated():
    model = build(DCAModel, last_k=1)
    stack = [torch.randn(3, WIDTH) for _ in range(3)]
    assert not hasattr(push(stack, torch.randn(3, WIDTH), 3)[1].untyped_storage(), "_merged_sum")
    noted = []
    model.layers[-1].register_forward_hook(
        lambda module, inputs, outputs: noted.append(hasattr(outputs[1].untyped_storage(), "_merged_sum"))
    )
    with torch.no_grad():
        model(tokens())
    model(tokens())
    assert noted == [False, True]


@pytest.mark.parametrize("enable", [None, CHECKPOINTING])
def test_blocks_may_go_on_from_one_stack_in_several_ways(enable, monkeypatch):
    results = []
    for hooks in (sums.hooks_on_what_is_saved, None):
        monkeypatch.setattr(sums, "hooks_on_what_is_saved", hooks)
        model = build(DCAModel, 12, last_k=1, position_embedding="none")
        if enable is not None:
            model.gradient_checkpointing_enable(enable)
        stack, loss = (model.embed_tokens(tokens()),), 0
        for layer in model.layers[:6]:
            stack = layer(*stack)
        for ways in (model.layers[6:9], model.layers[9:]):
            on = stack
            for layer in ways:
                on = layer(*on)
            loss = loss + on[-1].square().sum()
        results.append(torch.autograd.grad(loss, list(model.layers[:6].parameters())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("enable", [None, CHECKPOINTING])
def test_an_entry_that_a_hook_changes_is_kept_as_it_is(enable, monkeypatch):
    results = []
    for hooks in (sums.hooks_on_what_is_saved, None):
        monkeypatch.setattr(sums, "hooks_on_what_is_saved", hooks)
        model = build(layers=8, last_k=1)
        if enable is not None:
            model.gradient_checkpointing_enable(enable)
        model.model.layers[4].register_forward_hook(lambda module, x, stack: (stack[0], 2 * stack[1], *stack[2:]))
        model.model.layers[6].register_forward_pre_hook(lambda module, stack: (stack[0], stack[1], 3 * stack[2]))
        # (Within a block, so within what is checkpointed.)
        model.model.layers[5].residual.register_forward_hook(
            lambda module, stack, results: (*results[:-1], (results[-1][0], 2 * results[-1][1], *results[-1][2:]))
        )
        results.append(gradients(model))
    assert all(map(torch.equal, *results))


def test_an_entry_that_is_changed_in_place_is_no_sum_any_more():
    def pushed():
        entries = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(4)]
        return push(entries[:3], entries[3], 3)

    stack = pushed()
    assert len(sums.take_sum(stack).entries) == 2
    stack = pushed()
    with torch.no_grad():
        stack[1].mul_(2)
    assert sums.take_sum(stack) is None
    stack = pushed()
    assert sums.take_sum([stack[0], stack[1].reshape(WIDTH, 3), stack[2]]) is None


@pytest.mark.parametrize("enable", [None, CHECKPOINTING])
def test_who_holds_an_entry_holds_no_graph(enable):
    model = build(DCAModel, layers=8, last_k=1)
    if enable is not None:
        model.gradient_checkpointing_enable(enable)
    held, outputs = [], []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, stack: held.extend(entry.detach() for entry in stack[1:2]))
    model.layers[2].register_forward_hook(lambda module, inputs, stack: outputs.append(weakref.ref(stack[-1])))
    model(tokens(), use_cache=False).last_hidden_state.sum().backward()
    gc.collect()
    assert outputs[0]() is None
    assert not any(hasattr(entry.untyped_storage(), "_merged_sum") for entry in held)


def test_an_output_that_is_changed_in_place_is_an_error():
    model = build(DCAModel, layers=8, last_k=1)
    outputs = []
    model.layers[0].register_forward_hook(lambda module, inputs, stack: outputs.append(stack[-1]))
    loss = model(tokens()).last_hidden_state.sum()
    with torch.no_grad():
        outputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("around", ["checkpointing", "each block", "all"])
def test_what_is_kept_on_the_cpu_is_kept_once_a_block(around):
    """There each tensor is copied anew whenever it is kept: sums are the lesser evil."""
    model = build(DCAModel, layers=12, last_k=1)
    expected = gradients_of_base(model)
    packed, save = [], save_on_cpu.__init__

    class Counted(save_on_cpu):
        def __init__(self):
            save(self)
            pack = self.pack_hook
            # (As torch's own, it lies in torch.)
            self.pack_hook = lambda tensor: packed.append(tensor.numel() * 4 == ENTRY_BYTES) or pack(tensor)
            self.pack_hook.__module__ = pack.__module__

    if around == "each block":
        for layer in model.layers:
            layer.forward = in_checkpoint(layer.forward)
    elif around == "checkpointing":
        model.gradient_checkpointing_enable(CHECKPOINTING)
    with Counted():
        result = model(tokens(), use_cache=False).last_hidden_state
    result.sum().backward()
    for parameter, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)
    if around != "all":
        assert sum(packed) <= 3 * 12 + 5


def in_checkpoint(forward):
    return lambda *stack, **kwargs: checkpoint(forward, *stack, use_reentrant=False, **kwargs)


def gradients_of_base(model):
    model(tokens(), use_cache=False).last_hidden_state.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False, "context_fn": lambda: (nullcontext(), nullcontext())}, {}],
)
def test_other_checkpointing_is_left_as_it_is(options):
    keep = partial(checkpoint, **options) if options else checkpoint
    assert sums.without_sums(keep) is keep
