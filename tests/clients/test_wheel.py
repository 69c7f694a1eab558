"""What is built: the wheel loads, generates and trains where nothing of the checkout is, and both pass the registry's checks."""

import sys
import tarfile
import zipfile

import pytest

from tests.clients.tools import ROOT, python


pytest.importorskip("build")
pytest.importorskip("twine")

USE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
import modeling_dca
assert modeling_dca.__file__.startswith(sys.prefix), modeling_dca.__file__
checkpoint = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
print(tokenizer.decode(model.generate(**tokenizer("def rms", return_tensors="pt"), max_new_tokens=5)[0]))
data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
arguments = TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True)
print("loss", Trainer(model, arguments, train_dataset=data).train().training_loss)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with sdist and wheel."""
    folder = tmp_path_factory.mktemp("built")
    python("-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    return folder


def test_the_registry_would_take_both(built):
    files = sorted(built.iterdir())
    assert [file.name for file in files] == ["modeling_dca-0.2.0-py3-none-any.whl", "modeling_dca-0.2.0.tar.gz"]
    assert "PASSED" in python("-m", "twine", "check", "--strict", *files, folder=built)


def test_the_library_alone_is_in_them(built):
    modules = {f"modeling_dca/{file.name}" for file in (ROOT / "modeling_dca").glob("*.py")} | {
        "modeling_dca/py.typed"
    }
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {name for name in names if ".dist-info/" not in name} == modules
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules <= names and "pyproject.toml" in names
    assert [name for name in names if name.startswith(("tests", "training"))] == []


def test_the_wheel_loads_generates_and_trains(built, checkpoints, tmp_path):
    python("-m", "venv", "--without-pip", "venv", folder=tmp_path)
    site = tmp_path / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, next(built.glob("*.whl")), folder=tmp_path
    )
    # What it depends on is that of this environment. (An editable install there is not seen through this.)
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    import subprocess

    completed = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", USE, checkpoints["dca"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "loss" in completed.stdout
