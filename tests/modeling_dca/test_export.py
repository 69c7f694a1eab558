"""Models leave PyTorch's eager mode as programs that run where neither transformers nor this package is installed."""

import subprocess
import sys

import pytest
import torch
import transformers.dynamic_module_utils
from test_modeling_dca import assert_close, random_ids, tiny_model
from torch import nn
from torch.export import Dim
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_dca import ALL_GRN_FUNCTIONS, DCAForImageClassification, DCAVisionConfig, generalized_residual
from modeling_dca.grn import find_implementation


class TextLogits(nn.Module):
    """The model as a function of tensors alone, as transformers' exporters wrap one: its outputs are of a class of theirs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask, use_cache=False).logits


class ImageLogits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": random_ids(batch, length), "attention_mask": mask}


def language_model(num_hidden_layers=2, **options):
    return TextLogits(tiny_model(num_hidden_layers=num_hidden_layers, **options).eval())


def classifier(**options):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return ImageLogits(DCAForImageClassification(DCAVisionConfig(**sizes, **options)).eval())


#: A model, inputs to export it with, their sizes that are free, and other inputs to run the program with.
CASES = {
    "language model": (language_model, {"input_ids": random_ids(2, 7)}, (0, 1), {"input_ids": random_ids(3, 12)}),
    "language model with a mask": (language_model, padded(2, 7), (0, 1), padded(3, 12)),
    "classifier": (classifier, {"pixel_values": images(2, 3, 8, 8)}, (0,), {"pixel_values": images(5, 3, 8, 8)}),
}
#: Blocks of other families than the paper's: the norms of Gemma and OLMo, the blocks of GPT-NeoX, caps and multipliers.
ROTARY = {kind: {"rope_type": "default", "rope_theta": 99.0} for kind in ("full_attention", "sliding_attention")}
BLOCKS = {
    "norms around the modules, soft caps": {
        "norm_placement": "sandwich",
        "norm_type": "zero_centered_rms_norm",
        "gated_mlp": True,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "attention_scaling": 0.4,
        "embedding_multiplier": 4.0,
        "attn_implementation": "eager",
    },
    "modules side by side": {
        "parallel_blocks": True,
        "norm_type": "layer_norm",
        "mlp_bias": True,
        "lm_head_bias": True,
    },
    "modules side by side, norms around": {
        "parallel_blocks": True,
        "norm_placement": "sandwich",
        "logit_multiplier": 0.3,
    },
    "norms after the modules, of all heads, and rotary positions by type of layer": {
        "norm_placement": "post_module",
        "qk_norm": "all_heads",
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,
        "rope_parameters": ROTARY,
        "no_rope_layers": [1, 0],
    },
}
BLOCKS = {block: {"num_hidden_layers": 1} | options for block, options in BLOCKS.items()}
CASES |= {
    block: (lambda options=options: language_model(**options), *CASES["language model with a mask"][1:])
    for block, options in BLOCKS.items()
}


def free_sizes(inputs, free):
    return {name: dict.fromkeys(free, Dim.DYNAMIC) for name in inputs}


RUN = """
import sys

sys.modules["transformers"] = sys.modules["modeling_dca"] = None  # makes the imports fail
import torch

inputs = torch.load("inputs.pt")
torch.save({file: torch.export.load(file).module()(**inputs[file]) for file in inputs}, "outputs.pt")
"""


def test_exported_programs_need_torch_alone(tmp_path):
    inputs_of, expected = {}, {}
    for case in CASES:
        strict = case == "language model"
        build, inputs, free, others = CASES[case]
        model, file = build(), f"{case}, strict {strict}.pt2"
        program = torch.export.export(model, (), inputs, dynamic_shapes=free_sizes(inputs, free), strict=strict)
        torch.export.save(program, tmp_path / file)
        inputs_of[file], expected[file] = others, model(**others)
    torch.save(inputs_of, tmp_path / "inputs.pt")
    result = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    outputs = torch.load(tmp_path / "outputs.pt")
    for file, logits in expected.items():
        assert_close(outputs[file], logits, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_onnx_runs_what_is_exported(tmp_path, case):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    build, inputs, free, others = CASES[case]
    model = build()
    program = torch.onnx.export(
        model, (), kwargs=inputs, dynamic_shapes=free_sizes(inputs, free), dynamo=True, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {name: values.numpy() for name, values in others.items()})
    # (Padding whose window is all padding attends to nothing, of which runtimes make different things.)
    seen = others["attention_mask"].bool() if "attention_mask" in others else slice(None)
    assert_close(torch.from_numpy(logits)[seen], model(**others)[seen], 1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_other_families_are_compiled_whole(block):
    torch._dynamo.reset()
    model = tiny_model(**BLOCKS[block])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("delta", "gate")):
                parameter.normal_(std=0.2)
    batch = padded(2, 7) | {"labels": random_ids(2, 7)}
    expected = model(**batch, use_cache=False)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**batch, use_cache=False)
    outputs.loss.backward()
    assert_close(outputs.logits, expected.logits, 1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-5)


def test_a_named_implementation_is_exported_as_its_operators():
    program = torch.export.export(language_model(grn_implementation="cpu"), (), {"input_ids": random_ids(2, 7)})
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(ALL_GRN_FUNCTIONS["cpu"].operators[0]) == 3
    assert find_implementation("auto", torch.device("cpu")) is not generalized_residual  # afterwards


# Operators, and the code that comes with checkpoints


@pytest.fixture
def checkpoint_code(tmp_path, monkeypatch):
    """Loads the code of a checkpoint's folder, which it makes, beside the package that is installed."""
    modules = str(tmp_path / "modules")
    for name in ("HF_MODULES_CACHE", "TRANSFORMERS_DYNAMIC_MODULE_NAME"):
        assert hasattr(transformers.dynamic_module_utils, name)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    before = set(sys.modules)
    others = [name for name in before if name.startswith("transformers_modules")]
    for name in others:
        monkeypatch.delitem(sys.modules, name)

    def load(folder, change=lambda text: text):
        path = tmp_path / folder
        tiny_model(num_hidden_layers=1).save_pretrained(path)
        code = path / "grn_cpu.py"
        code.write_text(change(code.read_text()))
        model = get_class_from_dynamic_module("modeling_dca.DCAForCausalLM", str(path)).from_pretrained(path).eval()
        return model, sys.modules[type(model).__module__].generalized_residual_cpu.operators

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def test_operators_do_not_depend_on_the_folder(checkpoint_code):
    input_ids = random_ids(2, 5)
    expected = tiny_model(num_hidden_layers=1)(input_ids).logits
    installed = ALL_GRN_FUNCTIONS["cpu"].operators[0].name()
    assert installed.startswith("modeling_dca::cpu_")
    for folder in ("lr=0.001", "class", "größe 1 (neu)"):
        model, (forward, _) = checkpoint_code(folder)
        # The same code has the same name, and a number that tells that it is a copy.
        assert forward.name().removesuffix("_forward").startswith(installed.removesuffix("_forward"))
        assert forward is not ALL_GRN_FUNCTIONS["cpu"].operators[0]
        assert_close(model(input_ids, use_cache=False).logits, expected, 1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(input_ids, use_cache=False).logits, expected, 1e-5)


def test_each_code_has_its_own_operators(checkpoint_code):
    def twice(text):
        # (What is computed at once, as the few tokens here are.)
        changed = text.replace("results = (factors * entries)", "results = (2 * factors * entries)")
        assert changed != text
        return changed

    stack, delta, gate = [torch.ones(2, 3)], torch.zeros(1, 1, 3), torch.zeros(1, 3)
    (_, (same, _)), (_, (doubled, _)) = checkpoint_code("same"), checkpoint_code("changed", twice)
    installed = ALL_GRN_FUNCTIONS["cpu"].operators[0]
    assert [operator(stack, delta, gate).sum().item() for operator in (installed, same, doubled)] == [6, 6, 12]
    code = {operator.name().split("_")[2] for operator in (installed, same, doubled)}
    assert len(code) == 2 and len({installed, same, doubled}) == 3


def test_the_names_of_operators_are_those_of_other_processes():
    program = "import modeling_dca; print(modeling_dca.ALL_GRN_FUNCTIONS['cpu'].operators[0].name())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == ALL_GRN_FUNCTIONS["cpu"].operators[0].name(), result.stderr[-3000:]
