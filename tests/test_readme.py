"""The READMEs for users: every block of code in them does what it says."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.training.conftest import caches, no_figures, no_waiting_for_the_disk  # noqa: F401 (all tests use those that they see)
from tests.training.hub_server import Commit, HubServer, Repository, User
from tests.training.processes import forked, run_as_main
from tests.training.tiny import call
from training import causal_lm, image_classification


ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "ReadmeSecretReadmeSecretReadmeSecr"
PAGES = ("README.md", "modeling_dca/README.md", "training/README.md")
BLOCKS = {
    page: re.findall(
        r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for page in PAGES
}

# What makes the README's runs small enough for a test.
SMALL_TEXT = "--dataset text.txt --eval_dataset text.txt --vocab_size 300 --hidden_size 16 --max_steps 2 --save_steps 2 --eval_steps 2"
SMALL_IMAGES = "--hidden_size 16 --max_steps 2 --save_strategy steps --eval_strategy no"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which the README's commands run as in a checkout, with the two demo runs, made small."""
    folder = tmp_path_factory.mktemp("checkout")
    for room in ("configuration", "model_cards", "training", "modeling_dca"):
        (folder / room).symlink_to(ROOT / room)
    shutil.copy(ROOT / "modeling_dca" / "grn.py", folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(causal_lm.main, "configuration/demo/text.yaml", *SMALL_TEXT.split())
        call(image_classification.main, "configuration/demo/image.yaml", *SMALL_IMAGES.split())
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HOME": str(folder / "cache"), **environment}
    completed = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    return completed


def tiny_source(folder: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    """The files of a model of random weights that stands for the real one of the README."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_python_blocks_run_one_after_the_other(checkout, tmp_path):
    code = "\n".join(text for language, text in BLOCKS["README.md"] if language == "python")
    (source,) = re.findall(r'source = "(.*)"', code)
    with HubServer({TOKEN: User("your-name")}) as hub:
        files = tiny_source(tmp_path, checkout / "runs/demo/text")
        hub.repositories[source] = Repository(False, [Commit(hashlib.sha1(b"tiny").hexdigest(), "tiny", files)])
        hub.store(hashlib.sha256(files["model.safetensors"]).hexdigest(), files["model.safetensors"])
        run(checkout, "-c", code, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        pushed = hub.repositories["your-name/your-model"].commits[-1].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_dca.py"} <= set(pushed)
    assert (checkout / "runs" / "fine-tuned" / "model.safetensors").exists()


def test_python_blocks_of_the_library_run_one_after_the_other(checkout, monkeypatch):
    code = [text for language, text in BLOCKS["modeling_dca/README.md"] if language == "python"]
    assert code
    monkeypatch.chdir(checkout)
    status, printed = forked(lambda: exec("\n".join(code), {"__name__": "__main__"}))
    assert status == 0, printed


@pytest.mark.parametrize(
    "line",
    [line for page in PAGES for language, text in BLOCKS[page] if language == "bash" for line in text.splitlines()],
)
def test_shell_command_runs(line, checkout, monkeypatch):
    program, *arguments = shlex.split(line)
    if program == "make":
        # What these do is tested by running them: here, that they exist.
        subprocess.run([program, "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    assert program == "python" and arguments[0] == "-m"
    if arguments[1] == "training.causal_lm":
        # (Its real command line is run elsewhere: a process of its own takes longest to import.)
        monkeypatch.chdir(checkout)
        run_as_main(*arguments[1:], *SMALL_TEXT.split())
    else:
        run(checkout, *arguments, *SMALL_IMAGES.split())
    output = arguments[arguments.index("--output_dir") + 1]
    assert (checkout / output / "model.safetensors").exists()


def test_no_block_is_left_out():
    # (What is "py" is a part of a program on several devices: `tests/modeling_dca/test_pipeline.py` has the whole.)
    assert {language for page in PAGES for language, _ in BLOCKS[page]} == {"bash", "python", "bibtex", "py"}
