"""What a run is known by in its folder."""

from pathlib import Path

from training.support.files import DamagedFile, load_yaml, read_whole


RUNS_FOLDER = "runs"
# What was asked for, in the folder of a run.
RECORD = "run.yaml"
# Where and how a run ended whose loss or weights became NaN or infinite.
DIVERGED = "diverged.json"


def read_record(file: Path, remedy: str = "put back what it was") -> dict[str, dict]:
    """
    What was asked for of a run, by section.

    Args:
        remedy: what helps where the record is damaged, as the end of a sentence.

    Raises:
        [`DamagedFile`]: it is.
    """
    record = read_whole(file, load_yaml, "model", "data", "training", remedy=remedy)
    for section, fields in record.items():
        if not isinstance(fields, dict):
            raise DamagedFile(f"{file} is damaged (its section {section!r} is {fields!r}): {remedy}.")
    return record


def find_record(checkpoint: Path) -> Path | None:
    """The record of the run that a folder is of: the run's own, or that of its baseline or of one of its checkpoints."""
    if not checkpoint.is_dir():  # a model on the Hub, whose name has nothing to do with what is here
        return None
    places = (checkpoint, *checkpoint.absolute().parents[:2])
    return next((place / RECORD for place in places if (place / RECORD).exists()), None)
