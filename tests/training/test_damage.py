"""What a run left and a command reads again: where it is damaged, one sentence says which file it is and what helps."""

import shutil
from pathlib import Path

import pytest

from tests.training.tiny import TEXT_RUN, failure, refusal
from training import causal_lm, compare, depth_weights, evaluate, publish, retrofit
from training.results.record import find_record, read_record
from training.support.files import DamagedFile


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 4],
                "binary": b"\x80\x00\xff",
                "a list": b"[7]",
                "no keys": b"{}",
            }[how]
        )


HOWS = ["empty", "truncated", "binary", "a list", "no keys", "folder"]
RESUME = [TEXT_RUN, "--output_dir=run", "--baseline=standard", "--resume_from_checkpoint"]
CASES = [
    *(("evaluate", evaluate.main, ["run"], file, HOWS) for file in ("run.yaml", "config.json")),
    *(
        ("depth_weights", depth_weights.main, ["run", "--output_dir=draws"], file, HOWS)
        for file in ("run.yaml", "config.json")
    ),
    *(
        ("compare", compare.main, ["run", "--output_dir=compared"], file, HOWS)
        for file in ("run.yaml", "config.json", "trainer_state.json", "all_results.json")
    ),
    *(("publish", publish.main, ["run", "user/name"], file, HOWS) for file in ("run.yaml", "config.json")),
    # (Of these two, what is whole goes up as it is.)
    *(
        ("publish", publish.main, ["run", "user/name"], file, HOWS[:4])
        for file in ("trainer_state.json", "all_results.json")
    ),
    ("publish", publish.main, ["run", "user/name"], "README.md", ["binary", "folder"]),
    ("resume", causal_lm.main, RESUME, "run.yaml", HOWS),
    # (A run that was cut off has no figures yet, or not all.)
    ("resume", causal_lm.main, RESUME, "all_results.json", [how for how in HOWS if how != "no keys"]),
    ("retrofit", retrofit.main, ["run", "converted", "--overwrite"], "converted/config.json", HOWS),
]


@pytest.mark.parametrize(
    ("main", "arguments", "file", "how"),
    [
        pytest.param(main, arguments, file, how, id=f"{name}-{file}-{how}")
        for name, main, arguments, file, hows in CASES
        for how in hows
    ],
)
def test_a_damaged_file_is_named(comparison, room, monkeypatch, capsys, main, arguments, file, how):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    shutil.copytree(comparison[0] / "run", room / "run")
    shutil.copytree(comparison[0] / "run" / "standard", room / "converted")
    place = room / file if "/" in file else room / "run" / file
    damage(place, how)
    line = (failure if main is compare.main else refusal)(
        capsys, main, *arguments
    )  # (a comparison has made its folder)
    if (main, file) == (compare.main, "all_results.json"):
        assert "run holds a run that is not finished" in line
    else:
        name = {"converted/config.json": "config.json"}.get(file, f"run/{file}")
        assert name in line or "'run' cannot be evaluated" in line, line
    assert ": " in line.removeprefix("error: "), line  # what helps


@pytest.mark.parametrize("how", HOWS)
def test_damaged_state_of_a_checkpoint_without_a_manifest(comparison, room, capsys, how):
    """As earlier releases wrote them."""
    shutil.copytree(comparison[0] / "run", room / "run")
    for manifest in (room / "run").rglob("*manifest*"):
        manifest.unlink()
    damage(room / "run" / "checkpoint-6" / "trainer_state.json", how)
    line = refusal(capsys, causal_lm.main, *RESUME)
    assert "run/checkpoint-6/trainer_state.json" in line


@pytest.mark.parametrize("content", ["model: []\ndata: {}\ntraining: {}", "model: {}\ndata: {}\ntraining: 2026-13-45"])
def test_a_record_has_its_sections(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(DamagedFile, match="run.yaml is damaged .*: restore it"):
        read_record(file)


def test_a_model_of_the_hub_has_no_record_here(room):
    """Its name may look as if it lay in a folder beside a `run.yaml`."""
    Path("run.yaml").write_text("model: {}\ndata: {}\ntraining: {}\n")
    assert find_record(Path("user/name")) is None
    Path("run/standard").mkdir(parents=True)
    assert find_record(Path("run/standard")) == room / "run.yaml"
