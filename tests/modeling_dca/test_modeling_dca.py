"""Language models: the maths of the whole model, what transformers does with it, and the trip through the Hub."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.utils.output_capturing
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from functorch.compile import make_boxed_func
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from reference_dca import causal_lm_logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

import modeling_dca
from modeling_dca import (
    ALL_GRN_FUNCTIONS,
    DCAConfig,
    DCAForCausalLM,
    DCAForImageClassification,
    DCAForQuestionAnswering,
    DCAForSequenceClassification,
    DCAForTokenClassification,
    DCAModel,
    DCAVisionBackbone,
    DCAVisionConfig,
    DCAVisionModel,
    generalized_residual,
)
from modeling_dca.configuration_dca import RESIDUAL_SCHEMES
from modeling_dca.modeling_dca import CACHE_NAME


#: Every scheme with every kind of stack, as fields of the configuration.
LEARNED_SCHEMES = [
    {"residual_scheme": scheme, "last_k": last_k}
    for scheme in ("grn_v1", "grn_v2", "grn_v3", "dca")
    for last_k in (None, 1, 2)
]
ALL_SCHEMES = [{"residual_scheme": "standard"}, *LEARNED_SCHEMES]
#: Fewer, where a test is about something else: the plain sum, all entries, and a stack with a merged entry.
SOME_SCHEMES = [{"residual_scheme": "standard"}, {"residual_scheme": "dca"}, {"residual_scheme": "dca", "last_k": 1}]

LLAMA = {"gated_mlp": True, "hidden_act": "silu"}
LAYER_NORM = {"norm_type": "layer_norm", "norm_eps": 1e-3}

VOCABULARY = 50

HEADS = {
    DCAModel: AutoModel,
    DCAForCausalLM: AutoModelForCausalLM,
    DCAForSequenceClassification: AutoModelForSequenceClassification,
    DCAForTokenClassification: AutoModelForTokenClassification,
    DCAForQuestionAnswering: AutoModelForQuestionAnswering,
}
VISION_HEADS = {DCAVisionModel: AutoModel, DCAForImageClassification: AutoModelForImageClassification}


def name_of(value):
    return "-".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)


def tiny_config(**fields):
    # Two entries are merged in the stack of the output for `last_k=2`, and three for `last_k=1`.
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return DCAConfig(**(sizes | heads | fields))


@torch.no_grad()
def randomize(model, seed=0):
    """
    Weights of a size that makes every part matter: linear maps that keep the scale, and residual parameters, norms and
    biases away from where they start.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif "embed" in name:
            parameter.copy_(noise)
        elif parameter.ndim >= 2 and not name.endswith(("delta", "gate")):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)
    return model.eval()


def tiny_model(model_class=DCAForCausalLM, dtype=torch.float32, seed=0, **fields):
    return randomize(model_class(tiny_config(**fields)).to(dtype), seed)


def random_ids(*shape, seed=0, low=0):
    return torch.randint(low, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(result, expected, tolerance):
    """Within `tolerance` of the largest expected value: what a sum of many terms can be held to."""
    result, expected = torch.as_tensor(result).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def standard_weights(model):
    """The weights of a standard model, for any scheme: keys and values get the norm that the three shared."""
    weights = dict(model.state_dict())
    for name in list(weights):
        if ".input_layernorm." in name:
            weights[name.replace("input_layernorm", "key_layernorm")] = weights[name]
            weights[name.replace("input_layernorm", "value_layernorm")] = weights[name]
    return weights


def load_standard_weights(model, standard):
    loading = model.load_state_dict(standard_weights(standard), strict=False)
    assert all(name.endswith((".delta", ".gate")) for name in loading.missing_keys)
    assert model.config.residual_scheme == "dca" or all("layernorm" in name for name in loading.unexpected_keys)
    return model.eval()


# The maths


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_logits_equal_the_slow_rendering(scheme):
    # In this architecture nothing is computed in less than float64.
    model = tiny_model(
        dtype=torch.float64, position_embedding="learned", attention_bias=True, mlp_bias=True, **LAYER_NORM, **scheme
    )
    input_ids = random_ids(2, 7)
    assert_close(model(input_ids).logits, causal_lm_logits(model, input_ids), 1e-12)


ARCHITECTURES = {
    "paper": {"num_key_value_heads": 4},
    "llama": LLAMA,
    "qk_norm": {"qk_norm": True, "head_dim": 6, **LLAMA},
    "qk_layer_norm": {"qk_norm": True, **LAYER_NORM},
    "one_key_value_head": {"num_key_value_heads": 1},
    "learned": {"position_embedding": "learned"},
    "sincos": {"position_embedding": "sincos"},
    "no_positions": {"position_embedding": "none", "attention_bias": True, "mlp_bias": True},
    "large_epsilon": {"norm_eps": 0.1},
    "partial_rope": {"head_dim": 8, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "sliding": {"sliding_window": 3},
    "sliding_and_full": {
        "sliding_window": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "tied": {"tie_word_embeddings": True},
    "sandwich": {"norm_placement": "sandwich", **LLAMA},
    "post_module": {"norm_placement": "post_module", "qk_norm": "all_heads", "num_key_value_heads": 2},
    "parallel": {"parallel_blocks": True, "lm_head_bias": True, **LAYER_NORM},
    "parallel_sandwich": {"parallel_blocks": True, "norm_placement": "sandwich"},
    "scales": {"attention_scaling": 0.3, "logit_multiplier": 0.2, "logit_softcap": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_slow_rendering_in_every_architecture(architecture, attn_implementation):
    fields = ARCHITECTURES[architecture]
    if "rope_parameters" in fields:
        fields = fields | {"rope_parameters": {"rope_type": "default", **fields["rope_parameters"]}}
    model = tiny_model(last_k=2, attn_implementation=attn_implementation, **fields)
    input_ids = random_ids(2, 9)
    # Transformers computes RMS norms, softmax and positions in float32 in any model.
    assert_close(model(input_ids).logits, causal_lm_logits(model, input_ids), 1e-5)


@pytest.mark.parametrize("placement", ["sandwich", "post_module"])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_norms_after_the_modules_in_every_scheme(scheme, placement):
    model = tiny_model(norm_placement=placement, parallel_blocks=placement == "sandwich", **scheme)
    input_ids = random_ids(2, 7)
    assert_close(model(input_ids).logits, causal_lm_logits(model, input_ids), 1e-5)
    model.train()(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_soft_capped_attention():
    model = tiny_model(attention_softcap=0.7, logit_softcap=2.0)
    assert model.config._attn_implementation == "eager"
    input_ids = random_ids(2, 7)
    assert_close(model(input_ids).logits, causal_lm_logits(model, input_ids), 1e-5)
    capped = model(input_ids).logits
    for layer in model.model.layers:
        layer.self_attn.softcap = {}
    assert (model(input_ids).logits - capped).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`attention_softcap` is 0.7, which the attention 'sdpa' does not support"):
        tiny_model(attention_softcap=0.7, attn_implementation="sdpa")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("scheme", LEARNED_SCHEMES, ids=name_of)
def test_fresh_model_equals_the_standard_one(scheme, dtype, tolerance):
    standard = tiny_model(dtype=dtype, residual_scheme="standard")
    model = load_standard_weights(DCAForCausalLM(tiny_config(**scheme)).to(dtype), standard)
    input_ids = random_ids(2, 11)
    expected, result = standard(input_ids, output_hidden_states=True), model(input_ids, output_hidden_states=True)
    assert_close(result.logits, expected.logits, tolerance)
    for hidden_states, expected_hidden_states in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert_close(hidden_states, expected_hidden_states, tolerance)


def fresh_model_and_llama(dtype, **scheme):
    model = DCAForCausalLM(tiny_config(**LLAMA, **scheme)).to(dtype)
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    same += ["num_key_value_heads"]
    llama_config = LlamaConfig(**{name: getattr(model.config, name) for name in same})
    llama = randomize(LlamaForCausalLM(llama_config).to(dtype))
    return load_standard_weights(model, llama), llama


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_fresh_model_equals_llama(scheme, dtype, tolerance):
    model, llama = fresh_model_and_llama(dtype, **scheme)
    input_ids = random_ids(2, 11)
    expected, result = llama(input_ids, output_hidden_states=True), model(input_ids, output_hidden_states=True)
    assert_close(result.logits, expected.logits, tolerance)
    for hidden_states, expected_hidden_states in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert_close(hidden_states, expected_hidden_states, tolerance)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 6}], ids=str)
def test_standard_model_has_the_weights_of_llama(fields):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    fields = sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | fields
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    model = DCAForCausalLM(DCAConfig(residual_scheme="standard", **LLAMA, **fields))
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in llama.state_dict().items()}


@pytest.mark.parametrize("mlp_bias", [True, False])
def test_feed_forward_module_without_gating_has_two_maps(mlp_bias):
    mlp = DCAModel(tiny_config(mlp_bias=mlp_bias)).layers[0].mlp
    expected = {"up_proj.weight": (24, 16), "down_proj.weight": (16, 24)}
    if mlp_bias:
        expected |= {"up_proj.bias": (24,), "down_proj.bias": (16,)}
    assert {name: tuple(weight.shape) for name, weight in mlp.state_dict().items()} == expected


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_residual_parameters(scheme):
    model = DCAForCausalLM(tiny_config(**scheme))
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert name in weights
    prefixes = [f"model.layers.{layer}.residual" for layer in range(5)] + ["model.residual"]
    expected = {}
    if scheme["residual_scheme"] != "standard":
        for t, prefix in enumerate(prefixes, start=1):
            # The output has one residual, whatever the scheme; blocks of DCA have three.
            outputs = 3 if scheme["residual_scheme"] == "dca" and prefix != "model.residual" else 1
            entries = t if scheme["last_k"] is None else min(t, scheme["last_k"] + 2)
            expected[f"{prefix}.delta"] = (outputs, entries, 1 if scheme["residual_scheme"] == "grn_v1" else 16)
            if scheme["residual_scheme"] in ("grn_v3", "dca"):
                expected[f"{prefix}.gate"] = (outputs, 16)
    residual = {name: weight for name, weight in weights.items() if ".residual." in name}
    assert {name: tuple(weight.shape) for name, weight in residual.items()} == expected
    assert all((weight == 0).all() for weight in residual.values())
    # Only where their inputs differ do keys and values have norms of their own.
    has_norms = "model.layers.0.key_layernorm.weight" in weights, "model.layers.4.value_layernorm.weight" in weights
    assert has_norms == (scheme["residual_scheme"] == "dca",) * 2


@pytest.mark.parametrize("scheme", LEARNED_SCHEMES, ids=name_of)
def test_one_step_moves_every_residual_parameter(scheme):
    torch.manual_seed(0)
    model = DCAForCausalLM(tiny_config(**scheme))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    input_ids = random_ids(4, 16)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    residual = {name: parameter for name, parameter in model.named_parameters() if ".residual." in name}
    assert len(residual) == 6 * (2 if scheme["residual_scheme"] in ("grn_v3", "dca") else 1)
    assert [name for name, parameter in residual.items() if not (parameter != 0).all()] == []


def record(modules, inputs=False):
    """Collects the first of the tensors that each of the modules returns, or its first input, from now on."""
    recorded = []

    def record_output(module, args, output):
        recorded.append(output[0] if isinstance(output, tuple) else output)

    for module in modules:
        if inputs:
            module.register_forward_pre_hook(lambda module, args: recorded.append(args[0]))
        else:
            module.register_forward_hook(record_output)
    return recorded


@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_a_hook_on_a_block_sees_the_residual_stream_or_the_newest_output_last(scheme):
    model, llama = fresh_model_and_llama(torch.float64, **scheme)
    before, after = record(llama.model.layers, inputs=True), record(llama.model.layers)
    stacks = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, stack: stacks.append(stack))
    stream = record([model.model.norm], inputs=True)
    model(random_ids(2, 6))
    llama(random_ids(2, 6))
    for t, (stack, llama_before, llama_after) in enumerate(zip(stacks, before, after, strict=True), start=1):
        if scheme["residual_scheme"] == "standard":
            assert isinstance(stack, torch.Tensor)  # as Llama's layers return it
            assert_close(stack, llama_after, 1e-10)
        else:
            assert isinstance(stack, tuple) and len(stack) == (
                t + 1 if scheme.get("last_k") is None else min(t + 1, 3)
            )
            assert_close(stack[-1], llama_after - llama_before, 1e-10)
            assert_close(sum(stack), llama_after, 1e-10)
    assert_close(stream[0], sum(stacks[-1]) if isinstance(stacks[-1], tuple) else stacks[-1], 1e-14)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_what_a_block_adds_holds_no_copy_of_its_input(scheme):
    model = tiny_model(DCAModel, **scheme)
    for layer in model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, stack, later: calls.append((stack, later)))
    model(random_ids(2, 6))
    assert len(calls) == 5
    for stack, later in calls:
        if scheme["residual_scheme"] == "standard":
            assert torch.equal(later, stack[0])
        else:
            assert (later[-1] == 0).all() and torch.equal(later[0], stack[0])


class Steered:
    """
    Adds a vector at a place of block 2, by a hook or by what does the same without one: hooks of a block are called with
    what it returns, and what they return takes its place.
    """

    PLACES = ("layer", "layer, in place", "residual", "self_attn")

    def __init__(self, place, scheme, **options):
        self.model = tiny_model(dtype=torch.float64, mlp_bias=True, attention_bias=True, **scheme).train()
        self.block, self.place = self.model.model.layers[2], place
        self.vector = torch.linspace(-1, 1, 16, dtype=torch.float64).requires_grad_()
        if options:
            self.model.gradient_checkpointing_enable(options)

    def by_hook(self):
        def steer_layer(module, args, stack):
            return stack + self.vector if isinstance(stack, torch.Tensor) else (*stack[:-1], stack[-1] + self.vector)

        def steer_in_place(module, args, stack):
            (stack if isinstance(stack, torch.Tensor) else stack[-1]).add_(self.vector)

        def steer_first(module, args, outputs):
            return outputs[0] + self.vector, *outputs[1:]

        module = self.block if self.place.startswith("layer") else getattr(self.block, self.place)
        hook = {"layer": steer_layer, "layer, in place": steer_in_place}.get(self.place, steer_first)
        module.register_forward_hook(hook)
        return self

    def without(self):
        if self.place == "residual":  # the queries' input, which the feed-forward module takes, too
            for norm in (self.block.input_layernorm, self.block.post_attention_layernorm):
                norm.register_forward_pre_hook(lambda module, args: (args[0] + self.vector,))
        else:
            linear = self.block.self_attn.o_proj if self.place == "self_attn" else self.block.mlp.down_proj
            linear.register_forward_hook(lambda module, args, output: output + self.vector)
        return self

    def results(self):
        input_ids = random_ids(2, 6)
        outputs = self.model(input_ids, labels=input_ids, use_cache=False)
        outputs.loss.backward()
        return outputs.logits, self.vector.grad, *(parameter.grad for parameter in self.model.parameters())


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=name_of)
@pytest.mark.parametrize("place", Steered.PLACES)
@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_hooks_that_write_are_heard_and_have_gradients(scheme, place, options):
    plain = tiny_model(dtype=torch.float64, mlp_bias=True, attention_bias=True, **scheme).train()
    expected = Steered(place, scheme).without().results()
    assert not torch.allclose(plain(random_ids(2, 6)).logits, expected[0], atol=1e-3)
    results = Steered(place, scheme, **options).by_hook().results()
    for name, result, value in zip(
        ["logits", "vector", *dict(plain.named_parameters())], results, expected, strict=True
    ):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_the_stack_follows_the_blocks_to_another_device(scheme):
    # As `device_map` does it: a hook on a block brings what comes in to the block's device.
    model = DCAModel(tiny_config(**scheme))
    stacks = []
    for module in (*model.layers[2:], model.residual, model.norm):
        add_hook_to_module(module.to("meta"), AlignDevicesHook("meta"))
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, stack: stacks.append(stack))
    assert model(random_ids(2, 6), use_cache=False).last_hidden_state.is_meta
    for t, stack in enumerate(stacks):
        entries = stack if isinstance(stack, tuple) else (stack,)
        assert [entry.is_meta for entry in entries] == [t >= 2] * len(entries)


def test_grn_implementation_names_the_function_that_is_used():
    calls = []

    def counted(*args):
        calls.append(args)
        return generalized_residual(*args)

    ALL_GRN_FUNCTIONS["counted"] = counted
    try:
        model = tiny_model(grn_implementation="counted")
        expected = tiny_model(grn_implementation="eager")(random_ids(1, 5)).logits
        assert torch.equal(model(random_ids(1, 5)).logits, expected)
    finally:
        del ALL_GRN_FUNCTIONS["counted"]
    assert [len(args[0]) for args in calls] == [1, 2, 3, 4, 5, 6]


def test_missing_residual_parameters_start_at_zero(tmp_path):
    # Loading fills new parameters from uninitialized memory, unless `_init_weights` knows them.
    tiny_model(residual_scheme="standard").save_pretrained(tmp_path)
    model = DCAForCausalLM.from_pretrained(tmp_path, residual_scheme="dca", last_k=2)
    residual = [parameter for name, parameter in model.named_parameters() if ".residual." in name]
    assert len(residual) == 12 and all((parameter == 0).all() for parameter in residual)
    norms = [parameter for name, parameter in model.named_parameters() if "key_layernorm" in name]
    assert len(norms) == 5 and all((parameter == 1).all() for parameter in norms)


def test_initial_weights():
    torch.manual_seed(0)
    model = DCAForCausalLM(tiny_config(hidden_size=32, initializer_range=0.5, attention_bias=True, **LAYER_NORM))
    for name, parameter in model.named_parameters():
        if name.endswith(("delta", "gate", "bias")):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            # A standard deviation over n numbers is known to about 1 / sqrt(2 n); this is four times that.
            assert abs(parameter.std() / 0.5 - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


# Inputs


@pytest.mark.parametrize("position_embedding", ["rope", "learned", "sincos", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_padding_changes_nothing(side, position_embedding, attn_implementation):
    model = tiny_model(last_k=1, position_embedding=position_embedding, attn_implementation=attn_implementation)
    short, long = random_ids(1, 4), random_ids(1, 7, seed=1)
    padding = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.ones(2, 7, dtype=torch.long)
    if side == "left":
        batch, real = torch.cat((torch.cat((padding, short), 1), long)), slice(3, None)
        mask[0, :3] = 0
    else:
        batch, real = torch.cat((torch.cat((short, padding), 1), long)), slice(None, 4)
        mask[0, 4:] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
    assert_close(logits[:1, real], model(short).logits, 1e-5)
    assert_close(logits[1:], model(long).logits, 1e-5)
    visible = (mask[:, None, :] == 1).numpy()
    expected = causal_lm_logits(model, batch, position_ids, visible)
    assert_close(logits[mask == 1], expected[mask.numpy() == 1], 1e-5)
    # Without the mask, tokens see the padding before them.
    if side == "left":
        unmasked = model(batch, position_ids=position_ids, attention_mask=torch.ones_like(mask)).logits
        assert (unmasked[:1, real] - logits[:1, real]).abs().max() > 1e-2


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [{}, {"position_embedding": "learned"}, {"sliding_window": 2}], ids=name_of)
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_sequences_do_not_see_each_other(fields, attn_implementation, use_cache):
    model = tiny_model(last_k=1, attn_implementation=attn_implementation, **fields)
    parts = [random_ids(1, 3), random_ids(1, 5, seed=1), random_ids(1, 1, seed=2)]
    position_ids = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    logits = model(torch.cat(parts, 1), position_ids=position_ids, use_cache=use_cache).logits
    assert_close(logits, torch.cat([model(part).logits for part in parts], 1), 1e-5)
    segment = np.repeat([0, 1, 2], [3, 5, 1])
    visible = (segment[:, None] == segment[None])[None]
    assert_close(logits, causal_lm_logits(model, torch.cat(parts, 1), position_ids, visible), 1e-5)


def test_sliding_window_hides_what_is_before_it():
    # One layer, so that what a token sees is not passed on by those between.
    fields = {"num_hidden_layers": 1, "position_embedding": "none"}
    full, sliding = tiny_model(**fields), tiny_model(sliding_window=4, **fields)
    input_ids = random_ids(1, 12)
    changed = input_ids.clone()
    changed[0, 0] = (input_ids[0, 0] + 1) % VOCABULARY
    difference = (sliding(input_ids).logits - sliding(changed).logits).abs().amax(-1)[0]
    assert (difference[:4] > 1e-4).all() and (difference[4:] == 0).all()
    assert ((full(input_ids).logits - full(changed).logits).abs().amax(-1)[0] > 1e-4).all()
    assert_close(sliding(input_ids).logits[:, :4], full(input_ids).logits[:, :4], 1e-6)


def test_model_is_causal():
    model = tiny_model()
    input_ids = random_ids(1, 8)
    changed = input_ids.clone()
    changed[0, 5] = (input_ids[0, 5] + 1) % VOCABULARY
    difference = (model(input_ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[:5] == 0).all() and (difference[5:] > 1e-4).all()


def test_learned_positions_end():
    model = tiny_model(position_embedding="learned", max_position_embeddings=8)
    model(random_ids(1, 8))
    with pytest.raises(ValueError, match="9 tokens.*`max_position_embeddings` = 8"):
        model(random_ids(1, 9))


def test_learned_positions_end_while_decoding_too():
    # Each step is short, but its positions are not: an index out of range would be read from elsewhere on a GPU.
    model = tiny_model(position_embedding="learned", max_position_embeddings=8)
    cache = getattr(model(random_ids(1, 8)), CACHE_NAME)
    with pytest.raises((ValueError, IndexError)):
        model(random_ids(1, 1), cache=cache)


def test_inputs_embeds_are_what_input_ids_become():
    model = tiny_model()
    input_ids = random_ids(2, 5)
    logits = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
    assert torch.equal(logits, model(input_ids).logits)
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": torch.zeros(2, 5, 16)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)


# Caches and generation

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}
DECODED = [*SOME_SCHEMES, {"sliding_window": 3}, {"sliding_window": 3, "last_k": 1}, {"position_embedding": "learned"}]


@pytest.mark.parametrize("steps", [[5, 1, 1, 1, 1, 1, 1], [1, 6, 4], [11]], ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("fields", DECODED, ids=name_of)
def test_cached_decoding_equals_uncached(fields, cache, steps):
    model = tiny_model(**fields)
    input_ids = random_ids(2, 11)
    expected = model(input_ids, use_cache=False)
    assert getattr(expected, CACHE_NAME) is None
    cache = CACHES[cache](model)
    logits = [model(part, cache=cache).logits for part in input_ids.split(steps, dim=1)]
    assert_close(torch.cat(logits, 1), expected.logits, 1e-5)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model_class", HEADS)
def test_models_take_the_cache_by_either_name(model_class, name, recwarn):
    model = tiny_model(model_class, pad_token_id=0)
    input_ids = random_ids(2, 7, low=1)
    whole, cache = model(input_ids, use_cache=False), DynamicCache(config=model.config)
    model(input_ids[:, :4], **{name: cache})
    assert cache.get_seq_length() == 4
    outputs = model(input_ids[:, 4:], **{name: cache})
    assert cache.get_seq_length() == 7
    if "past_key_values" in outputs:  # (all but the heads of tokens and answers)
        assert getattr(outputs, CACHE_NAME) is cache
    per_token = model_class is not DCAForSequenceClassification
    assert_close(outputs[0], whole[0][:, 4:] if per_token else whole[0], 1e-5)
    # The other name may come along, but say nothing: some callers hand on all that they may have been given.
    other = {"cache": "past_key_values", "past_key_values": "cache"}[name]
    model(input_ids[:, :1], **{name: cache, other: None})
    assert cache.get_seq_length() == 8
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are names"):
        model(input_ids[:, :1], **{name: cache, other: DynamicCache(config=model.config)})
    assert cache.get_seq_length() == 8
    # Who uses the old name is told so where transformers does; nobody is told of what the models do among themselves.
    told = {str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)}
    old = name == "past_key_values" and CACHE_NAME == "cache"
    assert told == (
        {"`past_key_values` is deprecated: `cache` is its name since transformers 5.24."} if old else set()
    )


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_blocks_and_attention_take_the_cache_by_either_name(name):
    model, hidden_states = tiny_model(DCAModel), torch.randn(1, 3, 16)
    cache = DynamicCache(config=model.config)
    layer, positions = model.layers[0], torch.arange(3)[None]
    rotations = model.rotary_emb(hidden_states, positions)
    layer(hidden_states, position_embeddings=rotations, **{name: cache})
    assert cache.get_seq_length() == 3
    layer.self_attn(*[hidden_states] * 3, position_embeddings=rotations, **{name: cache})
    assert cache.get_seq_length() == 6


def test_evaluation_leaves_the_cache_where_it_is():
    # The Trainer collects all outputs but those that the configuration names.
    outputs = tiny_model()(random_ids(1, 3), use_cache=True)
    assert set(outputs) - set(DCAConfig.keys_to_ignore_at_inference) == {"logits"}


def inputs_of(model_class):
    """A model, and what it takes."""
    if model_class in VISION_HEADS:
        fields = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3}
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = randomize(model_class(DCAVisionConfig(**sizes, **fields)))
        return model, {"pixel_values": torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))}
    return tiny_model(model_class, pad_token_id=0), {"input_ids": random_ids(2, 5, low=1)}


@pytest.mark.parametrize("model_class", [*HEADS, *VISION_HEADS])
def test_what_no_parameter_takes_is_refused(model_class):
    model, inputs = inputs_of(model_class)
    tensor = torch.ones(2, 5, dtype=torch.long)
    state = {
        "past_key_value": DynamicCache(),
        "cache_params": DynamicCache(),
        "layer_past": [tensor],
        "mems": {"a": 1},
    }
    tensors = (
        "token_type_ids",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "head_mask",
        "inputs_embed",
        "label",
    )
    options = {"output_hidden_state": True, "softcap": 3.0, "kwargs": {"cache": DynamicCache()}, "dropout_p": 0.5}
    for name, value in [*state.items(), *((name, tensor) for name in tensors), *options.items()]:
        with pytest.raises(TypeError, match=rf"takes no `{name}`; .*[a-z]"):
            model(**inputs, **{name: value})
        # What is not there cannot be lost.
        model(**inputs, **{name: None})
    if model_class is not DCAForCausalLM:
        for name in ("shift_labels", "logits_to_keep"):
            with pytest.raises(TypeError, match=f"takes no `{name}`"):
                model(**inputs, **{name: tensor})
    if model_class in VISION_HEADS:
        for name, value in {
            "cache": DynamicCache(),
            "past_key_values": DynamicCache(),
            "position_ids": tensor,
        }.items():
            with pytest.raises(TypeError, match=f"takes no `{name}`"):
                model(**inputs, **{name: value})
        return
    for name in ("cache", "past_key_values"):
        for value in ((), [(tensor, tensor)], {}, tensor):
            with pytest.raises(TypeError, match=f"`{name}` is a .*DynamicCache"):
                model(**inputs, **{name: value})


def test_refusals_say_what_would_be_right():
    model, input_ids = tiny_model(), random_ids(1, 4)
    with pytest.raises(TypeError, match="did you mean 'labels'?"):
        model(input_ids, label=input_ids)
    with pytest.raises(TypeError, match="`return_token_type_ids=False`"):
        model(input_ids, token_type_ids=torch.zeros_like(input_ids))


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_blocks_and_attention_refuse_what_they_do_not_take(part):
    layer, hidden_states = tiny_model(DCAModel).layers[0], torch.randn(1, 3, 16)
    call = layer if part == "layer" else lambda hidden, **kwargs: layer.self_attn(hidden, hidden, hidden, **kwargs)
    call(hidden_states, use_cache=False, position_ids=torch.arange(3)[None])
    with pytest.raises(TypeError, match="takes no `past_key_value`; Known: .*cache"):
        call(hidden_states, past_key_value=DynamicCache())


@pytest.mark.parametrize("model_class", [*HEADS, *VISION_HEADS])
def test_what_transformers_passes_to_any_model_is_taken(model_class):
    model, inputs = inputs_of(model_class)
    common = {"num_items_in_batch": 3, "output_attentions": False, "output_hidden_states": True, "return_dict": False}
    outputs = model(**inputs, **common, is_causal=model_class in HEADS)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], model(**inputs)[0])
    if model_class in HEADS:
        lengths = torch.tensor([0, 5], dtype=torch.int32)
        packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
        positions = torch.arange(5).expand(2, 5)
        torch.testing.assert_close(model(**inputs, **packed, position_ids=positions)[0], model(**inputs)[0])
        for name in ("cu_seq_lens_q", "seq_idx"):
            with pytest.raises(ValueError, match=f"`{name}` is given without `position_ids`"):
                model(**inputs, **{name: lengths})


def test_the_loss_gets_what_it_takes():
    model, input_ids = tiny_model(), random_ids(2, 6)
    shifted = torch.cat((input_ids[:, 1:], input_ids[:, :1]), 1)
    logits = model(input_ids).logits.flatten(0, 1)
    for kwargs in ({"shift_labels": shifted}, {"shift_labels": shifted, "ignore_index": int(shifted[0, 0])}):
        loss = model(input_ids, labels=input_ids, **kwargs).loss
        expected = nn.functional.cross_entropy(
            logits, shifted.flatten(), ignore_index=kwargs.get("ignore_index", -100)
        )
        torch.testing.assert_close(loss, expected)
    model.loss_function = lambda logits, labels, vocab_size, factor=1.0, **kwargs: factor * logits.sum()
    assert model(input_ids, labels=input_ids, factor=2.0).loss == 2 * model(input_ids, labels=input_ids).loss
    with pytest.raises(TypeError, match="takes no `factors`"):
        model(input_ids, labels=input_ids, factors=2.0)


def test_the_attention_function_gets_what_it_takes():
    given = []

    def attention(module, query, key, value, attention_mask, some_option=None, **kwargs):
        given.append(some_option)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("some_attention", attention)
    AttentionMaskInterface.register("some_attention", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, expected = tiny_model(attn_implementation="some_attention"), tiny_model(attn_implementation="sdpa")
    assert_close(model(random_ids(1, 5), some_option=3).logits, expected(random_ids(1, 5)).logits, 1e-6)
    assert given == [3] * 5
    with pytest.raises(TypeError, match="takes no `another_option`"):
        model(random_ids(1, 5), another_option=3)


def test_continuous_batching_equals_greedy():
    model = tiny_model(attn_implementation="sdpa", eos_token_id=VOCABULARY, max_position_embeddings=64)
    prompts = [random_ids(1, 5), random_ids(1, 3, seed=1)]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=VOCABULARY)
    batching = ContinuousBatchingConfig(max_batch_tokens=16, max_memory_percent=0.001)
    outputs = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts], config, batching, progress_bar=False, warmup=False
    )
    tokens = sorted((output.prompt_ids + output.generated_tokens for output in outputs.values()), key=len)
    assert tokens == [*greedy(model, prompts[1]), *greedy(model, prompts[0])]


def generate(model, input_ids, **kwargs):
    tokens = model.generate(input_ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)
    assert tokens.shape == (len(input_ids), input_ids.shape[1] + 8)
    return tokens.tolist()


def greedy(model, input_ids):
    """Greedy decoding without a cache, by hand."""
    for _ in range(8):
        input_ids = torch.cat((input_ids, model(input_ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return input_ids.tolist()


GENERATED = [
    {},
    {"last_k": 1},
    {"residual_scheme": "standard"},
    {"position_embedding": "sincos"},
    {"sliding_window": 3},
]


@pytest.mark.parametrize("fields", GENERATED, ids=name_of)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=name_of,
)
def test_greedy_generation(fields, kwargs):
    model = tiny_model(**fields)
    input_ids = random_ids(2, 5)
    assert generate(model, input_ids, **kwargs) == greedy(model, input_ids)


@pytest.mark.parametrize("fields", GENERATED, ids=name_of)
def test_beam_search_is_the_same_with_and_without_a_cache(fields):
    model = tiny_model(**fields)
    input_ids = random_ids(2, 5)
    cached = generate(model, input_ids, num_beams=3)
    assert cached == generate(model, input_ids, num_beams=3, use_cache=False)
    # Reordering the cache has to be needed for this to be a test.
    assert cached != greedy(model, input_ids)


@pytest.mark.parametrize("fields", GENERATED[:3], ids=name_of)
def test_prompt_lookup_and_assisted_generation_equal_greedy(fields):
    model, assistant = tiny_model(**fields), tiny_model(seed=1, num_hidden_layers=2)
    input_ids = random_ids(1, 3).repeat(1, 3)
    expected = greedy(model, input_ids)
    assert generate(model, input_ids, prompt_lookup_num_tokens=2) == expected
    assert generate(model, input_ids, assistant_model=assistant) == expected
    # An assistant that is always right makes the model take several tokens at a time.
    assert generate(model, input_ids, assistant_model=tiny_model(**fields)) == expected


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("fields", [*GENERATED[:3], {"sliding_window": 3}, {"last_k": 3}], ids=name_of)
def test_early_exit_assists_and_leaves_the_model_as_it_was(fields, blocks):
    model, input_ids = tiny_model(**fields), random_ids(1, 5)
    assert generate(model, input_ids, assistant_early_exit=blocks) == greedy(model, input_ids)
    assert model.config.num_hidden_layers == 5


@pytest.mark.parametrize("position_embedding", ["rope", "learned", "sincos", "none"])
def test_generation_of_a_left_padded_batch(position_embedding):
    model = tiny_model(position_embedding=position_embedding, last_k=1)
    short, long = random_ids(1, 3, low=1), random_ids(1, 6, seed=1, low=1)
    batch = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.long), short), 1), long))
    tokens = generate(model, batch, attention_mask=(batch != 0).long())
    assert [tokens[0][3:], tokens[1]] == [*greedy(model, short), *greedy(model, long)]


# Losses, heads and outputs


@pytest.mark.parametrize("model_class", ["DCAForCausalLM", "PeftModel"])
def test_label_smoothing_of_the_trainer_is_that_of_the_next_token(tmp_path, model_class):
    # The Trainer shifts the labels only of classes whose names it knows.
    model, input_ids = tiny_model(), random_ids(2, 8)
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    if model_class == "PeftModel":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True))
    loss = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    expected = nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten(), label_smoothing=0.1)
    # (The Trainer smooths with the mean over the vocabulary, as torch does.)
    torch.testing.assert_close(loss, expected)


def test_every_table_of_names_that_has_llama_or_vit_has_these_models():
    tables = {name: table for name, table in vars(modeling_auto).items() if re.match("MODEL_.*_NAMES", name)}
    found = {DCAConfig: set(), DCAVisionConfig: set()}
    for config, like, heads in ((DCAConfig, "llama", HEADS), (DCAVisionConfig, "vit", VISION_HEADS)):
        for name, table in tables.items():
            # (There is no head of ours for masked images.)
            if like in table and name != "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES":
                assert table[config.model_type] in {head.__name__ for head in heads}, name
                found[config].add(table[config.model_type])
        assert found[config] == {head.__name__ for head in heads}


def test_pipelines_know_the_models(caplog):
    model = tiny_model(eos_token_id=3, pad_token_id=0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 1, "b": 2, "<eos>": 3}, "a")))
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)("a b", max_new_tokens=2, do_sample=False)
    assert [record.message for record in caplog.records if "not supported" in record.message] == []


def test_labels_give_the_cross_entropy_of_the_next_token():
    model = tiny_model()
    input_ids = random_ids(2, 6)
    labels = input_ids.clone()
    labels[0, :3] = -100
    outputs = model(input_ids, labels=labels)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100])
    torch.testing.assert_close(outputs.loss, expected)
    # With gradient accumulation the Trainer passes the number of tokens of all parts.
    accumulated = model(input_ids, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(accumulated, expected * (targets != -100).sum() / 100)


def test_logits_to_keep():
    model = tiny_model()
    input_ids = random_ids(2, 6)
    logits = model(input_ids).logits
    assert logits.shape == (2, 6, VOCABULARY)
    assert_close(model(input_ids, logits_to_keep=2).logits, logits[:, -2:], 1e-6)
    assert_close(model(input_ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]], 1e-6)


@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
@pytest.mark.parametrize("model_class", [DCAModel, DCAForCausalLM, DCAForTokenClassification])
def test_hidden_states_and_attentions(model_class, scheme):
    model = tiny_model(model_class, attn_implementation="eager", **scheme)
    base = model if model_class is DCAModel else model.model
    query_inputs = record([layer.input_layernorm for layer in base.layers], inputs=True)
    last = record([base.norm])
    outputs = model(random_ids(2, 6), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 6 and len(outputs.attentions) == 5
    for hidden_states, expected in zip(outputs.hidden_states, [*query_inputs, *last], strict=True):
        assert hidden_states.shape == (2, 6, 16) and torch.equal(hidden_states, expected)
    for attentions in outputs.attentions:
        assert attentions.shape == (2, 4, 6, 6)
        torch.testing.assert_close(attentions.sum(-1), torch.ones(2, 4, 6))
        assert (attentions.triu(1) == 0).all()
    assert model(random_ids(2, 6)).hidden_states is None and model(random_ids(2, 6)).attentions is None


@pytest.mark.skipif(
    not hasattr(transformers.utils.output_capturing, "selected_hidden_states"),
    reason="this transformers returns all hidden states or none",
)
@pytest.mark.parametrize("indices", [-1, 3, [1, -2], [-6, 5]], ids=str)
@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_hidden_states_by_index(scheme, indices):
    model = tiny_model(**scheme)
    everything = model(random_ids(2, 6), output_hidden_states=True).hidden_states
    selected = model(random_ids(2, 6), output_hidden_states=indices).hidden_states
    wanted = {index % 6 for index in ([indices] if isinstance(indices, int) else indices)}
    assert (
        len(selected) == 6 and {i for i, hidden_states in enumerate(selected) if hidden_states is not None} == wanted
    )
    assert all(torch.equal(selected[i], everything[i]) for i in wanted)


def test_sequence_classification_reads_the_last_token_that_is_not_padding():
    model = tiny_model(DCAForSequenceClassification, num_labels=3, pad_token_id=0)
    input_ids = random_ids(3, 6, low=1)
    input_ids[0, 4:] = 0
    input_ids[1, :2] = 0
    mask = (input_ids != 0).long()
    labels = torch.tensor([2, 0, 1])
    outputs = model(input_ids, attention_mask=mask, labels=labels)
    hidden_states = model.model(input_ids, attention_mask=mask).last_hidden_state
    expected = model.score(hidden_states[torch.arange(3), [3, 5, 5]])
    assert_close(outputs.logits, expected, 1e-6)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(expected, labels))


def test_token_classification():
    model = tiny_model(DCAForTokenClassification, num_labels=3)
    input_ids, labels = random_ids(2, 6), torch.arange(12).view(2, 6) % 3
    labels[0, 0] = -100
    outputs = model(input_ids, labels=labels)
    assert_close(outputs.logits, model.score(model.model(input_ids).last_hidden_state), 1e-6)
    torch.testing.assert_close(
        outputs.loss, nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    )


def test_question_answering():
    model = tiny_model(DCAForQuestionAnswering)
    input_ids, start, end = random_ids(2, 6), torch.tensor([1, 2]), torch.tensor([3, 4])
    outputs = model(input_ids, start_positions=start, end_positions=end)
    expected = model.qa_outputs(model.model(input_ids).last_hidden_state)
    assert_close(torch.stack((outputs.start_logits, outputs.end_logits), -1), expected, 1e-6)
    losses = [nn.functional.cross_entropy(expected[..., i], target) for i, target in enumerate((start, end))]
    torch.testing.assert_close(outputs.loss, sum(losses) / 2)


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = DCAForCausalLM.from_pretrained(tmp_path)
    for some_model in (model, loaded):
        assert (some_model.lm_head.weight is some_model.model.embed_tokens.weight) == tied
        assert some_model.get_input_embeddings() is some_model.model.embed_tokens
        assert some_model.get_output_embeddings() is some_model.lm_head
    assert_close(loaded(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 7])
def test_resize_token_embeddings(tied, size):
    model = tiny_model(tie_word_embeddings=tied)
    input_ids = random_ids(2, 5) % (VOCABULARY - 7)
    expected = model(input_ids).logits
    model.resize_token_embeddings(size)
    logits = model(input_ids, labels=input_ids).logits
    assert logits.shape == (2, 5, size) and model.config.vocab_size == model.vocab_size == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    known = min(size, VOCABULARY)
    assert_close(logits[..., :known], expected[..., :known], 1e-6)


# How it runs


@pytest.mark.parametrize("fields", ALL_SCHEMES + [LAYER_NORM, {"norm_type": "zero_centered_rms_norm"}], ids=name_of)
def test_runs_on_the_meta_device(fields):
    with torch.device("meta"):
        model, input_ids = DCAForCausalLM(tiny_config(**fields)), torch.zeros(2, 6, dtype=torch.long)
        outputs = model(input_ids, labels=input_ids)
        outputs.loss.backward()
    assert outputs.logits.is_meta and outputs.logits.shape == (2, 6, VOCABULARY)
    for parameter in model.parameters():
        assert parameter.is_meta and parameter.grad.shape == parameter.shape
    # Without memory, but with buffers (the frequencies of the rotary positions).
    with init_empty_weights():
        model = DCAForCausalLM(tiny_config(**fields))
    assert model(input_ids).logits.is_meta


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_gradient_checkpointing_gives_the_same_gradients(scheme, use_reentrant):
    model = tiny_model(dtype=torch.float64, **scheme).train()
    input_ids = random_ids(2, 6)
    calls = record([layer.input_layernorm for layer in model.model.layers], inputs=True)

    def gradients():
        model.zero_grad()
        calls.clear()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    assert len(calls) == 5
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    # Each block was run once more for the backward pass.
    assert len(calls) == 10
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"attn_implementation": "eager"}], ids=str)
@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_gradients_through_what_is_recorded_under_gradient_checkpointing(scheme, fields):
    model, input_ids = tiny_model(dtype=torch.float64, **scheme, **fields).train(), random_ids(2, 6)
    asked = {"output_hidden_states": True, "output_attentions": bool(fields), "use_cache": False}

    def gradients():
        model.zero_grad()
        outputs = model(input_ids, labels=input_ids, **asked)
        extra = outputs.hidden_states[2].square().mean() + sum(each[..., 0].sum() for each in outputs.attentions or ())
        (outputs.loss + extra).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=rf"results of `{name}` have no gradients.*\"use_reentrant\": False"):
            model(input_ids, **{name: True})
        with torch.no_grad():
            model(input_ids, **{name: True})


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    # Enough layers for `last_k=1` to merge entries; the full stack is compiled in the test of the vision models.
    model = tiny_model(num_hidden_layers=3, last_k=1)
    input_ids = random_ids(2, 6)
    expected = model(input_ids, labels=input_ids, use_cache=False)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(input_ids, labels=input_ids, use_cache=False)
    outputs.loss.backward()
    assert_close(outputs.logits, expected.logits, 1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-5)


# (Each takes seconds. What the standard scheme does, both do.)
@pytest.mark.parametrize(("last_k", "training"), [(1, True), (None, False)])
def test_compiles_anew_once_for_the_batch_and_once_for_the_length(last_k, training):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=3, last_k=last_k)  # enough for `last_k=1` to merge entries
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for shape in [(2, 8), (3, 8), (4, 8), (4, 12), (5, 7), (2, 16)]:
        input_ids = random_ids(*shape)
        with torch.set_grad_enabled(training):
            loss = compiled(input_ids, labels=input_ids, use_cache=False).loss
        if training:
            loss.backward()
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 3, 3, 3]


def test_compiled_graph_grows_with_the_blocks_and_not_with_their_pairs():
    # But for the access to a list's items and views, of which no code is made.
    free = (getitem, torch.ops.aten.view.default)

    def count_nodes(num_layers):
        torch._dynamo.reset()
        counts = []

        def count(graph, inputs):
            counts.append(sum(node.op == "call_function" and node.target not in free for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        model = tiny_model(num_hidden_layers=num_layers)
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
        compiled(random_ids(2, 4), labels=random_ids(2, 4), use_cache=False).loss.backward()
        return counts

    few, more, most = (count_nodes(num_layers) for num_layers in (1, 2, 3))
    for direction in range(2):
        assert most[direction] - more[direction] == more[direction] - few[direction]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_half_precision(scheme, dtype):
    model = tiny_model(dtype=dtype, **scheme)
    input_ids = random_ids(2, 8)
    outputs = model(input_ids, labels=input_ids)
    assert outputs.logits.dtype == dtype and outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # The same, already rounded weights in float64: what differs is that each of the five blocks, and the output,
    # rounds a dozen times, each time by at most half an epsilon, and mostly in different directions.
    exact = tiny_model(dtype=torch.float64, **scheme)
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    assert_close(outputs.logits, exact(input_ids).logits, 6 * 12**0.5 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("scheme", SOME_SCHEMES, ids=name_of)
def test_mixed_precision(scheme):
    model = tiny_model(**scheme)
    input_ids = random_ids(2, 8)
    exact = model(input_ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids, labels=input_ids)
    outputs.loss.backward()
    assert all(
        parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in model.parameters()
    )
    # As above, with fewer roundings.
    assert_close(outputs.logits, exact, 6 * 12**0.5 * torch.finfo(torch.bfloat16).eps / 2)


def test_attention_dropout_is_for_training():
    model, expected = tiny_model(attention_dropout=0.5), tiny_model()(random_ids(1, 6)).logits
    assert torch.equal(model(random_ids(1, 6)).logits, expected)
    torch.manual_seed(0)
    assert (model.train()(random_ids(1, 6)).logits - expected).abs().max() > 1e-2


# Plans for several devices


def matching_modules(model, pattern):
    names = dict(model.named_modules())
    parts = pattern.split(".")
    return [
        name
        for name in names
        if len(name.split(".")) == len(parts)
        and all(part in ("*", own) for part, own in zip(parts, name.split(".")))
    ]  # fmt: skip


@pytest.mark.parametrize("fields", [{"gated_mlp": True}, {"gated_mlp": False}, {"qk_norm": True}], ids=str)
def test_tensor_parallel_plan_names_every_linear_layer(fields):
    model = DCAModel(tiny_config(**fields))
    plan = model.config.base_model_tp_plan
    matches = {pattern: matching_modules(model, pattern) for pattern in plan}
    assert [pattern for pattern, names in matches.items() if len(names) != 5] == []
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear <= {name for names in matches.values() for name in names}
    # The two that bring split features together again.
    row_wise = {pattern for pattern, style in plan.items() if style == "rowwise"}
    assert row_wise == {"layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"}


def test_other_plans_name_existing_modules():
    model = DCAForCausalLM(tiny_config())
    plan = model.config.base_model_fsdp_plan
    assert [pattern for pattern in plan if not matching_modules(model.model, pattern)] == []
    for plan in (DCAForCausalLM._tp_plan, DCAForCausalLM._fsdp_plan):
        assert [pattern for pattern in plan if not matching_modules(model, pattern)] == []


@pytest.mark.parametrize("model_class", [*HEADS, *VISION_HEADS])
def test_no_pipeline_is_promised_and_one_is_refused_where_it_is_asked_for(tmp_path, model_class):
    model, _ = inputs_of(model_class)
    assert not model.supports_pp_plan and model.pp_plan == {}
    model.save_pretrained(tmp_path)
    for load in (model_class, {**HEADS, **VISION_HEADS}[model_class]):
        with pytest.raises(ValueError, match="`pp_size` is 2, but stages of transformers. pipelines pass one tensor"):
            load.from_pretrained(tmp_path, distributed_config={"pp_size": 2})


# Saving, loading and the Hub


@pytest.mark.parametrize("model_class", HEADS)
def test_saved_model_is_loaded_by_the_auto_class(tmp_path, model_class):
    model = tiny_model(model_class, last_k=2)
    model.save_pretrained(tmp_path)
    loaded = HEADS[model_class].from_pretrained(tmp_path)
    assert type(loaded) is model_class
    expected, result = model(random_ids(1, 5)).to_tuple(), loaded.eval()(random_ids(1, 5)).to_tuple()
    assert_close(result[0], expected[0], 1e-6)
    assert type(HEADS[model_class].from_config(model.config)) is model_class


@pytest.mark.parametrize("model_class", [*HEADS, *VISION_HEADS])
def test_saved_model_tells_where_the_code_of_every_head_is(tmp_path, model_class):
    heads, fields = HEADS, {"vocab_size": 8}
    if model_class in VISION_HEADS:
        heads = {**VISION_HEADS, DCAVisionBackbone: AutoBackbone}
        fields = {"image_size": 4, "patch_size": 4}
    config = model_class.config_class(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, **fields)
    model_class(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = {auto_class.__name__: head for head, auto_class in heads.items()} | {"AutoConfig": type(config)}
    for name, some_class in expected.items():
        module, class_name = saved["auto_map"].pop(name).split(".")
        assert (tmp_path / f"{module}.py").read_text().count(f"class {class_name}(") == 1
        assert (f"modeling_dca.{module}", class_name) == (some_class.__module__, some_class.__name__)
    assert saved["auto_map"] == {}


# (What is there, what is asked for, and the fields that then are the configuration's.)
OVERRIDES = [
    ({}, {"sliding_window": 2}, {"sliding_window": 2, "layer_types": ["sliding_attention"] * 5}),
    ({"sliding_window": 4}, {"sliding_window": None}, {"layer_types": ["full_attention"] * 5}),
    ({"last_k": 1}, {"last_k": 1}, {"last_k": 1}),
    ({"last_k": 4}, {"last_k": None}, {"last_k": None}),
    ({"hidden_act": "gelu"}, {"hidden_act": "relu", "attention_dropout": 0.5}, {"hidden_act": "relu"}),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ),
    ({}, {"position_embedding": "none"}, {"rope_parameters": None}),
]


@pytest.mark.parametrize("fields, overrides, expected", OVERRIDES, ids=str)
def test_fields_given_to_from_pretrained_are_as_those_given_at_the_start(tmp_path, fields, overrides, expected):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    start = DCAForCausalLM(tiny_config(**fields | overrides | expected)).eval()
    start.load_state_dict(model.state_dict())
    for auto_class in (DCAForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path, **overrides).eval()
        assert {name: getattr(loaded.config, name) for name in expected} == expected
        assert_close(loaded(random_ids(1, 9)).logits, start(random_ids(1, 9)).logits, 1e-6)
    assert AutoConfig.from_pretrained(tmp_path, **overrides).to_dict() == loaded.config.to_dict() | {
        "dtype": "float32"
    }


def test_what_followed_from_a_field_follows_from_the_one_given(tmp_path):
    tiny_config(hidden_size=16, intermediate_size=None, num_key_value_heads=None).save_pretrained(
        tmp_path / "followed"
    )
    tiny_config(hidden_size=16, intermediate_size=20, num_key_value_heads=1).save_pretrained(tmp_path / "given")
    overrides = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 7}
    for config_class in (DCAConfig, AutoConfig):
        config = config_class.from_pretrained(tmp_path / "followed", **overrides)
        assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (128, 8, 4)
        assert config.layer_types == ["full_attention"] * 7
        config = config_class.from_pretrained(tmp_path / "given", **overrides)
        assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (20, 1, 4)


WRONG_OVERRIDES = [
    ({"residual_scheme": "grn_2"}, "did you mean 'grn_v2'"),
    ({"last_k": 0}, "`last_k` is 0; it must be at least 1"),
    ({"last_k": "2"}, "last_k"),
    ({"residual_scheme": "standard", "last_k": 1}, "`last_k` is 1, but the 'standard' scheme"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple"),
    ({"layer_types": ["full_attention"]}, "`layer_types`"),
    ({"layer_types": ["sliding_attention"] * 5}, "needs `sliding_window`"),
    ({"sliding_window": 2, "layer_types": ["full_attention"] * 5}, "holds no 'sliding_attention'"),
    ({"rope_parameters": {"rope_type": "linar"}}, "did you mean 'linear'"),
]
MISFITS = [{"num_hidden_layers": 6}, {"num_hidden_layers": 4}, {"last_k": 1}, {"residual_scheme": "grn_v3"}]
MISFITS += [{"hidden_size": 32}, {"vocab_size": 60}, {"last_k": 1, "residual_scheme": "grn_v1"}]


def test_fields_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for overrides, message in WRONG_OVERRIDES:
        for some_class in (DCAForCausalLM, AutoModelForCausalLM, AutoConfig):
            with pytest.raises(StrictDataclassError, match=message):
                some_class.from_pretrained(tmp_path, **overrides)
    for overrides in MISFITS:
        (name, value), *_ = overrides.items()
        for some_class in (DCAForCausalLM, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=f"The weights of .* do not fit .*{name}={value!r}"):
                some_class.from_pretrained(tmp_path, **overrides)
        DCAForCausalLM.from_pretrained(tmp_path, **overrides, ignore_mismatched_sizes=True)
    with pytest.raises(TypeError, match="slidng_window"):
        DCAForCausalLM.from_pretrained(tmp_path, slidng_window=2)


@pytest.mark.parametrize("model_class", HEADS)
def test_a_configuration_that_was_changed_is_validated_where_a_model_is_made(model_class):
    for name, value, message in [
        ("last_k", 0, "`last_k` is 0"),
        ("layer_types", ["full_attention"] * 6, "`layer_types` has 6 entries"),
        ("layer_types", ["sliding_attention"] * 5, "needs `sliding_window`"),
        ("residual_scheme", "grn_2", "did you mean 'grn_v2'"),
    ]:
        config = tiny_config()
        setattr(config, name, value)
        with pytest.raises(StrictDataclassError, match=message):
            model_class(config)
        with pytest.raises(StrictDataclassError, match=message):
            HEADS[model_class].from_config(config)


def test_what_followed_from_a_field_follows_from_what_it_is_set_to():
    config = tiny_config(intermediate_size=None)
    config.sliding_window = 2
    config.num_hidden_layers = 3
    assert config.layer_types == ["sliding_attention"] * 3 and len(DCAForCausalLM(config).model.layers) == 3
    config.hidden_size = 32
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (128, 8, 2)
    config.update({"sliding_window": None, "num_hidden_layers": 4})
    assert config.layer_types == ["full_attention"] * 4
    assert config.to_dict() == DCAConfig(**config.to_dict()).to_dict() and "_is_made" not in config.to_dict()
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    config.sliding_window = 8
    assert config.layer_types == ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize("model_class", [DCAForCausalLM, DCAForImageClassification])
def test_the_code_goes_with_the_configuration(tmp_path, model_class):
    # As merging tools do it: the configuration from one place, the weights from another.
    model, _ = inputs_of(model_class)
    model.save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "configuration")
    type(model.config)().save_pretrained(tmp_path / "fresh")
    code = sorted(path.name for path in (tmp_path / "model").glob("*.py"))
    assert "modeling_dca.py" in code
    for folder in ("configuration", "fresh"):
        assert sorted(path.name for path in (tmp_path / folder).glob("*.py")) == code
        saved = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        assert saved == json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]


def test_code_takes_nothing_from_other_models_files():
    # It is saved with checkpoints, and other models' files change with every release.
    files = sorted(Path(modeling_dca.__file__).parent.glob("*.py"))
    imported = {
        module
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert len(files) > 5 and "transformers.modeling_utils" in imported
    others = {module for module in imported if module.startswith("transformers.models")}
    assert others <= {"transformers.models.auto"}


def test_all_schemes_are_tested():
    assert {scheme["residual_scheme"] for scheme in ALL_SCHEMES} == set(RESIDUAL_SCHEMES)


REMOTE_SCRIPT = """
import os
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dca":
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())

import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

inputs = torch.load("inputs.pt")
outputs = {}


def load(auto_class, path):
    model = auto_class.from_pretrained(path, trust_remote_code=True).eval()
    return model, type(model).__name__


def run(source):
    text, vision = f"{source}/text", f"{source}/vision"
    assert type(AutoConfig.from_pretrained(text, trust_remote_code=True)).__name__ == "DCAConfig"
    assert type(AutoConfig.from_pretrained(vision, trust_remote_code=True)).__name__ == "DCAVisionConfig"
    results = {}
    causal_lm, name = load(AutoModelForCausalLM, text)
    assert name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    results[name] = causal_lm(inputs["input_ids"]).logits
    results["generated"] = causal_lm.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    image, name = load(AutoModelForImageClassification, vision)
    results[name] = image(inputs["pixel_values"]).logits
    # Pushed again, code and all, by one who has only what was loaded.
    causal_lm.save_pretrained(f"{source}-again/text")
    again, name = load(AutoModelForCausalLM, f"{source}-again/text")
    results[name + "-again"] = again(inputs["input_ids"]).logits
    image.save_pretrained(f"{source}-again/vision")
    again, name = load(AutoModelForImageClassification, f"{source}-again/vision")
    results[name + "-again"] = again(inputs["pixel_values"]).logits
    # The configuration and its code from one who never loaded the model, and the weights from another.
    config = AutoConfig.from_pretrained(f"{source}/merged", trust_remote_code=True)
    config.save_pretrained(f"{source}-merged")
    causal_lm.save_pretrained(f"{source}-weights")
    os.replace(f"{source}-weights/model.safetensors", f"{source}-merged/model.safetensors")
    merged, name = load(AutoModelForCausalLM, f"{source}-merged")
    results[name + "-merged"] = merged(inputs["input_ids"]).logits
    # Each from a copy: the heads must find their backbone without AutoModel having been used with its code before.
    for auto_class, copy in (
        (AutoModelForSequenceClassification, "sequence"),
        (AutoModelForTokenClassification, "token"),
        (AutoModelForQuestionAnswering, "question"),
    ):
        model, name = load(auto_class, f"{source}/{copy}")
        model(inputs["input_ids"][:1])
        results[name] = model.model(inputs["input_ids"]).last_hidden_state
    model, name = load(AutoModel, text)
    results[name] = model(inputs["input_ids"]).last_hidden_state
    model, name = load(AutoModel, vision)
    results[name] = model(inputs["pixel_values"]).last_hidden_state
    return results


for source in sys.argv[1:]:
    with torch.no_grad():
        try:
            outputs[source] = run(source)
        except Exception as error:
            outputs[source] = repr(error)
assert "modeling_dca" not in sys.modules
torch.save(outputs, "outputs.pt")
"""


def put_into_hub_cache(checkpoint, repository, home):
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, folder / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """
    What checkpoints compute in a process that cannot import `modeling_dca`, and what they should: one process for all,
    as starting one costs more than all that it does. `folder` is loaded from a local path and `someone` from the Hub,
    for which transformers caches code differently.
    """
    path = tmp_path_factory.mktemp("elsewhere")
    text = tiny_model(last_k=2)
    vision_sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2}
    vision_config = DCAVisionConfig(num_hidden_layers=3, num_labels=3, **vision_sizes)
    vision = randomize(DCAForImageClassification(vision_config))
    for name, model in {
        "vision": vision,
        **dict.fromkeys(("text", "merged", "sequence", "token", "question"), text),
    }.items():
        model.save_pretrained(path / "folder" / name)
        put_into_hub_cache(path / "folder" / name, f"someone/{name}", path / "home")
    input_ids, pixel_values = random_ids(2, 6), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": input_ids, "pixel_values": pixel_values}, path / "inputs.pt")

    environment = os.environ | {"HF_HOME": str(path / "home"), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", REMOTE_SCRIPT, "folder", "someone"]
    process = subprocess.run(
        command, env=environment, cwd=path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr

    with torch.no_grad():
        hidden_states, logits = text.model(input_ids).last_hidden_state, text(input_ids).logits
        expected = {
            "DCAForCausalLM": logits,
            "DCAForCausalLM-again": logits,
            "DCAForCausalLM-merged": logits,
            "DCAForImageClassification": vision(pixel_values).logits,
            "DCAForImageClassification-again": vision(pixel_values).logits,
            "DCAForSequenceClassification": hidden_states,
            "DCAForTokenClassification": hidden_states,
            "DCAForQuestionAnswering": hidden_states,
            "DCAModel": hidden_states,
            "DCAVisionModel": vision.model(pixel_values).last_hidden_state,
            "generated": text.generate(input_ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
        }
    return torch.load(path / "outputs.pt"), expected


@pytest.mark.parametrize("source", ["folder", "someone"])
def test_checkpoint_runs_where_the_package_is_not_installed(loaded_elsewhere, source):
    results, expected = loaded_elsewhere
    assert isinstance(results[source], dict), results[source]
    assert results[source].keys() == expected.keys()
    for name, result in results[source].items():
        assert_close(result, expected[name], 1e-6)


@pytest.mark.parametrize("load", [DCAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_gates_of_the_first_release_are_refused(tmp_path, load):
    """Its configurations do not say through which norm gates see entries."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    new = json.loads(file.read_text())
    old = {name: value for name, value in new.items() if name != "gate_norm"}
    assert new["gate_norm"] == "rms"
    file.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="from modeling-dca 0.1.*load it with the code in the checkpoint"):
        load(tmp_path)
    # A configuration that is at hand says nothing of the checkpoint.
    with pytest.raises(ValueError, match="from modeling-dca 0.1"):
        DCAForCausalLM.from_pretrained(tmp_path, config=model.config)
    # Gates of zero compute the same in both.
    for name, parameter in model.named_parameters():
        if name.endswith("residual.gate"):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    file.write_text(json.dumps(old))
    assert torch.equal(load(tmp_path)(random_ids(2, 4)).logits, model(random_ids(2, 4)).logits)
    # One of a later release is not guessed at.
    file.write_text(json.dumps(new | {"gate_norm": "other"}))
    with pytest.raises(ValueError, match="`gate_norm` is 'other'"):
        load(tmp_path)


@pytest.mark.parametrize("scheme", ["standard", "grn_v1", "grn_v2"])
def test_where_there_are_no_gates_nothing_is_said_of_them(scheme):
    assert "gate_norm" not in DCAConfig(residual_scheme=scheme).to_dict()
