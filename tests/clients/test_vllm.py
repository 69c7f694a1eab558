"""vLLM, with its transformers backend: greedy text, from programs and from its server, is that of `generate`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.tools import ROOT, WITHOUT_PACKAGE, ask, python, served, streamed


pytest.importorskip("vllm")
PROMPTS = ["def rms_norm(hidden_states", "import torch\n"]
TOKENS = 12
#: Small, and of no more processes than needed.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    prompts = json.loads(sys.argv[3])
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, model_impl="transformers", **options)
    parameters = SamplingParams(temperature=0, max_tokens=int(sys.argv[4]))
    print("RESULT" + json.dumps([output.outputs[0].text for output in llm.generate(prompts, parameters)]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which the package is installed, with what it tells other packages of itself."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "modeling_dca", source / "modeling_dca")
    python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder, source),
        folder=source,
    )
    return str(folder)


@torch.no_grad()
def expected(checkpoint):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def generated(checkpoint, folder, start="", environment=(), **options):
    arguments = (checkpoint, json.dumps(options), json.dumps(PROMPTS), str(TOKENS))
    (folder / "generate.py").write_text(start + GENERATE)
    printed = python("generate.py", *arguments, folder=folder, **(SETTINGS | dict(environment)))
    return json.loads(printed.rpartition("RESULT")[2].splitlines()[0])


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled"])
def test_the_text_of_generate_without_the_package(checkpoint, tmp_path, enforce_eager):
    options = {"trust_remote_code": True, "enforce_eager": enforce_eager}
    assert generated(checkpoint, tmp_path, WITHOUT_PACKAGE, **options) == expected(checkpoint)


def test_the_text_of_generate_where_the_package_is_installed(checkpoints, tmp_path, installed):
    """Nothing need be trusted, and the processes of vLLM know the models, too."""
    environment = {"PYTHONPATH": installed, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = generated(checkpoints["dca"], tmp_path, environment=environment.items(), enforce_eager=True)
    assert found == expected(checkpoints["dca"])


def test_norms_are_those_of_vllm(checkpoints):
    from vllm.model_executor.models.transformers.fuser import get_fusers

    fused = {
        name: [type(fuser).__name__ for fuser in get_fusers(layer.input_layernorm)]
        for name, folder in checkpoints.items()
        for layer in AutoModelForCausalLM.from_pretrained(folder).model.layers[:1]
    }
    assert fused == {"llama": ["RMSNormFuser"], "dca": ["RMSNormFuser"]}


def test_a_pipeline_is_refused_in_one_sentence(checkpoints, tmp_path):
    (tmp_path / "generate.py").write_text(GENERATE)
    options = json.dumps({"trust_remote_code": True, "enforce_eager": True, "pipeline_parallel_size": 2})
    completed = subprocess.run(
        [sys.executable, "generate.py", checkpoints["dca"], options, json.dumps(PROMPTS), "2"],
        cwd=tmp_path,
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert completed.returncode != 0
    printed = completed.stdout + completed.stderr
    assert "DCA models cannot be split into a pipeline" in printed, [
        line for line in printed.splitlines() if "Error" in line
    ]


def test_the_server(checkpoints, tmp_path, installed):
    # (The command `vllm` of `vllm-cpu` asks for the version of a package that is called `vllm`.)
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        checkpoints["dca"],
        "--dtype",
        "float32",
        "--enforce-eager",
    )
    options = ("--max-model-len", "128", "--model-impl", "transformers")
    with served(tmp_path, *command, *options, PYTHONPATH=installed, **SETTINGS) as address:
        question = {"model": checkpoints["dca"], "prompt": PROMPTS[0], "temperature": 0, "max_tokens": TOKENS}
        (whole,) = ask(address, "/v1/completions", **question)
        pieces = [
            piece["choices"][0]["text"] for piece in streamed(ask(address, "/v1/completions", stream=True, **question))
        ]
    text = expected(checkpoints["dca"])[0]
    assert json.loads(whole)["choices"][0]["text"] == text
    assert "".join(pieces) == text and len(pieces) > 1
