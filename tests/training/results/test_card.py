"""The model card: its figures are the run's, its code runs, and nothing of the template is left in it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from modeling_dca import DCAForCausalLM
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, call, image, weights, write_images, write_jsonl
from training import causal_lm, image_classification
from training.results import figures
from training.results.card import METRICS, origin, verdict, write_card
from training.run.parsing import parse_run
from training.text import task
from training.text.fields import CausalLMArguments, TextDataArguments


pytestmark = pytest.mark.usefixtures("offline", "figures")


@pytest.fixture
def text_run(comparison, tmp_path, monkeypatch):
    """A finished comparison of language models, to be changed by a test."""
    shutil.copytree(comparison[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def image_run(room):
    write_images(room / "images")
    call(image_classification.main, IMAGE_RUN, "--output_dir=run", "--residual_scheme=grn_v3", "--last_k=1")
    return room / "run"


def card_of(run):
    return (run / "README.md").read_text(encoding="utf-8")


def results_table(card):
    """The rows of the table of results, by the name of the model."""
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d. |]+) \|$", card, flags=re.MULTILINE)
    return {
        name: (int(parameters.replace(",", "")), [float(value) for value in values.split(" | ")])
        for name, parameters, values in rows
    }


def count(run):
    return sum(weight.numel() for weight in weights(run).values())


@pytest.mark.parametrize("kind", ["text_run", "image_run"])
def test_card_is_whole(kind, request):
    run = request.getfixturevalue(kind)
    card = card_of(run)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#|TODO|TBD|\[More|Undefined|\bNone\b|\bnan\b|\bYOUR_", card)
    assert not re.search(r"\n{4,}", card) and "|\n\n|" not in card  # tables in one piece
    pictures = re.findall(r"!\[.+\]\((.+)\)", card)
    assert pictures == ["loss_curve.png", "depth_weights.png"]
    for picture in pictures:
        with Image.open(run / picture) as opened:
            opened.load()
            assert opened.format == "PNG" and min(opened.size) >= 400
    headings = re.findall(r"^## (.*)$", card, flags=re.MULTILINE)
    assert headings == ["Results", "How to use it", "Data", "Training", "Limits", "Citation"]


@pytest.mark.parametrize("kind", ["text_run", "image_run"])
def test_figures_of_a_card_are_those_of_the_run(kind, request):
    run = request.getfixturevalue(kind)
    folders = {"dca": run, "standard": run / "standard"} if kind == "text_run" else {"1-grn_v3": run}
    task = "text-generation" if kind == "text_run" else "image-classification"
    table = results_table(card_of(run))
    assert list(table) == list(folders)
    for name, folder in folders.items():
        results = json.loads((folder / "all_results.json").read_text())
        assert table[name][0] == count(folder)
        assert table[name][1] == [pytest.approx(results[key], abs=5e-5) for key, _, _ in METRICS[task]]
    assert f"has {count(run):,} parameters and was trained for 6 steps" in card_of(run)


@pytest.mark.parametrize("kind", ["text_run", "image_run"])
def test_metadata_of_a_card(kind, request):
    run = request.getfixturevalue(kind)
    card = ModelCard.load(run / "README.md")
    task = "text-generation" if kind == "text_run" else "image-classification"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == task
    assert card.data.license == "apache-2.0" and "deep-cross-attention" in card.data.tags
    assert card.data.datasets is None  # the data is not on the Hub
    scheme = "dca" if kind == "text_run" else "grn_v3"
    expected = ["deep-cross-attention", "dca", "residual-connections", "custom_code", scheme]
    assert card.data.tags == list(dict.fromkeys(expected))
    results = json.loads((run / "all_results.json").read_text())
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        key.removeprefix("eval_"): pytest.approx(results[key], abs=1e-6) for key, _, _ in METRICS[task]
    }
    assert {result.dataset_name for result in card.data.eval_results} == {
        "text.jsonl" if kind == "text_run" else "images"
    }
    # What the Hub reads: plain YAML, in which nothing is a Python object.
    plain = yaml.safe_load(card_of(run).split("---\n")[1])
    assert plain["model-index"][0]["name"] == "run" and plain["model-index"][0]["results"]


def test_card_names_license_and_data_set_of_the_hub(room, monkeypatch):
    monkeypatch.setattr(task, "is_on_the_hub", lambda name: True)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--model_license=mit", "--dataset_config=en", "--max_steps=1")
    data = ModelCard.load(room / "run" / "README.md").data
    assert data.license == "mit" and data.datasets == ["text.jsonl"]
    assert "Trained on text.jsonl (en): 60 documents. Evaluated on 7 documents" in card_of(room / "run")


@pytest.mark.parametrize("kind", ["text_run", "image_run"])
def test_code_of_a_card_runs(kind, request, capsys):
    run = request.getfixturevalue(kind)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(run), flags=re.DOTALL)
    assert code.count('from_pretrained("run"') == 2
    capsys.readouterr()
    exec(code, names := {})
    printed = capsys.readouterr().out
    assert names["model"].config.residual_scheme == ("dca" if kind == "text_run" else "grn_v3")
    assert printed.strip()
    if kind == "image_run":
        assert printed.strip() in ("even", "odd")


def test_card_tells_how_the_run_was_trained(text_run):
    card = card_of(text_run)
    for name, value in (
        ("max_steps", 6),
        ("per_device_train_batch_size", 4),
        ("learning_rate", 0.01),
        ("lr_scheduler_type", "inverse_sqrt"),
        ("weight_decay", 0.1),
        ("adam_beta2", 0.98),
        ("seed", 1),
    ):
        assert re.search(rf"^\| `{name}` \| {value}(\.0)? \|$", card, flags=re.MULTILINE), name
    (configuration,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert yaml.safe_load(configuration) == yaml.safe_load((text_run / "run.yaml").read_text())["model"]
    assert "60 documents. Evaluated on 7 documents" in card and "blocks of 16 tokens" in card
    assert "\\n" not in card.split("## Data")[1]


LESS, MORE = ("eval_loss", "held-out loss", True), ("eval_accuracy", "held-out accuracy", False)


@pytest.mark.parametrize(
    ("metric", "own", "other", "sentence"),
    [
        (LESS, 2.0, 3.5, "`dca` is better than `standard`: its held-out loss is 1.5 lower."),
        (LESS, 3.5, 2.0, "`standard` is better than `dca`: its held-out loss is 1.5 lower."),
        (MORE, 0.9, 0.5, "`dca` is better than `standard`: its held-out accuracy is 0.4 higher."),
        (MORE, 0.5, 0.9, "`standard` is better than `dca`: its held-out accuracy is 0.4 higher."),
        (LESS, 2.0, 2.0, "`dca` and `standard` have the same held-out loss."),
        (MORE, 0.5, 0.5, "`dca` and `standard` have the same held-out accuracy."),
    ],
)
def test_verdict(metric, own, other, sentence):
    assert sentence in verdict(metric, {"dca": {metric[0]: own}, "standard": {metric[0]: other}})


@pytest.mark.parametrize(("own", "other", "better"), [(2.0, 3.0, "dca"), (3.0, 2.0, "standard")])
def test_verdict_of_a_card_follows_the_results(text_run, own, other, better):
    for folder, loss in ((text_run, own), (text_run / "standard", other)):
        results = json.loads((folder / "all_results.json").read_text())
        (folder / "all_results.json").write_text(json.dumps({**results, "eval_loss": loss}))
    classes = (DCAForCausalLM, TextDataArguments, CausalLMArguments)
    run = parse_run(["run/run.yaml"], "command", "A test.", *classes)
    note = {"task": "text-generation", "dataset": None, "dataset_name": "x", "data": "Data.", "prompt": "x"}
    write_card(Path("run"), run, {**note, "baseline": Path("run/standard")})
    assert re.search(
        rf"On this run `{better}` is better .* 1 lower.*Both models saw the same batches", card_of(text_run)
    )


def test_card_without_a_baseline_has_no_verdict(image_run):
    assert "better" not in card_of(image_run) and "Both models" not in card_of(image_run)


@pytest.mark.parametrize("kind", ["text_run", "image_run"])
def test_card_shows_the_whole_weight(kind, request, monkeypatch):
    """One map, which the text beside it is about, of the weights that the run recorded."""
    run = request.getfixturevalue(kind)
    weights = json.loads((run / "depth_weights.json").read_text())
    for each in weights:
        assert each["weight"] == pytest.approx([b + gate for b, gate in zip(each["b"], each["gate"])])
        assert len(each["size"]) == len(each["outputs"]) and min(each["size"]) > 0
    assert any(gate > 0 for each in weights for gate in each["gate"])
    text = " ".join(card_of(run).split())
    assert "as the mean over features and held-out data: the learned `b` plus" in text and "above, the" not in text
    shown = []
    monkeypatch.setattr(figures.plt, "close", lambda figure: shown.append(figure))
    figures.draw_depth_weights(weights, run / "again.png")
    maps = [axes for axes in shown[0].axes if axes.images]
    names = {"q": "queries", "k": "keys", "v": "values", "q, k, v": "queries, keys and values"}
    assert [axes.get_title() for axes in maps] == [names[each] for each in dict.fromkeys(w["input"] for w in weights)]
    last = maps[-1].images[0].get_array()[-1]
    assert last[0] == pytest.approx(weights[-1]["weight"][0]) and last[-1] == pytest.approx(weights[-1]["weight"][-1])
    with Image.open(run / "again.png") as again, Image.open(run / "depth_weights.png") as drawn:
        assert again.tobytes() == drawn.tobytes()


def test_card_of_a_standard_model_has_no_depth_weights(room):
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--residual_scheme=standard", "--max_steps=1")
    assert "depth_weights" not in card_of(room / "run")
    assert not (room / "run" / "depth_weights.png").exists()
    assert list(results_table(card_of(room / "run"))) == ["standard"]


@pytest.mark.parametrize(
    "text",
    [
        "quotes \" and ' and ```fences```",
        "back\\slash {{ braces }} {% raw %}",
        "# heading\n---\n| table |",
        "<b>&amp;",
    ],
)
def test_prompt_of_any_text_is_code(room, text):
    write_jsonl(room / "held_out.jsonl", [text * 9])
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--max_steps=1")
    (line,) = re.findall(r"^inputs = tokenizer\((.*), return_tensors=", card_of(room / "run"), flags=re.MULTILINE)
    assert len(eval(line)) >= 4 and (text * 9).startswith(eval(line))


def test_images_of_a_class_are_read_from_the_card(image_run):
    # The example in the card is an image of the mode that the model takes.
    assert 'Image.new("L"' in card_of(image_run) and image(0).mode == "L"


def test_card_tells_what_the_run_started_from(comparison, room):
    start = shutil.copytree(comparison[0] / "run", room / "somewhere" / "trained")
    options = (f"--initial_checkpoint={start}", "--max_steps=1", "--optim=sgd")
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", *options)
    card = ModelCard.load("run/README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "trained for 1 steps, from the weights of\na model that was trained before." in card.text
    assert (
        "The model was trained only on" not in card.text
        and "Optimizer: `sgd`" in card.text
        and "AdamW" not in card.text
    )
    assert "somewhere" not in card.content.replace('from_pretrained("run"', "")

    # What it was made from has a license of its own, which the run keeps unless it names another.
    (start / "README.md").write_text(
        "---\nlicense: other\nlicense_name: fair\nbase_model: somebody/base\nlanguage: [en, de]\n---\n# Llama\n"
    )
    call(causal_lm.main, TEXT_RUN, "--output_dir=second", *options)
    card = ModelCard.load("second/README.md")
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "fair", "somebody/base")
    assert card.data.language == ["en", "de"]
    assert "[somebody/base](https://huggingface.co/somebody/base)" in card.text
    call(causal_lm.main, TEXT_RUN, "--output_dir=third", *options, "--model_license=mit")
    data = ModelCard.load("third/README.md").data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data and data["base_model"] == "somebody/base"
    (start / "README.md").unlink()
    assert origin(str(start)) == {}


def test_card_tells_which_weights_it_is_of(room):
    best = ("--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", "--metric_for_best_model=loss")
    # (The largest loss is the first.)
    call(causal_lm.main, TEXT_RUN, "--output_dir=run", *best, "--greater_is_better=true")
    assert "trained for 6 steps.\nThese are the weights after step 2, which were selected on" in card_of(room / "run")


def test_card_tells_no_path(room):
    folder = room / "telling" / "data"
    folder.mkdir(parents=True)
    (room / "text.jsonl").rename(folder / "text.jsonl")
    data = (f"--dataset={folder}/text.jsonl", "--eval_dataset=./held_out.jsonl", "--max_steps=1")
    call(causal_lm.main, TEXT_RUN, f"--output_dir={room}/telling/run", *data)
    card = (room / "telling" / "run" / "README.md").read_text()
    assert card.count(str(room)) == card.count(f'from_pretrained("{room}/telling/run"') == 2
    assert card.count("telling") == 2 and "\n# run\n" in card and "Trained on text.jsonl: 60 documents" in card
    call(causal_lm.main, TEXT_RUN, "--output_dir=runs/demo/text", "--max_steps=1", f"--dataset={folder}/text.jsonl")
    assert "\n# demo-text\n" in (room / "runs" / "demo" / "text" / "README.md").read_text()
