"""The studies in configuration/evidence: every file is a study that can start, and compares like with like."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import training_args

from training.run.checks import check_model
from training.run.training import model_and_callbacks
from training.studies.study import COMMANDS, Comparison, read_study
from training.variants.registry import VARIANTS


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configuration" / "evidence"
BASES = {"text", "digits"}
STUDIES = sorted(
    file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml") if file.stem not in BASES
)
#: Fields in which the variants of a study may differ: they are what it is about.
APART = {
    **dict.fromkeys(STUDIES, {"residual_scheme", "last_k", "alteration"}),
    **dict.fromkeys(
        ("rivals", "paper_scale/rivals"),
        {"residual_scheme", "last_k", "variant", "variant_fields", "intermediate_size", "learning_rate"},
    ),
    "learning_rate": {"learning_rate"},
    "paper_scale/learning_rate": {"learning_rate"},
    "k_at_the_best_rate": {"residual_scheme", "last_k", "learning_rate"},
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The studies at the paper's shape name a precision that is refused where the device lacks it."""
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(ROOT)


@functools.cache
def study(name: str) -> Comparison:
    return read_study(Path("configuration", "evidence", f"{name}.yaml"))


def named(member, apart: set[str]) -> dict:
    """What a run names, but for what it is told apart by."""
    fields = {**member.run.named["model"], **member.run.named["data"], **member.run.named["training"]}
    return {name: value for name, value in fields.items() if name not in apart | {"seed", "output_dir"}}


@pytest.mark.parametrize("name", STUDIES, scope="module")  # one study after the other, each of which is read once
def test_variants_differ_in_nothing_but_what_is_compared(name):
    comparison = study(name)
    groups = {}
    for member in comparison.members:
        groups.setdefault(member.group, []).append(member)
        others = {other.variant for other in comparison.members if other.seed == member.seed}
        assert others == {other.variant for other in comparison.members}
    for members in groups.values():
        assert len({member.variant for member in members}) > 1
        assert all(named(member, APART[name]) == named(members[0], APART[name]) for member in members)
    seeds = {member.seed for member in comparison.members}
    assert len(seeds) >= 3 or name.endswith("learning_rate")
    assert comparison.folder == Path("runs", "evidence", name)


@pytest.mark.parametrize("name", STUDIES, scope="module")
def test_models_can_be_built(name):
    members = study(name).members
    for member in members:
        if member.seed == members[0].seed:
            model_class, _ = model_and_callbacks(member.run, COMMANDS[member.command].model_class)
            check_model(model_class, member.run.config)


def test_every_study_has_its_like_at_the_papers_shape():
    small = {name for name in STUDIES if "/" not in name}
    # (The best rate of the paper's shape is not known, and `ablation` and `width` have their like.)
    small -= {"k_at_the_best_rate", "ablation_128", "width_96"}
    assert {name.removeprefix("paper_scale/") for name in STUDIES if "/" in name} == small
    for name in small - {"learning_rate"}:
        variants, of_paper = (
            {member.variant for member in study(each).members} for each in (name, f"paper_scale/{name}")
        )
        assert variants <= of_paper


@pytest.mark.parametrize("name", ["decay", "gates", "outputs"])
@pytest.mark.parametrize("folder", ["", "paper_scale/"])
def test_shared_runs_are_the_same(folder, name):
    ablation = {member.folder: member for member in study(f"{folder}ablation").members}
    shared = [member for member in study(folder + name).members if member.folder in ablation]
    assert len(shared) >= 3
    for member in shared:
        assert member.run.named == ablation[member.folder].run.named


def test_the_best_learning_rate_is_within_the_grid():
    found = json.loads((ROOT / "model_cards" / "evidence" / "learning_rate" / "comparison.json").read_text())
    losses = {float(rate): figures["eval_loss"]["mean"] for rate, figures in found["variants"].items()}
    grid = {member.run.training.learning_rate for member in study("learning_rate").members}
    best = min(losses, key=losses.get)
    assert losses.keys() == grid and min(grid) < best < max(grid)
    headline = study("k_at_the_best_rate")
    rates = {member.variant: member.run.training.learning_rate for member in headline.members}
    assert rates[headline.baseline] == best


def test_the_headline_has_runs_of_k_again():
    of_k = {(member.variant, member.seed): named(member, set()) for member in study("k").members}
    again = [member for member in study("k_at_the_best_rate").members if member.variant.endswith(" at 0.006")]
    assert len(again) == 6
    for member in again:
        assert named(member, set()) == of_k[member.variant.removesuffix(" at 0.006"), member.seed]


@pytest.mark.parametrize("name", ["rivals", "paper_scale/rivals"])
def test_rivals_are_all_there_and_tuned_alike(name):
    comparison = study(name)
    variants = {member.run.training.variant for member in comparison.members}
    assert variants >= {each for each, variant in VARIANTS.items() if variant.scheme is not None}
    trials = {}
    for trial in comparison.trials:
        assert trial.member.seed not in {member.seed for member in comparison.members}
        trials.setdefault(trial.variant, []).append(trial)
    assert trials.keys() == {member.variant for member in comparison.members}
    (grid,) = {tuple(trial.values["learning_rate"] for trial in each) for each in trials.values()}
    assert len(grid) >= 4
    for each in trials.values():
        assert tuple(trial.member.run.training.learning_rate for trial in each) == grid
    # The wider transformer is as large as the largest of them.
    sizes = {}
    for member in comparison.members:
        model_class, _ = model_and_callbacks(member.run, COMMANDS[member.command].model_class)
        with torch.device("meta"):
            sizes[member.variant] = model_class(member.run.config).num_parameters()
    wider = sizes.pop("standard wider")
    assert max(sizes.values()) < wider < 1.1 * max(sizes.values())


def test_index_has_every_study():
    index = (ROOT / "configuration" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(evidence/([\w/]+)\.yaml\)", index)
    assert sorted(found) == STUDIES
