"""The comparison of runs: its arithmetic, by hand; that it trains what is missing and nothing else; what it refuses."""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.training.conftest import DRAWING, drawing
from tests.training.tiny import IMAGE_RUN, TEXT_RUN, assert_same_weights, call, failure, snapshot, write_images
from training import causal_lm, compare, image_classification
from training.results.figures import draw_loss_over_time
from training.studies import report, running, statistics
from training.studies.report import describe_training
from training.studies.statistics import difference, spread, steps_to_reach
from training.studies.study import read_study


pytestmark = pytest.mark.usefixtures("offline")

ROOT = Path(__file__).parents[3]
COMMANDS = {"causal_lm": causal_lm.main, "image_classification": image_classification.main}
STUDY = {
    "title": "A study",
    "configuration": TEXT_RUN,
    "fields": {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4},
    "baseline": "standard",
    "seeds": [0, 1],
    "variants": {"standard": {"residual_scheme": "standard"}, "2-DCA": {"residual_scheme": "dca", "last_k": 2}},
}


def write_study(file="study.yaml", **changes):
    content = {name: value for name, value in {**STUDY, **changes}.items() if value is not None}
    Path(file).write_text(yaml.safe_dump(content, sort_keys=False))


class Ended:
    """A process that has ended."""

    def __init__(self, status):
        self.returncode = status

    def poll(self):
        return self.returncode


@pytest.fixture
def figures(no_figures):
    """The figures of a comparison are drawn, and not those of each of its runs."""
    with drawing({(module, name): function for (module, name), function in DRAWING.items() if module is report}):
        yield


@pytest.fixture
def started(monkeypatch):
    """The runs that are started, which are trained in the test's own process."""
    started = []

    def start(member, resume, log, environment):
        started.append((member.name, resume))
        with (
            io.TextIOWrapper(os.fdopen(os.dup(log.fileno()), "ab")) as text,
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
        ):
            try:
                call(COMMANDS[member.command], *member.arguments, *["--resume_from_checkpoint"] * resume)
            except SystemExit as exit:
                return Ended(exit.code)
        return Ended(0)

    monkeypatch.setattr(running, "start", start)
    return started


def no_start(*arguments):
    pytest.fail("A run was started.")


def raw(folder):
    return json.loads((Path(folder) / "comparison.json").read_text())


def rows(folder):
    """The cells of the table, by the name of the variant."""
    page = (Path(folder) / "README.md").read_text().partition("\n## ")[0]
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


# Of three seeds; each with the held-out losses after steps 10 and 20.
STANDARD = {0: (5.0, 4.0), 1: (5.0, 4.2), 2: (5.0, 4.4)}
DCA = {0: (4.5, 3.5), 1: (4.3, 4.1), 2: (4.9, 4.5)}


def write_run(folder, seed, losses, scheme, speed, values=6, data=(), resumed=False, **figures):
    """The folder of a run of 20 steps of 4 x 16 tokens, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    model = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    training = {"max_steps": 20, "per_device_train_batch_size": 4, "seed": seed, "output_dir": str(folder)}
    data = {"dataset": "text.jsonl", "block_size": 16, **dict(data)}
    record = {"model": {**model, "residual_scheme": scheme}, "data": data, "training": training}
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    config = {**model, "residual_scheme": scheme, "architectures": ["DCAForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(values, 3)}, folder / "model.safetensors")
    last = {"eval_loss": losses[1], "eval_perplexity": math.exp(losses[1]), "eval_bits_per_byte": losses[1] / 2}
    first = {"step": 10, "eval_loss": losses[0], "eval_perplexity": math.exp(losses[0])}
    history = [{"step": 10, "loss": losses[0] - 0.1}, first, {"step": 20, "loss": losses[1] - 0.1}]
    state = {"global_step": 20, "train_batch_size": 4, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    times = {"train_runtime": 10.0, "train_samples_per_second": 8.0, "train_steps_per_second": 2.0}
    if resumed:  # for the last five steps
        times = {"train_runtime": 2.5, "train_samples_per_second": 8.0, "train_steps_per_second": 2.0}
    if speed is not None:
        times["train_tokens_per_second"] = speed
    (folder / "all_results.json").write_text(json.dumps({**last, **times, **figures}))


@pytest.fixture
def made_up(room):
    for seed in range(3):
        write_run(room / "runs" / "plain" / f"seed-{seed}", seed, STANDARD[seed], "standard", 100.0)
        write_run(room / "runs" / "deep" / f"seed-{seed}", seed, DCA[seed], "dca", 80.0, values=7)
    return room


def made_up_runs(*variants):
    return [f"runs/{variant}/seed-{seed}" for variant in variants for seed in range(3)]


@pytest.mark.parametrize("values, apart", [(201, False), (210, True)])
def test_sizes_are_drawn_where_they_are_apart(room, figures, values, apart):
    write_run(room / "runs" / "plain", 0, STANDARD[0], "standard", 100.0, values=200)
    write_run(room / "runs" / "deep", 0, DCA[0], "dca", 80.0, values=values)
    call(compare.main, "runs/plain", "runs/deep", "--output_dir=result")
    picture = "loss_over_parameters.png"
    assert (room / "result" / picture).exists() == (picture in (room / "result" / "README.md").read_text()) == apart


def test_figures_are_those_computed_by_hand(made_up):
    call(compare.main, *made_up_runs("plain", "deep"), "--baseline=plain", "--output_dir=result")
    plain, deep = (raw("result")["variants"][name] for name in ("plain", "deep"))
    assert deep["parameters"]["mean"] == 21 and plain["parameters"]["mean"] == 18
    assert deep["steps"]["values"] == [20, 20, 20] and deep["examples"]["values"] == [20 * 4 * 16] * 3
    assert deep["eval_loss"]["mean"] == pytest.approx(4.0333333)
    assert deep["eval_loss"]["standard_deviation"] == pytest.approx(0.5033223)
    assert deep["eval_perplexity"]["mean"] == pytest.approx((math.exp(3.5) + math.exp(4.1) + math.exp(4.5)) / 3)
    # The differences are -0.5, -0.1 and 0.1; of Student's t with 2 degrees of freedom, 97.5 % lie below 4.302653.
    apart = deep["eval_loss_difference"]
    assert apart["values"] == pytest.approx([-0.5, -0.1, 0.1]) and apart["mean"] == pytest.approx(-1 / 6)
    assert apart["half_width"] == pytest.approx(4.302653 * 0.3055050 / math.sqrt(3), rel=1e-6)
    assert plain["eval_loss_difference"]["values"] == [0, 0, 0]
    # 1280 tokens at 100 and 80 a second.
    assert plain["seconds"]["mean"] == pytest.approx(12.8) and deep["seconds"]["mean"] == pytest.approx(16)
    assert raw("result")["runs"][0]["wall_time"] == 10
    # Half way between the two evaluations, but for seed 2, which never gets there.
    assert plain["reached"]["steps"] == 20 and plain["reached"]["seeds"] == 3
    reached = deep["reached"]
    assert reached["seeds"] == 2 and reached["of_seeds"] == 3
    assert reached["steps"] == pytest.approx(15) and reached["steps_ratio"] == pytest.approx(0.75)
    assert reached["seconds"] == pytest.approx(12) and reached["seconds_ratio"] == pytest.approx(12 / 12.8)


@pytest.mark.parametrize(
    ("values", "median"),
    [([3.0, math.inf, 1.0], 3.0), ([1.0, math.inf], None), ([math.inf] * 3, None), ([], None), ([1.0, 2.0], 1.5)],
)
def test_median_of_values_of_which_some_lie_beyond(values, median):
    assert statistics.censored_median(values) == median


def test_table_has_the_figures(made_up, figures, capsys):
    call(compare.main, *made_up_runs("plain", "deep"), "--baseline=plain", "--output_dir=result")
    header, table = rows("result")
    found = dict(zip(header[1:], table["deep"]))
    assert found["parameters"] == "21" and found["tokens"] == "1,280" and found["tokens/s"] == "80 ± 0"
    assert found["held-out loss (nats per token)"] == "4.0333 ± 0.5033"
    assert found["to plain"] == "-0.1667 ± 0.7589"
    assert found["time"] == "16.0 s" and found["steps to plain's loss"] == "15 (0.75; 2 of 3 seeds)"
    assert found["time to it"] == "12.0 s (0.94; 2 of 3 seeds)"
    plain = dict(zip(header[1:], table["plain"]))
    assert plain["to plain"] == "" and plain["steps to plain's loss"] == "20 (1.00)"
    assert list(table) == ["plain", "deep"]
    page, printed = (Path("result") / "README.md").read_text(), capsys.readouterr().out
    assert "4.0333 ± 0.5033" in printed
    line = "python -m training.compare " + " ".join(made_up_runs("plain", "deep"))
    assert f"{line} --baseline=plain --output_dir=result" in page and "95% confidence" in page
    assert "Data: `dataset` text.jsonl, `split_seed` 42, `block_size` 16." in page and "Seeds: 0, 1, 2 " in page
    assert "not recorded for runs that were not trained by `training.compare`" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["loss_curves.png", "loss_over_time.png", "loss_over_parameters.png"]
    for picture in pictures:
        with Image.open(Path("result") / picture) as opened:
            opened.load()
            assert opened.format == "PNG" and min(opened.size) >= 400
    assert "nan" not in page and "None" not in page


def test_figures_are_drawn_again_from_their_record(made_up, capsys, figures):
    call(compare.main, *made_up_runs("plain", "deep"), "--baseline=plain", "--output_dir=result")
    before = snapshot(Path("result"))
    pictures = [name for name in before if name.endswith(".png")]
    assert len(pictures) == 3
    for name in pictures:
        Path("result", name).unlink()
    call(compare.main, "--redraw", "result")
    assert snapshot(Path("result")) == before
    shutil.copytree("result", "again")
    call(compare.main, "--forest", "forest.png", "result", "again")
    with Image.open("forest.png") as forest:
        assert min(forest.size) >= 250  # two titles, a row each
    for file in ("gone/forest.png", "forest.words"):
        assert "`forest`" in failure(capsys, compare.main, "--forest", file, "result")
    assert "runs/plain/comparison.json cannot be" in failure(capsys, compare.main, "--forest=a.png", "runs/plain")
    Path("other").mkdir()
    for content, words in (
        (None, "other/comparison.json cannot be read (No such file or directory)"),
        ("[]", "other/comparison.json is damaged"),
        ('{"runs": [1], "baseline": "plain", "task": "text-generation"}', "is not of this command"),
    ):
        if content is not None:
            Path("other/comparison.json").write_text(content)
        there = snapshot(made_up)
        assert words in failure(capsys, compare.main, "--redraw", "other")
        assert snapshot(made_up) == there
    for arguments in ((), ("runs/plain/seed-0", "--redraw", "result")):
        assert "name a study, finished runs, or with --redraw" in failure(capsys, compare.main, *arguments).lower()


def test_baseline_that_is_never_reached(made_up, figures):
    call(compare.main, *made_up_runs("plain", "deep"), "--baseline=deep", "--output_dir=result")
    header, table = rows("result")
    # (The final losses are 3.5, 4.1 and 4.5; the other comes to 4.0, 4.2 and 4.4.)
    found = dict(zip(header[1:], table["plain"]))
    assert found["to deep"] == "+0.1667 ± 0.7589" and found["steps to deep's loss"] == "only by 1 of 3 seeds"
    shutil.rmtree("runs/plain/seed-2")
    shutil.rmtree("runs/deep/seed-2")
    runs = [f"runs/{name}/seed-{seed}" for name in ("deep", "plain") for seed in (0, 1)]
    call(compare.main, *runs, "--baseline=deep", "--output_dir=result")
    header, table = rows("result")
    assert table["plain"][-2:] == ["not reached", "not reached"]


def test_one_seed_has_no_spread(made_up, figures):
    call(compare.main, "runs/plain/seed-1", "runs/deep/seed-1", "--output_dir=result")
    header, table = rows("result")
    assert dict(zip(header[1:], table["deep"]))["to plain"] == "-0.1000"
    assert table["deep"][3] == "4.1000"
    assert "One seed says nothing about the spread" in (Path("result") / "README.md").read_text()


def test_runs_of_other_seeds_than_the_baseline_are_not_paired(made_up):
    runs = ["runs/plain/seed-0", "runs/plain/seed-1", "runs/deep/seed-1", "runs/deep/seed-2"]
    call(compare.main, *runs, "--output_dir=result")
    deep = raw("result")["variants"]["deep"]
    assert deep["eval_loss_difference"]["values"] == pytest.approx([-0.1])
    assert deep["reached"]["of_seeds"] == 1 and len(deep["eval_loss"]["values"]) == 2


@pytest.mark.parametrize(
    ("held_out", "loss", "steps"),
    [
        ([[10, 5.0, 1], [20, 4.0, 1]], 4.25, 17.5),
        ([[10, 5.0], [20, 4.0]], 4.0, 20),
        ([[10, 5.0], [20, 4.0]], 3.9, None),
        ([[10, 5.0], [20, 4.0]], 5.5, 10),  # (when, before the first evaluation, is not known)
        ([[10, 5.0], [20, 4.0], [30, 4.6], [40, 3.0]], 4.5, 15),  # the first time counts
        ([[10, 5.0], [20, math.inf], [30, 4.0]], 4.5, 30),
        ([], 4.5, None),
    ],
)
def test_steps_to_reach_a_loss(held_out, loss, steps):
    found = steps_to_reach(held_out, loss)
    assert found == steps or found == pytest.approx(steps)


def logged(*losses, every=10):
    return [[every * (index + 1), loss] for index, loss in enumerate(losses)]


def noise(length, level=3.0):
    return [level + 0.01 * (-1) ** index for index in range(length)]


@pytest.mark.parametrize(
    ("training", "spikes"),
    [
        (logged(*noise(60)), 0),
        (logged(*noise(30), 3.04, *noise(30)), 0),  # four deviations
        (logged(*noise(30), 3.07, *noise(30)), 1),
        (logged(*noise(30), 3.5, 3.4, 3.2, *noise(30)), 1),  # the same spike
        (logged(*noise(30), 3.5, *noise(40), 3.6, *noise(5)), 2),
        (logged(3.0, 9.0, *noise(30)), 0),  # too early to tell
        (logged(*noise(30), 2.0, *noise(30)), 0),  # downwards
    ],
)
def test_spikes(training, spikes):
    assert statistics.count_spikes(training) == spikes


@pytest.mark.parametrize(
    ("training", "diverged"),
    [
        (logged(*noise(60)), False),
        (logged(*noise(60), *noise(60, 3.3)), True),
        (logged(*noise(60), *noise(60, 3.15)), False),
        (logged(*noise(60), *noise(60, 5.0), *noise(60)), False),  # it came back
        (logged(9.0, 8.0, *noise(60)), False),
        ([], False),
        (logged(3.0, 9.0), False),  # too short to tell
    ],
)
def test_divergence(training, diverged):
    assert statistics.has_diverged(training) is diverged


def test_spread_and_difference():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "standard_deviation": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([1.0])["standard_deviation"] is None
    assert difference({0: 1.0}, {1: 2.0}) is None
    assert difference({0: 1.0, 1: 5.0}, {1: 2.0, 2: 0.0}) == {"mean": 3.0, "half_width": None, "values": [3.0]}
    # With one degree of freedom, 97.5 % lie below 12.7062.
    half = difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})["half_width"]
    assert half == pytest.approx(12.7062 * math.sqrt(2) / math.sqrt(2), rel=1e-5)


def test_speed_of_runs_that_did_not_measure_it_and_of_several_processes(room):
    write_run(room / "alone", 0, (5.0, 4.0), "standard", None)
    # Two processes with 4 examples each.
    write_run(room / "two", 0, (5.0, 4.0), "dca", None, train_samples_per_second=16.0)
    write_run(room / "resumed", 0, (5.0, 4.0), "grn_v1", None, resumed=True)
    call(compare.main, "alone", "two", "resumed", "--output_dir=result")
    alone, two, resumed = raw("result")["runs"]
    assert alone["speed"] == 8 * 16 and alone["examples"] == 1280 and alone["seconds"] == 10
    assert two["speed"] == 16 * 16 and two["examples"] == 2560 and two["seconds"] == 10
    assert resumed["seconds"] == resumed["wall_time"] == 10  # of which 2.5 were in the last sitting
    assert alone["wall_time"] == 10


def test_perplexity_is_drawn_over_the_time(made_up, monkeypatch):
    drawn = []

    def recorded(groups, label, baseline, file):
        drawn.append((groups, label, baseline))
        draw_loss_over_time(groups, label, baseline, file)

    monkeypatch.setattr(report, "draw_loss_over_time", recorded)
    call(compare.main, *made_up_runs("deep", "plain"), "--baseline=plain", "--output_dir=result")
    ((groups, label, baseline),) = drawn
    (runs,) = groups.values()
    assert list(runs) == ["plain", "deep"] and label == "held-out perplexity" and baseline == "plain"
    assert [point[2] for point in runs["deep"][0]["held_out"]] == pytest.approx([math.exp(4.5), math.exp(3.5)])


def test_text_is_packed_once_for_all_runs(room, started, monkeypatch):
    def on_disk():
        return set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))

    start, found = running.start, [on_disk()]
    monkeypatch.setattr(running, "start", lambda *run: (start(*run), found.append(on_disk()))[0])
    write_study("study.yaml")
    call(compare.main, "study.yaml")
    before, *after = found
    assert len(after) == len(started) == 4 and before < after[0] and all(each == after[0] for each in after)


def test_groups_are_compared_each_with_its_own_baseline(room, figures, started, monkeypatch):
    file = "configuration/evidence/study.yaml"
    (room / "configuration" / "evidence").mkdir(parents=True)
    groups = {"thin": {"hidden_size": 16}, "wide": {"hidden_size": 32, "block_size": 8}}
    write_study(file, configuration=os.path.relpath(TEXT_RUN, "configuration/evidence"), groups=groups)
    call(compare.main, file)
    folder = room / "runs" / "evidence" / "study"
    assert (folder / "wide" / "2-DCA" / "seed-1" / "model.safetensors").exists()
    found = raw(folder)
    by_name = {(run["group"], run["variant"], run["seed"]): run for run in found["runs"]}
    assert {(group, run["width"]) for (group, _, _), run in by_name.items()} == {("thin", 16), ("wide", 32)}
    for group in groups:
        differences = [
            by_name[group, "2-DCA", seed]["eval_loss"] - by_name[group, "standard", seed]["eval_loss"]
            for seed in (0, 1)
        ]
        assert found["groups"][group]["2-DCA"]["eval_loss_difference"]["values"] == pytest.approx(differences)
    _, table = rows(folder)
    assert list(table) == [f"{group}, {variant}" for group in groups for variant in STUDY["variants"]]
    page = (folder / "README.md").read_text()
    assert re.search(r"- Data of thin: .*`block_size` 16", page) and re.search(
        r"- Data of wide: .*`block_size` 8", page
    )
    assert "loss_over_parameters.png" in page

    # Another study has those of the same name, and trains what is new alone.
    monkeypatch.setattr(running, "start", no_start)
    other = {"groups": {"thin": groups["thin"]}, "runs_of": "study.yaml"}
    write_study(
        "configuration/evidence/other.yaml", configuration=os.path.relpath(TEXT_RUN, "configuration/evidence"), **other
    )
    call(compare.main, "configuration/evidence/other.yaml")
    assert raw("runs/evidence/other")["groups"] == {"thin": found["groups"]["thin"]}
    # (All groups have one size.)
    assert "loss_over_parameters.png" not in (room / "runs" / "evidence" / "other" / "README.md").read_text()


def test_study_is_trained_and_then_kept(room, started, monkeypatch, capsys):
    (room / "configuration" / "evidence").mkdir(parents=True)
    write_study("configuration/evidence/study.yaml", configuration="../../text.yaml", baseline=None)
    # The configuration trains a baseline of its own, which the study has no need of.
    content = yaml.safe_load((room / TEXT_RUN).read_text())
    content["training"]["baseline"] = "grn_v1"
    (room / TEXT_RUN).write_text(yaml.safe_dump(content))
    call(compare.main, "configuration/evidence/study.yaml")
    assert started == [(f"{name}, seed {seed}", False) for seed in (0, 1) for name in ("standard", "2-DCA")]
    folder = room / "runs" / "evidence" / "study"
    assert not list(folder.glob("*/seed-*/grn_v1"))
    found = raw(folder)
    assert [run["folder"] for run in found["runs"]] == [
        f"runs/evidence/study/{name}/seed-{seed}" for seed in (0, 1) for name in ("standard", "2-DCA")
    ]
    for run in found["runs"]:
        own = json.loads((Path(run["folder"]) / "all_results.json").read_text())
        assert all(run[key] == own[key] for key in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"))
        assert [step for step, *_ in run["held_out"]] == [2, 4] and run["steps"] == 4
        assert run["examples"] == 4 * 4 * 16 and run["scheme"] == (
            "standard" if run["variant"] == "standard" else "2-dca"
        )
        assert len(run["training"]) == 4 and run["sittings"][0]["at_a_time"] == 1
    page = (folder / "README.md").read_text()
    assert "# A study" in page and "one run at a time" in page and "python -m training.compare configuration/" in page
    assert "whole after" in capsys.readouterr().out and found["variants"]["2-DCA"]["seeds"] == [0, 1]
    command = found["runs"][1]["command"]
    assert command.startswith("python -m training.causal_lm text.yaml ") and "--last_k=2" in command

    # Nothing is left to train.
    monkeypatch.setattr(running, "start", no_start)
    before = snapshot(folder / "2-DCA")
    call(compare.main, "configuration/evidence/study.yaml", "--output_dir=elsewhere")
    assert snapshot(folder / "2-DCA") == before and raw("elsewhere")["variants"] == found["variants"]

    # The folders alone are compared to the same figures.
    runs = sorted(map(str, Path("runs/evidence/study").glob("*/seed-*")))
    call(compare.main, *runs, "--output_dir=folders")
    assert raw("folders")["baseline"] == "standard"
    alone = raw("folders")["variants"]
    assert alone["2-DCA"]["eval_loss_difference"] == found["variants"]["2-DCA"]["eval_loss_difference"]


def test_run_that_was_cut_off_is_resumed_to_the_same(room, started):
    write_study(seeds=[0])
    call(compare.main, "study.yaml")
    run = room / "runs" / "study" / "2-DCA" / "seed-0"
    shutil.copytree(run, room / "whole")
    before = raw("runs/study")
    for path in ("all_results.json", "model.safetensors", "README.md", "trainer_state.json"):
        (run / path).unlink()
    shutil.rmtree(run / "checkpoint-4")
    started.clear()
    call(compare.main, "study.yaml")
    assert started == [("2-DCA, seed 0", True)]
    assert_same_weights(run, room / "whole")
    after = raw("runs/study")
    assert after["runs"][1]["held_out"] == before["runs"][1]["held_out"]
    assert len(after["runs"][1]["sittings"]) == 2 and len(after["runs"][0]["sittings"]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fields": {**STUDY["fields"], "learning_rate": 0.02}}, ["`learning_rate`", "0.01", "0.02"]),
        ({"fields": {**STUDY["fields"], "hidden_size": 32}}, ["`hidden_size`", "16", "32"]),
        ({"fields": {"max_steps": 4}}, ["`eval_strategy`", "not named"]),
        ({"fields": {**STUDY["fields"], "adam_beta1": 0.8}}, ["`adam_beta1`", "it was not named, and now is 0.8"]),
        ({"variants": {**STUDY["variants"], "2-DCA": {"residual_scheme": "dca", "last_k": 1}}}, ["`last_k`", "2-DCA"]),
    ],
)
def test_run_that_is_another_now_is_refused(room, started, monkeypatch, capsys, changes, words):
    write_study(seeds=[0], variants={"2-DCA": STUDY["variants"]["2-DCA"]}, baseline="2-DCA")
    call(compare.main, "study.yaml")
    monkeypatch.setattr(running, "start", no_start)
    write_study(**changes)
    before = snapshot(room)
    line = failure(capsys, compare.main, "study.yaml")
    assert not [word for word in ("runs/study/2-DCA/seed-0 was started with", *words) if word not in line], line
    assert snapshot(room) == before


def test_runs_on_record_are_not_trained_again(room, started):
    write_study()
    call(compare.main, "study.yaml")
    before = raw("runs/study")
    shutil.move("runs/study", "published")
    # Other names, and one of the variants is another now.
    variants = {
        "plain": STUDY["variants"]["standard"],
        "deep": {"residual_scheme": "dca"},
        "k = 2": STUDY["variants"]["2-DCA"],
    }
    write_study("more.yaml", seeds=[0, 1], variants=variants, baseline="plain", groups={"16 wide": {}})
    started.clear()
    call(compare.main, "more.yaml", "--recorded=published/comparison.json")
    assert started == [("16 wide, deep, seed 0", False), ("16 wide, deep, seed 1", False)]
    after = raw("runs/more")
    names = {"standard": "plain", "2-DCA": "k = 2"}
    taken = [{**run, "group": "16 wide", "variant": names[run["variant"]]} for run in before["runs"]]
    assert [run for run in after["runs"] if run["variant"] != "deep"] == taken
    figures, old = after["groups"]["16 wide"]["k = 2"], before["variants"]["2-DCA"]
    assert figures["eval_loss"] == old["eval_loss"] and figures["eval_loss_difference"] == old["eval_loss_difference"]
    assert "--recorded" in (room / "runs" / "more" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"fields": {**STUDY["fields"], "hidden_size": 32}}, [], ["none of the runs of this study"]),
        ({"seeds": [7]}, [], ["none of the runs of this study"]),
        ({"seeds": [0]}, ["--output_dir=published"], ["has runs that this study has not", "`output_dir`"]),
        ({}, ["--recorded=gone.json"], ["gone.json cannot be read (No such file"]),
        (
            {},
            ["--recorded=published/README.md"],
            ["published/README.md is damaged (Expecting value", "name the `comparison.json`"],
        ),
        (
            {},
            ["--recorded=published/list.json"],
            ["published/list.json is damaged (it holds list", "name the `comparison.json`"],
        ),
        ({}, ["--recorded=published/runs.json"], ["'published/runs.json'", "no `comparison.json`"]),
        ({}, ["--recorded=published/named.json"], ["'published/named.json'", "no `comparison.json`"]),
        ({}, [], ["published/comparison.json is of another release", "lacks 'scheme'"]),
    ],
)
def test_record_that_does_not_fit_is_refused(room, monkeypatch, capsys, changes, arguments, words):
    write_study(seeds=[0, 1])
    runs = [
        {"group": member.group, "variant": member.variant, "seed": member.seed, "named": member.run.named}
        for member in read_study(Path("study.yaml")).members
    ]
    Path("published").mkdir()
    for name, text in {
        "comparison.json": json.dumps({"runs": runs}),
        "list.json": "[]",
        "runs.json": '{"runs": [7]}',
        "named.json": '{"runs": [{"named": {"training": []}}]}',
        "README.md": "# A study",
    }.items():
        Path("published", name).write_text(text)
    monkeypatch.setattr(running, "start", no_start)
    write_study(**changes)
    before = snapshot(room)
    line = failure(capsys, compare.main, "study.yaml", "--recorded=published/comparison.json", *arguments)
    assert not [word for word in words if word not in line], line
    assert snapshot(room) == before


def test_failing_run_is_named_and_the_others_go_on(room, started, capsys):
    write_study(groups={"a": {}, "b": {"dataset": "gone.jsonl"}}, seeds=[3])
    line = failure(capsys, compare.main, "study.yaml")
    assert "The run b, standard, seed 3 failed (1 more failed, see above): " in line and "'gone.jsonl'" in line
    assert "exit status 2" in line
    assert [name for name, _ in started] == [
        f"{group}, {name}, seed 3" for group in "ab" for name in STUDY["variants"]
    ]
    assert list(raw("runs/study")["groups"]) == ["a"] and list(raw("runs/study")["groups"]["a"]) == list(
        STUDY["variants"]
    )
    page = (room / "runs" / "study" / "README.md").read_text()
    assert re.search(r"## Runs that failed\n\n- b, standard, seed 3: The data file", page)


def test_run_that_diverges_is_a_result_and_not_tried_again(room, figures, started, monkeypatch, capsys):
    variants = {"bad": {"learning_rate": 1e30, "warmup_steps": 0}, **STUDY["variants"]}
    write_study(variants=variants, seeds=[3], fields={**STUDY["fields"], "logging_steps": 1})
    call(compare.main, "study.yaml")
    assert [name for name, _ in started] == ["bad, seed 3", "standard, seed 3", "2-DCA, seed 3"]
    assert re.search(r"bad, seed 3: diverged at step \d after", capsys.readouterr().out)
    found = raw("runs/study")
    assert list(found["variants"]) == ["standard", "2-DCA"] and not found["failed"]
    assert list(found["diverged"]) == ["bad, seed 3"] and 1 <= found["diverged"]["bad, seed 3"]["step"] <= 4
    page = (room / "runs" / "study" / "README.md").read_text()
    lines = page[page.index("## Stability") :].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    stability = {name: cells for name, *cells in table}
    # It ended before anything could be said of spikes.
    assert stability["bad"] == ["1", "1", "", ""] and stability["2-DCA"] == ["1", "0", "0", "0"]
    monkeypatch.setattr(running, "start", no_start)
    call(compare.main, "study.yaml")
    # A run that goes on is no longer one that ended.
    folder = room / "runs" / "study" / "bad" / "seed-3"
    assert (folder / "diverged.json").exists()
    # (Its learning rate is that of its checkpoints; with a warm-up it is 0 in the first step.)
    again = ("--learning_rate=1e30", "--warmup_steps=10", "--max_steps=1")
    call(causal_lm.main, TEXT_RUN, f"--output_dir={folder}", "--resume_from_checkpoint", *again)
    assert not (folder / "diverged.json").exists()


def test_last_error_of_a_log_is_of_this_sitting(room):
    Path("log").write_text("error: old\nstep 1\rstep 2\nTraceback\nValueError: new\n\n")
    assert running.last_error(Path("log"), 0) == "old"
    assert running.last_error(Path("log"), 11) == "ValueError: new"
    assert running.last_error(Path("log"), 10**6) == "it said nothing"


def test_run_that_another_process_trains_is_left_alone(room, started, capsys):
    write_study(seeds=[0])
    log = room / "runs" / "study" / "standard" / "logs" / "seed-0.log"
    log.parent.mkdir(parents=True)
    with log.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        line = failure(capsys, compare.main, "study.yaml")
    assert "standard, seed 0 failed: runs/study/standard/seed-0 is being trained by another process" in line
    assert [name for name, _ in started] == ["2-DCA, seed 0"]


class Running:
    """A process that goes on until it is told to end."""

    def __init__(self):
        self.returncode, self.calls = None, []

    def poll(self):
        return self.returncode

    def terminate(self):
        self.calls.append("terminate")
        self.returncode = -signal.SIGTERM

    def wait(self):
        assert self.calls == ["terminate"]
        self.calls.append("wait")


def test_interrupt_ends_all_runs(room, monkeypatch, capsys):
    write_study()
    processes, threads = [], []

    def start(member, resume, log, environment):
        processes.append(Running())
        threads.append(environment.get("OMP_NUM_THREADS"))
        return processes[-1]

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(running, "start", start)
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(SystemExit) as exit:
        call(compare.main, "study.yaml", "--jobs=3")
    assert exit.value.code == 130 and "error: interrupted" in capsys.readouterr().err
    assert [process.calls for process in processes] == [["terminate", "wait"]] * 3
    assert threads == ["4", "4", "4"]


def test_threads_that_the_user_set_are_kept(room, started, monkeypatch):
    write_study(seeds=[0])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    call(compare.main, "study.yaml", "--jobs=2")
    (sitting,) = raw("runs/study")["runs"][0]["sittings"]
    assert sitting["at_a_time"] == 2 and sitting["machine"]["threads"] == 3
    assert "threads 3" in (line := describe_training(raw("runs/study")["runs"])[0]) and "2 runs at a time" in line


def test_record_grows_with_each_run(room, started, monkeypatch, capsys):
    write_study()
    train = running.start

    def start(member, *arguments):
        if member.name == "standard, seed 1":
            raise KeyboardInterrupt
        return train(member, *arguments)

    monkeypatch.setattr(running, "start", start)
    with pytest.raises(SystemExit):
        call(compare.main, "study.yaml")
    found = raw("runs/study")
    assert [(run["variant"], run["seed"]) for run in found["runs"]] == [("standard", 0), ("2-DCA", 0)]
    assert not Path("runs/study/README.md").exists()
    # What is whole is compared, and nothing is trained.
    monkeypatch.setattr(running, "start", no_start)
    call(compare.main, "study.yaml", "--jobs=0")
    assert raw("runs/study") == found | {"command": "python -m training.compare study.yaml --jobs=0"}
    assert list(rows("runs/study")[1]) == ["standard", "2-DCA"]
    # On another machine, it goes on from the record, which is not lost where that is forgotten.
    shutil.move("runs/study", "kept")
    before = snapshot(Path("kept"))
    capsys.readouterr()
    line = failure(capsys, compare.main, "study.yaml", "--output_dir=kept")
    assert "kept/comparison.json has the only record of runs/study/standard/seed-0" in line and "--recorded" in line
    assert snapshot(Path("kept")) == before
    monkeypatch.setattr(running, "start", train)
    started.clear()
    call(compare.main, "study.yaml", "--recorded=kept/comparison.json", "--output_dir=kept")
    assert [name for name, _ in started] == ["standard, seed 1", "2-DCA, seed 1"]
    assert [run for run in raw("kept")["runs"] if run["seed"] == 0] == found["runs"]


def test_steps_are_timed_apart_from_the_runs(room, started, capsys):
    write_study(seeds=[0])
    call(compare.main, "study.yaml", "--step_rounds=2")
    found = raw("runs/study")
    times = {each["variant"]: each for each in found["step_times"]["variants"]}
    assert list(times) == ["standard", "2-DCA"] and times["standard"]["ratio"] == 1 and times["2-DCA"]["ratio"] > 0
    for name, figures in found["variants"].items():
        (run,) = [run for run in found["runs"] if run["variant"] == name]
        assert figures["seconds"]["mean"] == pytest.approx(4 * times[name]["seconds"])
        assert figures["speed"]["mean"] == pytest.approx(run["examples"] / (4 * times[name]["seconds"]))
    page = Path("runs/study/README.md").read_text()
    assert "the median of 2 rounds" in page
    # They are kept, and left aside where they are not of all variants.
    call(compare.main, "study.yaml")
    assert raw("runs/study")["step_times"] == found["step_times"]
    assert raw("runs/study")["variants"] == found["variants"]
    write_study(seeds=[0], variants={**STUDY["variants"], "DCA": {"residual_scheme": "dca"}})
    call(compare.main, "study.yaml")
    found = raw("runs/study")
    for run in found["runs"]:
        assert found["variants"][run["variant"]]["seconds"]["values"] == [run["seconds"]]


def test_image_study(room, figures, started):
    write_images(room / "images", count=40)
    fields = {**STUDY["fields"], "dataset": "images"}
    write_study(command="image_classification", configuration=IMAGE_RUN, fields=fields, seeds=[0])
    call(compare.main, "study.yaml")
    header, table = rows("runs/study")
    assert "held-out accuracy" in header and "images/s" in header and "to standard" in header
    accuracy = header.index("held-out accuracy")
    assert header[accuracy + 1] == "to standard" and table["2-DCA"][accuracy][0] in "+-"
    found = raw("runs/study")
    own = json.loads((Path(found["runs"][0]["folder"]) / "all_results.json").read_text())
    assert found["task"] == "image-classification" and found["runs"][0]["eval_accuracy"] == own["eval_accuracy"]
    assert found["runs"][0]["examples"] == 4 * 4
    # The same runs, by their folders.
    call(compare.main, *(run["folder"] for run in found["runs"]), "--output_dir=again")
    assert rows("again")[1] == table


def test_comparison_that_a_run_made_itself(comparison, tmp_path, monkeypatch):
    shutil.copytree(comparison[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    call(compare.main, "run", "run/standard")
    assert list(rows("runs/comparison")[1]) == ["dca", "standard"] and raw("runs/comparison")["baseline"] == "standard"


def test_runs_of_one_scheme_that_differ_are_variants_by_their_folders(room):
    for seed in (0, 1):
        write_run(room / f"small-{seed}", seed, STANDARD[seed], "dca", 100.0)
        write_run(room / f"large-{seed}", seed, DCA[seed], "dca", 80.0)
        change = json.loads((room / f"large-{seed}" / "config.json").read_text())
        (room / f"large-{seed}" / "config.json").write_text(json.dumps({**change, "intermediate_size": 128}))
    call(compare.main, "small-0", "small-1", "large-0", "large-1")
    found = raw("runs/comparison")
    assert {name: figures["seeds"] for name, figures in found["variants"].items()} == {
        "small-0": [0, 1],
        "large-0": [0, 1],
    }
    assert found["baseline"] == "small-0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"title": "x", "variant": {}}, ["unknown key 'variant'", "'variants'"]),
        ({"variants": {}}, ["`variants`"]),
        ({"variants": {"a/b": {}}}, ["'a/b'", "name of a folder"]),
        ({"variants": {"standard": 3}}, ["'standard'", "3"]),
        ({"fields": 3}, ["`fields`", "3"]),
        ({"groups": []}, ["`groups`", "[]"]),
        ({"groups": {"a/b": {}}}, ["'a/b'", "name of a folder"]),
        ({"groups": {"a": 3}}, ["'standard'", "group 'a'", "3"]),
        ({"groups": {"a": {"max_step": 4}}}, ["group 'a'", "'max_step'", "did you mean 'max_steps'"]),
        ({"groups": {"a": {"vocab_size": 300}, "b": {"seed": 1}}}, ["group 'b'", "not for a variant"]),
        ({"runs_of": "gone.yaml"}, ["`runs_of`", "'gone.yaml'"]),
        ({"seeds": []}, ["`seeds`"]),
        ({"seeds": [0.5]}, ["`seeds`", "0.5"]),
        ({"seeds": [1, 1]}, ["standard, seed 1", "leave one of them out"]),
        ({"baseline": "standrad"}, ["'standrad'", "did you mean 'standard'"]),
        ({"command": "causal"}, ["`command`", "causal_lm"]),
        ({"configuration": None}, ["no `configuration`"]),
        ({"configuration": "nothing.yaml"}, ["'standard'", "nothing.yaml cannot be read"]),
        ({"fields": {"max_step": 4}}, ["'max_step'", "did you mean 'max_steps'"]),
        ({"fields": {"seed": 4}}, ["'seed'", "not for a variant"]),
        ({"fields": {"push_to_hub": True}}, ["'push_to_hub'", "not for a variant"]),
        ({"fields": {"max_steps": None}}, ["no value for 'max_steps'"]),
        ({"fields": {"learning_rate": -1}}, ["'standard'", "`learning_rate` is -1"]),
        ({"variants": {"standard": {}, "x": {"block_size": 8}}}, ["`block_size` is 16 for one and 8", "x, seed 0"]),
        ({"variants": {"standard": {}, "x": {"vocab_size": 400}}}, ["`vocab_size` is 300 for one and 400"]),
    ],
)
def test_study_that_is_wrong_is_refused(room, monkeypatch, capsys, changes, words):
    monkeypatch.setattr(running, "start", no_start)
    write_study(**changes)
    before = snapshot(room)
    line = failure(capsys, compare.main, "study.yaml")
    assert not [word for word in words if word not in line], line
    assert snapshot(room) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seeds: [1]", ["the key 'seeds' twice"]),
        ("groups: {a: {max_steps: 1}, a: {max_steps: 2}}", ["the key 'a' twice"]),
    ],
)
def test_study_with_a_key_twice_is_refused(room, monkeypatch, capsys, line, words):
    monkeypatch.setattr(running, "start", no_start)
    write_study()
    (room / "study.yaml").write_text((room / "study.yaml").read_text() + line + "\n")
    line = failure(capsys, compare.main, "study.yaml")
    assert not [word for word in ("study.yaml is not a YAML file", *words) if word not in line], line


def spoil_file(room):
    (room / "runs/study/standard/seed-0").mkdir(parents=True)
    (room / "runs/study/standard/seed-0/thesis.txt").write_text("years of work")


def spoil_record(room):
    (room / "runs/study/standard/seed-0").mkdir(parents=True)
    (room / "runs/study/standard/seed-0/run.yaml").write_text("")


def spoil_sittings(room):
    folder = room / "runs/study/standard"
    for name, text in {"seed-0/run.yaml": "model: {}\ndata: {}\ntraining: {}\n", "logs/seed-0.json": "{"}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)


def spoil_divergence(room):
    member = read_study(Path("study.yaml")).members[0]
    member.folder.mkdir(parents=True)
    (member.folder / "run.yaml").write_text(yaml.safe_dump(member.run.named))
    (member.folder / "diverged.json").write_text("{}")


def spoil_output(room):
    (room / "runs/study").mkdir(parents=True)
    (room / "runs/study/README.md").write_text("# My notes")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_file, ["runs/study/standard/seed-0 is in the way"]),
        (spoil_record, ["run.yaml is damaged"]),
        (spoil_sittings, ["runs/study/standard/logs/seed-0.json is damaged", "delete it"]),
        (spoil_divergence, ["runs/study/standard/seed-0/diverged.json is damaged (it lacks step)", "trained anew"]),
        (spoil_output, ["`output_dir` is 'runs/study'", "README.md"]),
    ],
)
def test_what_is_in_the_way_is_left_alone(room, monkeypatch, capsys, spoil, words):
    monkeypatch.setattr(running, "start", no_start)
    write_study()
    spoil(room)
    before = snapshot(room)
    line = failure(capsys, compare.main, "study.yaml")
    assert not [word for word in words if word not in line], line
    assert snapshot(room) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.yaml"], ["nothing.yaml cannot be read"]),
        ([TEXT_RUN], ["text.yaml has an unknown key"]),
        (["."], [". is not the folder of a run"]),
        (["study.yaml", "runs/plain/seed-0"], ["A study is compared alone"]),
        (["study.yaml", "--jobs=-1"], ["`jobs` is -1"]),
        (["study.yaml", "--jobs=0"], ["None of the runs is whole", "--jobs 1"]),
        (["study.yaml", "--step_rounds=-1"], ["`step_rounds` is -1"]),
        (["runs/plain/seed-0", "runs/plain/seed-0"], ["are both plain, seed 0"]),
        (["runs/plain/seed-0", "--recorded=comparison.json"], ["`--recorded` goes with a study"]),
        (["runs/plain/seed-0", "--baseline=x"], ["`baseline` is 'x'"]),
        (["runs/plain/seed-0", "unfinished"], ["unfinished holds a run that is not finished"]),
        (["runs/plain/seed-0", "other-data"], ["`dataset` is 'text.jsonl' for one and 'other.jsonl'"]),
        (["runs/plain/seed-0", "--output_dir=text.jsonl/x"], ["`output_dir`", "cannot be created"]),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(made_up, capsys, arguments, words):
    write_study()
    write_run(made_up / "unfinished", 0, (5.0, 4.0), "dca", 1.0)
    (made_up / "unfinished" / "all_results.json").write_text('{"train_loss": 1}')
    write_run(made_up / "other-data", 0, (5.0, 4.0), "dca", 1.0, data={"dataset": "other.jsonl"})
    before = snapshot(made_up)
    line = failure(capsys, compare.main, *arguments)
    assert not [word for word in words if word not in line], line
    assert snapshot(made_up) == before


@pytest.mark.slow
def test_comparison_that_is_ended_is_resumed_to_the_same(room):
    """In processes of their own: SIGTERM, and SIGKILL, which leaves the runs behind."""
    fields = {"max_steps": 120, "save_steps": 5}
    write_study(seeds=[0], fields=fields)
    line = [sys.executable, "-m", "training.compare", "study.yaml", "--jobs=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    runs = [room / "runs" / "study" / name / "seed-0" for name in ("standard", "2-DCA")]

    def locked(run):
        with (run.parent / "logs" / "seed-0.log").open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def start_and_end(signal_number):
        process = subprocess.Popen(line, cwd=room, env=environment, stderr=subprocess.PIPE, text=True)
        before = [set(run.glob("checkpoint-*")) for run in runs]
        end = time.monotonic() + 120
        while not all(set(run.glob("checkpoint-*")) - old for run, old in zip(runs, before)):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal_number)
        return process, process.communicate(timeout=120)[1]

    process, printed = start_and_end(signal.SIGTERM)
    assert process.returncode == 143 and "error: terminated" in printed
    assert not any(map(locked, runs)) and not any((run / "model.safetensors").exists() for run in runs)

    process, _ = start_and_end(signal.SIGKILL)
    assert any(map(locked, runs))  # by the runs that are left behind
    end = time.monotonic() + 120
    while any(map(locked, runs)):
        assert time.monotonic() < end
        time.sleep(0.1)
    process = subprocess.run(line, cwd=room, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert all(len(run["sittings"]) >= 2 for run in raw(room / "runs" / "study")["runs"])
    for run, scheme in zip(runs, ("standard", "dca")):
        arguments = [f"--{name}={value}" for name, value in fields.items()]
        k = ["--last_k=2"] if scheme == "dca" else []
        call(
            causal_lm.main,
            TEXT_RUN,
            "--seed=0",
            f"--residual_scheme={scheme}",
            *k,
            *arguments,
            f"--output_dir={scheme}",
        )
        assert_same_weights(run, room / scheme)
