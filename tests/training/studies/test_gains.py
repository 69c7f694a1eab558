"""Studies that tune their variants alike, and what is gained at equal tokens, time and parameters."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.training.tiny import TEXT_RUN, call, failure
from training import causal_lm, compare
from training.studies import running
from training.studies.gains import gains, loss_after, loss_at_size, savings
from training.studies.report import make_gains_table, make_savings_table
from training.studies.study import read_study


STUDY = {
    "title": "Rivals",
    "configuration": TEXT_RUN,
    "fields": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "warmup_steps": 0},
    "baseline": "standard",
    "tune": {"seed": 0, "fields": {"learning_rate": [0.001, 0.01]}},
    "seeds": [1, 2],
    "variants": {
        "standard": {"residual_scheme": "standard"},
        "standard wider": {"residual_scheme": "standard", "intermediate_size": 96},
        "HC": {"variant": "hyper_connections", "variant_fields": {"n": 2}},
    },
}


def run_of(variant, seed, losses, seconds, parameters, scheme=None):
    """A run of 40 steps, evaluated after each 10."""
    held_out = [[10 * (index + 1), loss, math.exp(loss)] for index, loss in enumerate(losses)]
    figures = {"steps": 40, "seconds": seconds, "parameters": parameters, "eval_loss": losses[-1]}
    return {"variant": variant, "seed": seed, "scheme": scheme or variant, "held_out": held_out, **figures}


def test_loss_after_a_time():
    run = run_of("a", 0, [4.0, 3.0, 2.5, 2.0], 80.0, 1)  # two seconds a step
    assert loss_after(run, 80.0) == 2.0 and loss_after(run, 200.0) == 2.0
    assert loss_after(run, 50.0) == pytest.approx(2.75)
    assert loss_after(run, 20.0) == 4.0 and loss_after(run, 19.0) is None


def test_loss_at_a_size():
    runs = [run_of("a", 0, [4.0], 1.0, 1000), run_of("b", 0, [3.0], 1.0, 4000)]
    assert loss_at_size(runs, 1000) == 4.0 and loss_at_size(runs, 4000) == 3.0
    assert loss_at_size(runs, 2000) == pytest.approx(3.5)  # half way in the logarithm
    assert loss_at_size(runs, 999) is None and loss_at_size(runs, 4001) is None


def test_gains_by_hand():
    runs = [
        run_of("plain", 1, [4.0, 3.0, 2.6, 2.4], 40.0, 1000),
        run_of("plain", 2, [4.0, 3.0, 2.8, 2.6], 40.0, 1000),
        run_of("wider", 1, [4.0, 3.0, 2.5, 2.2], 50.0, 4000, "plain"),
        run_of("wider", 2, [4.0, 3.0, 2.5, 2.5], 50.0, 4000, "plain"),
        # Twice as slow: at 40 s it has taken 20 steps.
        run_of("rival", 1, [3.5, 2.5, 2.2, 2.0], 80.0, 2000),
        run_of("rival", 2, [3.5, 2.7, 2.4, 2.3], 80.0, 2000),
        # Twice as fast, and larger than all.
        run_of("fast", 1, [4.0, 3.0, 2.8, 2.7], 20.0, 5000),
        run_of("alone", 7, [1.0, 1.0, 1.0, 1.0], 20.0, 1000),
    ]
    found = gains(runs, "plain")
    assert list(found) == ["plain", "wider", "rival", "fast", "alone"]
    rival = found["rival"]
    assert rival["step_time"] == 2.0 and rival["parameters"] == 2000
    assert rival["at_equal_tokens"]["values"] == pytest.approx([-0.4, -0.3])
    assert rival["at_equal_time"]["values"] == pytest.approx([2.5 - 2.4, 2.7 - 2.6])
    assert rival["at_equal_parameters"]["values"] == pytest.approx([2.0 - 2.3, 2.3 - 2.55])
    # Of Student's t with one degree of freedom, 97.5 % lie below 12.7062; the standard error is half of the distance.
    assert rival["at_equal_tokens"]["half_width"] == pytest.approx(12.7062 * 0.05, rel=1e-4)
    fast = found["fast"]
    assert fast["at_equal_parameters"] is None and fast["at_equal_tokens"]["mean"] == pytest.approx(0.3)
    assert fast["at_equal_time"]["values"] == pytest.approx([2.7 - 3.0])  # after 20 s the other has taken 20 steps
    assert found["alone"]["at_equal_tokens"] is None and found["plain"]["at_equal_time"]["values"] == [0, 0]
    table = make_gains_table({None: found}, "plain").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table}
    assert cells["rival"][:3] == ["2,000", "2.00", "-0.3500 ± 0.6353"] and cells["rival"][3].startswith("+0.1000")
    assert cells["fast"] == ["5,000", "0.50", "+0.3000", "-0.3000", "unknown"]
    assert cells["plain"][2:] == ["", "", ""]
    assert gains(runs, "another") == {}


def test_savings_by_hand():
    def run(variant, seed, steps, loss, scheme="dca", pace=1.0):
        return {
            "variant": variant,
            "seed": seed,
            "scheme": scheme,
            "steps": steps,
            "eval_loss": loss,
            "seconds": steps * pace,
        }

    runs = [
        *(run("plain", seed, 1600, 3.0, "standard") for seed in (1, 2, 3)),
        # At 3.0 half way, in the logarithm, between 400 and 1,600 steps; and twice as slow.
        *(run(f"DCA {steps}", 1, steps, loss, pace=2.0) for steps, loss in ((1600, 2.8), (400, 3.2))),
        *(run(f"DCA {steps}", 2, steps, loss, pace=2.0) for steps, loss in ((1600, 2.7), (400, 2.9))),
        *(run(f"DCA {steps}", 3, steps, loss, pace=2.0) for steps, loss in ((1600, 3.1), (400, 3.5))),
        run("DCA 400", 4, 400, 3.0),  # there is no other of this seed
        run("2-DCA", 1, 1600, 2.9, "2-dca"),  # of one length alone
    ]
    found = savings(runs, "plain")
    assert list(found) == ["dca"]
    assert found["dca"]["values"][1] == pytest.approx((0.5, 1.0)) and found["dca"]["values"][2] == pytest.approx(
        (0.25, 0.5)
    )
    assert found["dca"]["values"][3] == (None, None)
    assert found["dca"]["steps"] == pytest.approx(0.5) and found["dca"]["time"] == pytest.approx(1.0)
    assert "| dca | 0.50 (0.50, 0.25, more) | 1.00 (1.00, 0.50, more) |" in " ".join(
        make_savings_table({None: found}).split()
    )
    assert savings(runs, "another") == {}


@pytest.fixture
def started(monkeypatch):
    """The runs that are started, which are trained in the test's own process."""
    started = []

    def start(member, resume, log, environment):
        started.append((member.name, member.run.training.learning_rate, member.folder.as_posix()))
        try:
            call(causal_lm.main, *member.arguments)
        except SystemExit as exit:
            code = exit.code
            return type("Ended", (), {"returncode": code, "poll": lambda self: code})()
        return type("Ended", (), {"returncode": 0, "poll": lambda self: 0})()

    monkeypatch.setattr(running, "start", start)
    return started


def write_study(**changes):
    Path("rivals.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))


def test_study_that_is_tuned(room, started):
    write_study()
    call(compare.main, "rivals.yaml")
    trials, reported = started[:6], started[6:]
    assert [name for name, *_ in trials] == [
        f"{variant} with learning_rate {rate}, seed 0" for variant in STUDY["variants"] for rate in (0.001, 0.01)
    ]
    assert trials[0][2] == "runs/rivals/tuning/standard/learning_rate 0.001"
    losses = {}
    for name, rate, folder in trials:
        loss = json.loads(Path(folder, "all_results.json").read_text())["eval_loss"]
        losses.setdefault(name.partition(" with ")[0], {})[rate] = loss
    best = {variant: min(each, key=each.get) for variant, each in losses.items()}
    assert [(name, rate) for name, rate, _ in reported] == [
        (f"{variant}, seed {seed}", best[variant]) for seed in (1, 2) for variant in STUDY["variants"]
    ]

    found = json.loads(Path("runs/rivals/comparison.json").read_text())
    assert {run["seed"] for run in found["runs"]} == {1, 2}
    assert [(each["variant"], each["learning_rate"], each["eval_loss"]) for each in found["tuning"]] == [
        (variant, rate, loss) for variant, each in losses.items() for rate, loss in each.items()
    ]
    by_name = {(run["variant"], run["seed"]): run for run in found["runs"]}
    gained = found["gains"]["HC"]["at_equal_tokens"]["values"]
    assert gained == [by_name["HC", seed]["eval_loss"] - by_name["standard", seed]["eval_loss"] for seed in (1, 2)]
    assert found["gains"]["HC"]["at_equal_parameters"] is not None  # the wider one is larger
    assert by_name["HC", 1]["scheme"] == "hyper_connections"
    page = Path("runs/rivals/README.md").read_text()
    assert "## Gains" in page and "## How they were tuned" in page and "nan" not in page
    assert f"{losses['HC'][best['HC']]:.4f}" in page.partition("## How they were tuned")[2]
    with Image.open("runs/rivals/loss_over_step_time.png") as picture:
        assert "(loss_over_step_time.png)" in page and min(picture.size) >= 400

    # Given again, nothing is trained; with another grid, what is missing.
    del started[:]
    call(compare.main, "rivals.yaml")
    assert started == []
    shutil.move("runs", "gone")
    Path("record").mkdir()
    shutil.copy("gone/rivals/comparison.json", "record")
    call(compare.main, "rivals.yaml", "--recorded=record/comparison.json", "--output_dir=record")
    again = json.loads(Path("record/comparison.json").read_text())
    assert started == [] and {**again, "command": ""} == {**found, "command": ""}
    # On record are all of the trials of one variant, and some of another.
    less = {**found, "runs": [], "tuning": found["tuning"][:4]}
    Path("record/comparison.json").write_text(json.dumps(less))
    write_study(seeds=[1])
    call(compare.main, "rivals.yaml", "--recorded=record/comparison.json", "--output_dir=record")
    assert [name for name, *_ in started] == [name for name, *_ in trials[4:]] + [name for name, *_ in reported[:3]]
    shutil.move("gone", "runs")

    write_study(tune={"seed": 0, "fields": {"learning_rate": [1e-7]}}, seeds=[1])
    assert {member.run.training.learning_rate for member in read_study(Path("rivals.yaml")).members} == {1e-7}


def test_trial_that_diverges_is_not_chosen(room, started, capsys):
    variants = {"standard": STUDY["variants"]["standard"]}
    write_study(tune={"seed": 0, "fields": {"learning_rate": [1e30, 0.001]}}, variants=variants)
    call(compare.main, "rivals.yaml")
    assert {rate for name, rate, _ in started if "with" not in name} == {0.001}
    assert "| diverged |" in Path("runs/rivals/README.md").read_text()
    found = json.loads(Path("runs/rivals/comparison.json").read_text())
    assert found["tuning"][0]["eval_loss"] is None
    write_study(tune={"seed": 0, "fields": {"learning_rate": [1e30]}}, variants=variants)
    capsys.readouterr()
    line = failure(capsys, compare.main, "rivals.yaml")
    assert "'standard' diverged with all values of `tune`" in line


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        (3, ["`tune`", "seed and fields"]),
        ({"seed": 0}, ["`tune`", "seed and fields"]),
        ({"seed": 1, "fields": {"learning_rate": [1]}}, ["`seed` of `tune`", "none of `seeds`"]),
        ({"seed": "a", "fields": {"learning_rate": [1]}}, ["`seed` of `tune`", "an integer"]),
        ({"seed": 0, "fields": {}}, ["`fields` of `tune`", "a list of values"]),
        ({"seed": 0, "fields": {"learning_rate": 0.1}}, ["`fields` of `tune`", "a list of values"]),
        ({"seed": 0, "fields": {"learning_rate": [0.1, 0.1]}}, ["`learning_rate`", "once"]),
        ({"seed": 0, "fields": {"learning_rates": [0.1]}}, ["unknown field 'learning_rates'", "'learning_rate'"]),
        ({"seed": 0, "fields": {"seed": [3]}}, ["'seed'", "not for a variant"]),
        ({"seed": 0, "fields": {"learning_rate": [0.1, -1]}}, ["`learning_rate` is -1"]),
    ],
)
def test_wrong_tunings_are_refused(room, started, capsys, tune, words):
    write_study(tune=tune)
    line = failure(capsys, compare.main, "rivals.yaml")
    assert not [word for word in words if word not in line] and not started, line
