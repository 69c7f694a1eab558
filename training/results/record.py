"""What a run is known by in its folder."""

from pathlib import Path

import yaml

from training.support.files import load_yaml


RUNS_FOLDER = "runs"
# What was asked for, in the folder of a run.
RECORD = "run.yaml"
# Where and how a run ended whose loss or weights became NaN or infinite.
DIVERGED = "diverged.json"


def read_record(file: Path) -> dict[str, dict] | None:
    """What was asked for of a run, by section; `None` if the record is damaged."""
    try:
        record = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    sections = ("model", "data", "training")
    return (
        record if isinstance(record, dict) and all(isinstance(record.get(name), dict) for name in sections) else None
    )


def find_record(checkpoint: Path) -> Path | None:
    """The record of the run that a folder is of: the run's own, or that of its baseline or of one of its checkpoints."""
    places = (checkpoint, *checkpoint.absolute().parents[:2])
    return next((place / RECORD for place in places if (place / RECORD).exists()), None)
