"""Publishing on a Hub: what goes up, that it loads where this project is not installed, and how a push fails."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

import training.results.hub
from modeling_dca import DCAConfig, DCAForCausalLM, DCAForImageClassification, DCAVisionConfig
from tests.training.hub_server import Commit, HubServer, Repository, User
from tests.training.tiny import TEXT_RUN, call, failure, need_image_processors, refusal, write_room
from training import causal_lm
from training import publish as publish_command
from training.run.trainer import RunTrainer
from training.support.errors import UserError, command, hub_error


ROOT = Path(__file__).parents[3]

# The writer's is known by nothing but being sent, as those of a single sign-on; the others look like the Hub's own.
TOKEN = "WritersSecret.WritersSecret.WritersSecret"
READ_TOKEN = "hf_" + "ReadersSecretReadersSecretReaders9"
WRONG_TOKEN = "hf_" + "UnknownSecretUnknownSecretUnknown9"
ODD_TOKEN = "hf_" + "OddSecret\x7fOddSecret"
TOKENS = [TOKEN, READ_TOKEN, WRONG_TOKEN, ODD_TOKEN]
SECRETS = [*TOKENS, HubServer.SIGNATURE]

INPUT_IDS = torch.arange(24).reshape(2, 12) % 20
PIXEL_VALUES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

# A stranger's process: `modeling_dca` cannot be imported, however this project is installed.
LOAD = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_dca", "training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import modeling_dca
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("modeling_dca can be imported")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification,
    AutoTokenizer,
)

text_line, vision_line, first_sha, output = sys.argv[1:]
inputs = load_file("inputs.safetensors")
results, classes = {}, {}

@torch.no_grad()
def run(name, model, **kwargs):
    classes[name] = type(model).__name__
    results[name] = model.eval()(**kwargs).logits.contiguous()

def from_line(line):
    exec(line, names := {})
    return names["model"]

ids, pixels = inputs["input_ids"], inputs["pixel_values"]
run("text", from_line(text_line), input_ids=ids)
run("text, first", AutoModelForCausalLM.from_pretrained("writer/text", revision=first_sha, trust_remote_code=True), input_ids=ids)
run("text, pushed", AutoModelForCausalLM.from_pretrained("writer/pushed", trust_remote_code=True), input_ids=ids)
classifier = AutoModelForSequenceClassification.from_pretrained(
    "writer/text", trust_remote_code=True, num_labels=3, pad_token_id=0
)
run("classifier", classifier, input_ids=ids)
results["classifier, embedding"] = classifier.get_input_embeddings().weight.detach().clone()
run("vision", from_line(vision_line), pixel_values=pixels)
tokenizer = AutoTokenizer.from_pretrained("writer/text")
results["tokenizer"] = torch.tensor(tokenizer("to be or not to be")["input_ids"])
processor = AutoImageProcessor.from_pretrained("writer/vision")
results["processor"] = processor(Image.new("RGB", (20, 20), (255, 0, 0)), return_tensors="pt")["pixel_values"]
assert "modeling_dca" not in sys.modules
save_file(results, output, metadata=classes)
"""


@pytest.fixture(scope="module")
def hub():
    users = {TOKEN: User("writer"), READ_TOKEN: User("writer", may_write=False)}
    with HubServer(users) as hub:
        hub.repositories["somebody/model"] = Repository(
            False, [Commit("0" * 40, "initial commit", {"README.md": b"Theirs"})]
        )
        yield hub


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A finished run of a language model, with what a training leaves beside the model."""
    run = tmp_path_factory.mktemp("runs") / "text"
    torch.manual_seed(0)
    config = DCAConfig(vocab_size=500, hidden_size=64, num_attention_heads=4, num_hidden_layers=3, last_k=1)
    model = DCAForCausalLM(config)
    for parameter in model.parameters():
        # Generalized residuals at their initial values are the plain sum, which would hide one that is not loaded.
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(run)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        ["to be or not to be that is the question"], trainers.BpeTrainer(special_tokens=["[UNK]"], show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(run)
    write_card(run)
    (run / "all_results.json").write_text('{"perplexity": 12.5}')
    (run / "runs").mkdir()
    (run / "runs" / "events.out.tfevents").write_bytes(b"\x00log")
    (run / "training_args.bin").write_bytes(b"pickle with " + TOKEN.encode())
    checkpoint, baseline = ("checkpoint-5/model.safetensors",), ("standard/config.json", "standard/model.safetensors")
    for path in (*checkpoint, *baseline, "optimizer.pt", "_cache/x", ".hidden", "__pycache__/grn.pyc"):
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_bytes(b"not part of the model")
    return run


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "vision"
    torch.manual_seed(0)
    config = DCAVisionConfig(
        image_size=16, patch_size=4, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, num_labels=4
    )
    DCAForImageClassification(config).save_pretrained(run)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(run)
    write_card(run)
    (run / "figures").mkdir()
    (run / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n")
    return run


def write_card(run):
    (run / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n\n# A model\n")


@pytest.fixture
def run_copy(text_run, tmp_path):
    """The language model's run, to be changed by a test."""
    return Path(shutil.copytree(text_run, tmp_path / "text"))


def python(hub, tmp_path, *arguments, token=TOKEN, cwd=ROOT, **environment):
    """Runs Python as someone who has nothing but access to `hub`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        **({"HF_TOKEN": token} if token else {}),
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def publish(hub, run, repo_id, *options, token=TOKEN, **constants):
    """Runs the command in this process, which is what starting another one would give, but for its start."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with hub.reached(token, **constants), redirect_stdout(out), redirect_stderr(err):
        try:
            call(publish_command.main, run, repo_id, *options)
        except SystemExit as exit:
            status = exit.code
    return subprocess.CompletedProcess((), status, out.getvalue(), err.getvalue())


def published(completed):
    """The lines that a successful push printed."""
    assert completed.returncode == 0, completed.stderr
    assert not [secret for secret in SECRETS if secret in completed.stdout + completed.stderr]
    return completed.stdout.splitlines()


def assert_fails(completed, *words):
    """The command ended as a command should that its user, or the Hub, stopped."""
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert completed.stdout == ""
    (line,) = completed.stderr.splitlines()
    assert line.startswith("error: ")
    assert not [word for word in words if word not in line], line
    assert not [secret for secret in SECRETS if secret in line], line


def snapshot(folder):
    """What is in a folder, to the byte, and when it was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def state(hub, repo_id):
    """The revisions of a model that someone could load; none where there is no model yet."""
    repository = hub.repositories.get(repo_id)
    return [] if repository is None else [commit.sha for commit in repository.commits[1:]]


@pytest.fixture(scope="module")
def pushed(hub, text_run, vision_run, tmp_path_factory):
    """Three models on the hub: `text` pushed twice with different weights, `vision`, and one by `push_to_hub`."""
    tmp_path = tmp_path_factory.mktemp("push")
    second_run = Path(shutil.copytree(text_run, tmp_path / "second"))
    weights = load_file(second_run / "model.safetensors")
    save_file(
        {name: weight + 0.1 for name, weight in weights.items()}, second_run / "model.safetensors", {"format": "pt"}
    )

    before = snapshot(text_run)
    lines = {"first": published(python(hub, tmp_path, "-m", "training.publish", text_run, "writer/text"))}
    assert snapshot(text_run) == before
    lines["text"] = published(publish(hub, second_run, "writer/text"))
    lines["vision"] = published(publish(hub, vision_run, "writer/vision"))
    with hub.reached(TOKEN):
        DCAForCausalLM.from_pretrained(text_run).push_to_hub("writer/pushed")
    return {"lines": lines, "second_run": second_run}


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    """What a stranger gets from the models, and the names of their classes."""
    need_image_processors()
    stranger = tmp_path_factory.mktemp("stranger")
    (stranger / "load.py").write_text(LOAD)
    save_file({"input_ids": INPUT_IDS, "pixel_values": PIXEL_VALUES}, stranger / "inputs.safetensors")
    lines = [pushed["lines"][name][-1] for name in ("text", "vision")]
    first_sha = state(hub, "writer/text")[0]
    arguments = ("-I", "load.py", *lines, first_sha, stranger / "results.safetensors")
    completed = python(hub, stranger, *arguments, token=None, cwd=stranger)
    assert completed.returncode == 0, completed.stderr
    with open(stranger / "results.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return load_file(stranger / "results.safetensors"), header["__metadata__"]


@torch.no_grad()
def logits(model_class, run, **inputs):
    return model_class.from_pretrained(run).eval()(**inputs).logits


def test_what_is_published(hub, pushed):
    files = HfApi(endpoint=hub.url, token=False).list_repo_files("writer/text")
    modelling_code = ["configuration_dca.py", "grn.py", "modeling_dca.py"]
    assert set(modelling_code) <= set(files)
    assert sorted(file for file in files if not file.endswith(".py")) == [
        ".gitattributes",
        "README.md",
        "all_results.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "runs/events.out.tfevents",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in files[1:]:
        assert hub.repositories["writer/text"].commits[-1].files[file] == (pushed["second_run"] / file).read_bytes()


def test_each_push_is_one_commit(hub, pushed):
    assert [commit.message for commit in hub.repositories["writer/text"].commits[1:]] == [
        "Publish text",
        "Publish second",
    ]


def test_large_files_go_up_in_parts_too(hub, pushed):
    parts = [request for request in hub.requests if request.method == "PUT" and request.path.count("/") == 3]
    assert len(parts) > 1
    assert [request for request in hub.requests if request.method == "PUT" and request.path.count("/") == 2]


def test_output_says_where_the_model_is_and_how_to_load_it(hub, pushed):
    assert pushed["lines"]["text"] == [
        f"{hub.url}/writer/text",
        "from transformers import AutoModelForCausalLM; "
        'model = AutoModelForCausalLM.from_pretrained("writer/text", trust_remote_code=True)',
    ]
    assert "AutoModelForImageClassification.from_pretrained" in pushed["lines"]["vision"][1]


def test_language_model_loads_where_the_project_is_not_installed(loaded, pushed):
    results, classes = loaded
    expected = logits(DCAForCausalLM, pushed["second_run"], input_ids=INPUT_IDS)
    torch.testing.assert_close(results["text"], expected)
    assert classes["text"] == "DCAForCausalLM"


def test_revision_loads_by_its_sha(loaded, text_run):
    results, _ = loaded
    expected = logits(DCAForCausalLM, text_run, input_ids=INPUT_IDS)
    torch.testing.assert_close(results["text, first"], expected)
    assert not torch.allclose(results["text"], expected, atol=1e-2)


def test_language_model_loads_with_another_head(loaded, pushed):
    results, classes = loaded
    assert classes["classifier"] == "DCAForSequenceClassification"
    assert results["classifier"].shape == (2, 3)
    weights = load_file(pushed["second_run"] / "model.safetensors")
    assert torch.equal(results["classifier, embedding"], weights["model.embed_tokens.weight"])


def test_image_classifier_loads_where_the_project_is_not_installed(loaded, vision_run):
    results, classes = loaded
    expected = logits(DCAForImageClassification, vision_run, pixel_values=PIXEL_VALUES)
    torch.testing.assert_close(results["vision"], expected)
    assert classes["vision"] == "DCAForImageClassification"


def test_tokenizer_and_image_processor_load(loaded, text_run):
    results, _ = loaded
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_run)
    assert results["tokenizer"].tolist() == tokenizer("to be or not to be")["input_ids"]
    assert results["processor"].shape == (1, 3, 16, 16)
    assert torch.equal(results["processor"][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_push_to_hub_makes_the_same_model(loaded, text_run):
    results, _ = loaded
    torch.testing.assert_close(results["text, pushed"], logits(DCAForCausalLM, text_run, input_ids=INPUT_IDS))


def test_private(hub, vision_run, pushed):
    published(publish(hub, vision_run, "writer/secret", "--private"))
    assert hub.repositories["writer/secret"].private
    assert_fails(publish(hub, vision_run, "writer/vision", "--private"), "writer/vision", "is public")


def test_weights_of_an_earlier_push_do_not_stay(hub, vision_run, tmp_path):
    published(publish(hub, vision_run, "writer/cut"))
    run = Path(shutil.copytree(vision_run, tmp_path / "cut"))
    (run / "model.safetensors").unlink()
    DCAForImageClassification.from_pretrained(vision_run).save_pretrained(run, max_shard_size="20KB")
    published(publish(hub, run, "writer/cut"))
    weights = [file for file in hub.repositories["writer/cut"].commits[-1].files if ".safetensors" in file]
    assert sorted(weights) == sorted(path.name for path in run.glob("*.safetensors*"))
    assert "model.safetensors" not in weights


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        pytest.param({"pattern": "PUT /storage", "after_bytes": 20_000}, ["connection"], id="breaks_in_upload"),
        pytest.param({"pattern": "POST .*/commit/", "after_bytes": 500}, ["connection"], id="breaks_in_commit"),
        pytest.param({"pattern": "POST .*/commit/", "status": 500}, ["status 500", "later"], id="commit_500"),
        pytest.param({"pattern": "PUT /storage", "status": 403}, ["status 403"], id="storage_refuses"),
        pytest.param(
            {"pattern": "POST .*/preupload/", "status": 403, "message": f"{TOKEN} is\nnot allowed"},
            ["status 403", "[hidden] is not allowed"],
            id="refused_with_the_token_in_the_answer",
        ),
        pytest.param({"pattern": "POST .*/validate-yaml", "status": 413}, ["status 413"], id="too_large"),
    ],
)
def test_push_that_fails_leaves_nothing_and_can_be_run_again(hub, text_run, monkeypatch, request, failure, words):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # 23 s in all, between the attempts of the client
    repo_id = f"writer/{request.node.callspec.id}"
    before = snapshot(text_run)
    with hub.failing(**failure) as injected:
        completed = publish(hub, text_run, repo_id)
    assert injected.met
    assert_fails(completed, *words)
    assert state(hub, repo_id) == []
    assert snapshot(text_run) == before
    published(publish(hub, text_run, repo_id))
    assert hub.repositories[repo_id].commits[-1].files["model.safetensors"] == (
        (text_run / "model.safetensors").read_bytes()
    )


def test_push_that_fails_leaves_the_model_of_the_push_before(hub, vision_run, tmp_path):
    published(publish(hub, vision_run, "writer/again"))
    run = Path(shutil.copytree(vision_run, tmp_path / "again"))
    write_card(run)
    (run / "all_results.json").write_text("{}")
    before = state(hub, "writer/again")
    with hub.failing("POST .*/commit/", status=503):
        assert_fails(publish(hub, run, "writer/again"), "status 503")
    assert state(hub, "writer/again") == before


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        pytest.param(None, "writer/no_token", ["no access token", "hf auth login", "HF_TOKEN"], id="no_token"),
        pytest.param(WRONG_TOKEN, "writer/wrong_token", ["rejected", "status 401"], id="wrong_token"),
        pytest.param(READ_TOKEN, "writer/read_token", ["write access", "status 403"], id="token_that_only_reads"),
        pytest.param(ODD_TOKEN, "writer/odd_token", ["characters"], id="token_that_cannot_be_sent"),
        pytest.param(TOKEN, "somebody/new", ["write access", "somebody"], id="name_of_another_user"),
        pytest.param(TOKEN, "somebody/model", ["write access", "status 403"], id="model_of_another_user"),
    ],
)
def test_push_without_the_right_to(hub, text_run, token, repo_id, words):
    before, repositories = snapshot(text_run), set(hub.repositories)
    assert_fails(publish(hub, text_run, repo_id, token=token), *words)
    assert set(hub.repositories) == repositories
    assert state(hub, repo_id) == []
    assert snapshot(text_run) == before


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."), reason="older clients do not ask this hub for Xet storage"
)
def test_storage_that_is_out_of_reach(hub, text_run):
    # This hub has no Xet storage, for which the client asks unless told otherwise.
    completed = publish(hub, text_run, "writer/xet", HF_HUB_DISABLE_XET=False)
    assert_fails(completed, "connection", "404")
    assert state(hub, "writer/xet") == []


def test_hub_that_is_out_of_reach(text_run, hub):
    assert_fails(publish(hub, text_run, "writer/x", ENDPOINT="http://127.0.0.1:1"), "connection")
    assert_fails(publish(hub, text_run, "writer/x", HF_HUB_OFFLINE=True), "unset it to push")


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the command in this process, where it must end before it talks to the Hub, and returns what it says."""

    def no_hub(*args, **kwargs):
        pytest.fail("The Hub was asked.")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["publish", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            publish_command.main()
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setattr(training.results.hub, "HfApi", no_hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return run


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "README.md", "modeling_dca.py", "grn.py"])
def test_run_that_lacks_a_file_is_refused(main, run_copy, file):
    (run_copy / file).unlink()
    expected = "*.safetensors" if file == "model.safetensors" else file
    line = main(run_copy, "writer/x")
    assert line.startswith("error: ") and str(run_copy) in line and expected in line


def test_checkpoint_without_modelling_code_is_refused(main, run_copy):
    config = json.loads((run_copy / "config.json").read_text())
    del config["auto_map"]
    (run_copy / "config.json").write_text(json.dumps(config))
    assert "modelling code" in main(run_copy, "writer/x")
    (run_copy / "config.json").write_text("{")
    assert "config.json is damaged" in main(run_copy, "writer/x")


def test_run_that_diverged_is_refused(main, run_copy):
    (run_copy / "diverged.json").write_text("{}")
    assert "became NaN or infinite" in main(run_copy, "writer/x")


def test_altered_model_is_refused(main, run_copy):
    record = {"model": {}, "data": {"dataset": "stdlib"}, "training": {"alteration": "decay_b_to_0"}}
    (run_copy / "run.yaml").write_text(yaml.safe_dump(record))
    assert "a variant for a study ('decay_b_to_0')" in main(run_copy, "writer/x")


def test_card_of_other_figures_is_refused(main, run_copy):
    (run_copy / "all_results.json").write_text('{"eval_loss": 2.25}')
    metrics = [{"type": "loss", "value": 3.5}]
    index = [{"name": "x", "results": [{"task": {"type": "text-generation"}, "dataset": {}, "metrics": metrics}]}]
    (run_copy / "README.md").write_text(f"---\n{yaml.safe_dump({'model-index': index})}---\n# A model\n")
    line = main(run_copy, "writer/x")
    assert "a loss of 3.5" in line and "all_results.json has 2.25" in line


def test_any_token_is_kept_back(main, run_copy):
    (run_copy / "notes.txt").write_text(f"login with {READ_TOKEN}")
    line = main(run_copy, "writer/x")
    assert "notes.txt holds an access token" in line and READ_TOKEN not in line


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "user/na me", "user/-x"])
def test_name_that_no_model_can_have_is_refused(main, text_run, repo_id):
    assert repr(repo_id) in main(text_run, repo_id)


def test_folder_that_does_not_exist_is_refused(main, tmp_path):
    assert "is not a folder" in main(tmp_path / "nowhere", "writer/x")


@pytest.mark.parametrize("file", ["README.md", "config.json", "runs/events.out.tfevents"])
def test_file_that_holds_the_token_is_not_published(main, run_copy, file):
    with open(run_copy / file, "a") as opened:
        opened.write(f"\n{TOKEN}" if file != "config.json" else " " * 3)
    if file == "config.json":
        config = json.loads((run_copy / file).read_text())
        (run_copy / file).write_text(json.dumps({**config, "hub_token": TOKEN}))
    line = main(run_copy, "writer/x")
    assert file in line and TOKEN not in line


def test_card_with_broken_metadata_is_refused(hub, run_copy):
    (run_copy / "README.md").write_text("---\nlicense: [\n---\n")
    assert_fails(publish(hub, run_copy, "writer/card"), "README.md")
    assert state(hub, "writer/card") == []


@pytest.mark.parametrize(
    "secret",
    [READ_TOKEN, f"Bearer {'x' * 40}", "https://user:password@hub", f"https://storage/x?{HubServer.SIGNATURE}"],
)
def test_error_messages_hide_secrets(secret):
    for error in (UserError(f"see {secret}"), hub_error(OSError(28, f"No space left: {secret}"))):
        assert "[hidden]" in str(error)
        for part in (READ_TOKEN, "x" * 40, "password", HubServer.SIGNATURE):
            assert part not in str(error)


def test_command_says_in_one_line_what_is_wrong(capsys):
    def fails_with(error):
        @command
        def main():
            raise error

        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().err

    with pytest.raises(StrictDataclassError) as raised:
        DCAConfig(last_k=0)
    assert fails_with(raised.value) == (2, "error: `last_k` is 0; it must be at least 1.\n")
    assert fails_with(UserError("two\nlines")) == (2, "error: two lines\n")
    assert fails_with(KeyboardInterrupt()) == (130, "error: interrupted\n")


def test_command_lets_faults_of_the_code_pass():
    @command
    def main():
        raise TypeError("a fault")

    with pytest.raises(TypeError, match="a fault"):
        main()


@pytest.fixture
def here(hub):
    """The hub, to which this process talks, too, and someone who may write."""
    with hub.reached(TOKEN):
        yield hub


def refused(capsys, *arguments):
    """The sentence with which the command ends in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(publish_command.main, *arguments)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_branch_is_published_and_main_stays(here, run_copy, capsys):
    with open(run_copy / "README.md", "a") as card:
        card.write(
            'model = X.from_pretrained("runs/text", trust_remote_code=True)\ny = Y.from_pretrained("runs/text")\n'
        )
    call(publish_command.main, run_copy, "writer/branches")
    repository = here.repositories["writer/branches"]
    before = list(repository.commits)
    (run_copy / "all_results.json").write_text('{"perplexity": 9}')
    for revision in ("experiment", "experiments/2"):  # which are both made
        capsys.readouterr()
        call(publish_command.main, run_copy, "writer/branches", f"--revision={revision}")
        url, line = capsys.readouterr().out.splitlines()
        assert url == f"{here.url}/writer/branches/tree/{revision}"
        assert f'from_pretrained("writer/branches", revision="{revision}", trust_remote_code=True)' in line
    (run_copy / "all_results.json").write_text('{"perplexity": 8}')
    call(publish_command.main, run_copy, "writer/branches", "--revision=experiment")
    assert repository.commits == before
    messages = [commit.message for commit in repository.branches["experiment"]]
    assert messages == [*(commit.message for commit in before), "Publish text", "Publish text"]
    files = repository.branches["experiment"][-1].files
    assert (
        files["all_results.json"]
        == b'{"perplexity": 8}'
        != repository.branches["experiments/2"][-1].files["all_results.json"]
    )
    card = files["README.md"].decode()
    assert 'X.from_pretrained("writer/branches", revision="experiment", trust_remote_code=True)' in card
    assert 'Y.from_pretrained("writer/branches", revision="experiment")' in card
    assert "revision" not in before[-1].files["README.md"].decode()


def test_main_can_be_named(here, run_copy):
    call(publish_command.main, run_copy, "writer/main", "--revision=main")
    assert "model.safetensors" in here.repositories["writer/main"].commits[-1].files
    assert here.repositories["writer/main"].branches == {}


@pytest.mark.parametrize(
    ("revision", "word"), [("v1", "not a branch"), ("0" * 40, "not a branch"), ("a b", "status 400")]
)
def test_revision_that_is_no_branch_is_refused(here, run_copy, capsys, revision, word):
    first = Commit("0" * 40, "initial commit", {})
    here.repositories["writer/tagged"] = Repository(False, [first], tags={"v1": first})
    line = refused(capsys, run_copy, "writer/tagged", f"--revision={revision}")
    assert word in line and (revision in line)
    assert here.repositories["writer/tagged"] == Repository(False, [first], tags={"v1": first})


def test_what_another_model_left_is_not_taken_for_a_part_of_the_new_one(here, run_copy):
    call(publish_command.main, run_copy, "writer/mixed")
    commits = here.repositories["writer/mixed"].commits
    theirs = {"LICENSE": b"mine", "onnx/model.onnx": b"mine", "notes.txt": b"mine", "old.gguf": b"mine"}
    outdated = {
        "adapter_config.json": b"{}",
        "chat_template.jinja": b"old",
        "vocab.txt": b"old",
        "eval_results.json": b"{}",
        "runs/old/events.out.tfevents.1": b"old",
    }
    commits.append(Commit("2" * 40, "by hand", {**commits[-1].files, **theirs, **outdated}))
    (run_copy / "all_results.json").write_text('{"perplexity": 9}')
    call(publish_command.main, run_copy, "writer/mixed")
    assert theirs.items() <= commits[-1].files.items()
    assert not outdated.keys() & commits[-1].files.keys()
    assert ".gitattributes" in commits[-1].files


def test_model_that_is_not_of_this_project_is_not_replaced(here, run_copy, capsys):
    llama = Commit("0" * 40, "Llama", {"config.json": b"{}", "model.safetensors": b"theirs", "README.md": b"Theirs"})
    here.repositories["writer/llama"] = Repository(False, [llama])
    line = refused(capsys, run_copy, "writer/llama")
    assert "holds a model that this command did not publish" in line and "another revision" in line
    # A branch is another place; what it began with is not lost.
    call(publish_command.main, run_copy, "writer/llama", "--revision=dca")
    assert here.repositories["writer/llama"].commits == [llama]
    assert "configuration_dca.py" in here.repositories["writer/llama"].branches["dca"][-1].files


def test_files_of_which_nothing_is_known_stay_here(here, run_copy):
    for name in ("nohup.out", "slurm-1.log", "emissions.csv", "x.pt", "wandb/run.wandb"):
        (run_copy / name).parent.mkdir(exist_ok=True)
        (run_copy / name).write_text("who knows")
    call(publish_command.main, run_copy, "writer/known")
    assert b"who knows" not in here.repositories["writer/known"].commits[-1].files.values()


def test_local_path_in_an_unexpected_file_is_refused(here, run_copy, capsys):
    (run_copy / "all_results.json").write_text(json.dumps({"of": f"{run_copy}/x"}))
    line = refused(capsys, run_copy, "writer/path")
    assert "all_results.json holds a path below" in line and state(here, "writer/path") == []


def test_nothing_that_is_published_tells_of_the_machine(here, tmp_path, monkeypatch):
    room = tmp_path / "telling-folder"
    room.mkdir()
    write_room(room)
    monkeypatch.chdir(room)
    monkeypatch.setattr(socket, "gethostname", lambda: "telling-host.example.org")
    monkeypatch.setenv("HOME", str(room))
    data = ("--dataset=telling-data/text.jsonl", f"--eval_dataset={room}/held_out.jsonl", "--report_to=tensorboard")
    best = ("--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", "--metric_for_best_model=loss")
    (room / "telling-data").mkdir()
    (room / "text.jsonl").rename(room / "telling-data" / "text.jsonl")
    call(causal_lm.main, TEXT_RUN, f"--output_dir={room}/telling-runs/first", "--max_steps=4", *data, *best)
    first = ("--initial_checkpoint=telling-runs/first", "--tokenizer=telling-runs/first")
    call(causal_lm.main, TEXT_RUN, "--output_dir=telling-runs/second", "--max_steps=4", *first, *data, *best)
    monkeypatch.chdir(tmp_path)  # where nothing of it is found by the names that the run has
    for name in ("first", "second"):
        before = snapshot(room)
        call(publish_command.main, room / "telling-runs" / name, f"writer/{name}-model")
        assert snapshot(room) == before
        files = here.repositories[f"writer/{name}-model"].commits[-1].files
        for path, content in files.items():
            assert "telling" not in path and b"telling" not in content, path
            assert str(tmp_path).encode() not in content, path
        assert files["README.md"].decode().count(f"{name}-model") == 4  # title, index, and twice in the code
        record = yaml.safe_load(files["run.yaml"])
        assert record["data"]["dataset"] == "text.jsonl" and record["training"]["learning_rate"] == 0.01
        assert json.loads(files["trainer_state.json"])["best_model_checkpoint"].startswith("checkpoint-")
        logs = [path for path in files if "tfevents" in path]
        assert len(logs) == 2
        losses = []
        for path in logs:
            log = tmp_path / "logs" / name / path
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(files[path])
            read = EventAccumulator(str(log)).Reload()
            assert read.Tags()["tensors"] == []
            losses += [
                value.step for tag in read.Tags()["scalars"] if tag == "train/loss" for value in read.Scalars(tag)
            ]
        assert losses == [1, 2, 3, 4]


def runs_in(folder, monkeypatch):
    write_room(folder)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("options", "token", "words"),
    [
        (["--hub_model_id=writer/public", "--hub_private_repo=true"], TOKEN, ["writer/public exists and is public"]),
        (
            ["--hub_model_id=writer/private", "--hub_private_repo=false"],
            TOKEN,
            ["writer/private exists and is private"],
        ),
        (["--hub_model_id=somebody/model"], TOKEN, ["write access", "status 403"]),
        (["--hub_model_id=somebody/new"], TOKEN, ["write access", "somebody"]),
        (["--hub_model_id=writer/public"], READ_TOKEN, ["write access", "status 403"]),
        (["--hub_model_id=writer/public"], WRONG_TOKEN, ["rejected", "status 401"]),
        (["--hub_model_id=writer/public"], ODD_TOKEN, ["characters"]),
        (["--hub_model_id=writer/public"], "", ["no access token"]),
        (["--hub_model_id=writer/public", "--hub_revision=v1"], TOKEN, ["'v1'", "is not a branch"]),
        (["--hub_model_id=writer/public", "--hub_revision=refs/pr/1"], TOKEN, ["'refs/pr/1'", "is not a branch"]),
        (["--hub_model_id=writer/public", "--hub_revision=a b"], TOKEN, ["status 400"]),
        (["--hub_model_id=writer/theirs"], TOKEN, ["this command did not publish"]),
        (["--hub_model_id=a/b/c"], TOKEN, ["'a/b/c'"]),
        (["--hub_model_id=https://huggingface.co/writer/x"], TOKEN, ["'https://huggingface.co/writer/x'"]),
        (["--output_dir=my run"], TOKEN, ["'my run'"]),
        (["--trackio_space_id=writer/logs"], TOKEN, ["`trackio_space_id` is 'writer/logs'", "`report_to`"]),
    ],
)
def test_run_that_could_not_be_published_is_not_started(here, tmp_path, monkeypatch, capsys, options, token, words):
    first = Commit("0" * 40, "initial commit", {})
    theirs = Commit("0" * 40, "Llama", {"config.json": b"{}"})
    before = {
        "writer/public": Repository(False, [first], tags={"v1": first}),
        "writer/private": Repository(True, [first]),
        "writer/theirs": Repository(False, [theirs]),
        "somebody/model": here.repositories["somebody/model"],
    }
    monkeypatch.setattr(here, "repositories", dict(before))
    runs_in(tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", "--push_to_hub", *options)
    assert not [word for word in words if word not in line], line
    assert not [secret for secret in SECRETS if secret in line]
    assert here.repositories == before


def test_run_is_published_on_its_branch(here, tmp_path, monkeypatch, capsys):
    runs_in(tmp_path, monkeypatch)
    push = (
        "--max_steps=1",
        "--push_to_hub",
        "--hub_revision=experiment",
        "--hub_private_repo=true",
        "--hub_always_push",
    )
    call(causal_lm.main, TEXT_RUN, "--output_dir=tiny-run", *push)  # its name, among the writer's
    repository = here.repositories["writer/tiny-run"]
    assert repository.private and len(repository.commits) == 1
    assert len(repository.branches["experiment"]) == 2
    assert "model.safetensors" in repository.branches["experiment"][-1].files
    assert f"{here.url}/writer/tiny-run/tree/experiment" in capsys.readouterr().out
    record = yaml.safe_load((tmp_path / "tiny-run" / "run.yaml").read_text())["training"]
    assert record["hub_revision"] == "experiment" and "hub_model_id" not in record


def test_push_that_fails_after_the_training_says_how_to_publish_the_run(here, tmp_path, monkeypatch, capsys):
    runs_in(tmp_path, monkeypatch)
    options = ("--push_to_hub", "--hub_model_id=writer/late", "--hub_revision=b", "--max_steps=1")
    with here.failing("POST .*/commit/", status=403):
        line = failure(capsys, causal_lm.main, TEXT_RUN, "--output_dir=run", *options)
    assert "The run in run is complete" in line and "status 403" in line
    assert "`python -m training.publish run writer/late --revision b`" in line
    call(publish_command.main, "run", "writer/late", "--revision", "b")
    assert "model.safetensors" in here.repositories["writer/late"].branches["b"][-1].files


def test_run_that_is_resumed_and_not_finished_is_not_published(here, tmp_path, monkeypatch, capsys):
    runs_in(tmp_path, monkeypatch)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "evaluate", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # with new weights in the folder already
            call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=3", "--resume_from_checkpoint")
    assert "has no README.md: only the folder of a finished run" in refused(capsys, "run", "writer/unfinished")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=3", "--resume_from_checkpoint")
    call(publish_command.main, "run", "writer/finished")
    assert b"trained for 3 steps" in here.repositories["writer/finished"].commits[-1].files["README.md"]


def test_configuration_that_tells_where_it_came_from(here, run_copy):
    path = "/data/telling/llama"
    for file in ("config.json", "tokenizer_config.json"):
        fields = json.loads((run_copy / file).read_text())
        fields |= {"_name_or_path": path, "tokenizer_file": f"{path}/x", "source_config": {"name_or_path": path}}
        fields |= {"id2label": {"0": "/m/01g317", "1": "a/b/c"}, "base_model_name_or_path": "user/model"}
        (run_copy / file).write_text(json.dumps(fields))
    (run_copy / "logs").mkdir()
    shutil.move(run_copy / "runs" / "events.out.tfevents", run_copy / "logs" / "events.out.tfevents.12.host.34.0")
    call(publish_command.main, run_copy, "writer/origin")
    files = here.repositories["writer/origin"].commits[-1].files
    for file in ("config.json", "tokenizer_config.json"):
        published = json.loads(files[file])
        assert published["_name_or_path"] == published["source_config"]["name_or_path"] == "llama"
        assert published["tokenizer_file"] == "x" and published["base_model_name_or_path"] == "user/model"
        assert published["id2label"] == {"0": "/m/01g317", "1": "a/b/c"}
    assert not [path for path, content in files.items() if b"telling" in content or "host" in path]


def test_log_that_was_cut_off_is_published_as_far_as_it_goes(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        writer.add_text("args", "a secret")
        for step in range(3):
            writer.add_scalar("loss", 1.5, step)
    (log,) = tmp_path.iterdir()
    whole = training.results.hub.published_log(log)
    assert b"secret" in log.read_bytes() and b"secret" not in whole
    log.write_bytes(log.read_bytes()[:-5])
    cut = training.results.hub.published_log(log)
    assert whole.startswith(cut) and 0 < len(cut) < len(whole)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *[(path, "x.jsonl") for path in ("/home/me/x.jsonl", "~/x.jsonl", "../x.jsonl", "a/b/x.jsonl")],
        *[("data/x.jsonl", "x.jsonl"), ("data/*.txt", "*.txt"), ("there/corpus", "corpus")],
        *[(name, name) for name in ("user/corpus", "stdlib", "x.jsonl", "https://host/x.jsonl", 3, None, True)],
    ],
)
def test_what_is_a_local_path(tmp_path, value, name):
    (tmp_path / "there" / "corpus").mkdir(parents=True)
    assert training.results.hub.public_name({"field": [value]}, tmp_path / "runs" / "text") == {"field": [name]}


def test_tokens_are_sent_in_the_authorization_header_of_the_api_alone(hub, pushed):
    assert TOKEN in str([request.headers for request in hub.requests])
    for request in hub.requests:
        headers = dict(request.headers)
        authorization = headers.pop("authorization", None)
        assert not (request.path.startswith("/storage") and authorization)
        sent = (request.path + json.dumps(headers)).encode() + request.body
        assert not [token for token in TOKENS if token.encode() in sent]
    for repository in hub.repositories.values():
        for commit in repository.commits:
            assert not [token for token in TOKENS if token.encode() in b"".join(commit.files.values())]
