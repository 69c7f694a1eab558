"""The studies in configuration/evidence: every file is a study that can start, and compares like with like."""

import functools
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
BASES = {"text", "fashion"}
STUDIES = sorted(
    file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml") if file.stem not in BASES
)
#: Fields in which the variants of a study may differ: they are what it is about.
APART = {
    **dict.fromkeys(STUDIES, {"residual_scheme", "last_k", "learning_rate"}),
    **dict.fromkeys(("parts", "parts_128", "paper_scale/parts"), {"residual_scheme", "variant", "learning_rate"}),
    **dict.fromkeys(
        ("rivals", "paper_scale/rivals"),
        {"residual_scheme", "last_k", "variant", "variant_fields", "intermediate_size", "learning_rate"},
    ),
    "speed": {"residual_scheme", "max_steps", "lr_scheduler_kwargs"},
    "depth": {"residual_scheme", "last_k", "num_hidden_layers", "learning_rate"},
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
    assert len(seeds) >= 3
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
    # (`headline` and `parts` have their like, and what is saved can be read off the former at its shape.)
    small -= {"headline_12_layers", "parts_128", "speed"}
    assert {name.removeprefix("paper_scale/") for name in STUDIES if "/" in name} == small
    for name in small - {"depth"}:  # which compares depths in one group where the paper's has a group for each
        variants, of_paper = (
            {member.variant for member in study(each).members} for each in (name, f"paper_scale/{name}")
        )
        assert variants <= of_paper


def test_the_constant_part_and_the_cool_down_of_shorter_runs_are_in_proportion():
    for name in STUDIES:
        for member in study(name).members:
            arguments = member.run.training
            decay = (arguments.lr_scheduler_kwargs or {}).get("num_decay_steps")
            assert decay is None or decay == 0.3 * arguments.max_steps


def test_speed_has_runs_of_the_headline():
    """Those with all steps, where 0.012 was the best rate for both."""
    fields = {}
    for name in ("headline", "speed"):
        for member in study(name).members:
            if member.variant in ("standard", "DCA"):
                fields.setdefault(name, {})[member.folder.as_posix()] = named(member, {"learning_rate"})
    assert fields["headline"] == fields["speed"] and len(fields["speed"]) == 10


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
    assert len(grid) >= 3
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
