"""The files that identify a run in its folder."""

from pathlib import Path

from training.support.files import DamagedFile, load_yaml, read_whole


RUNS_FOLDER = "runs"
# The requested fields of a run.
RECORD = "run.yaml"
# The step and the reason where a run ended because its loss or weights became NaN or infinite.
DIVERGED = "diverged.json"


def read_record(file: Path, remedy: str = "restore it") -> dict[str, dict]:
    """
    The requested fields of a run, by section.

    Args:
        remedy: what the user can do about a damaged record, as the end of a sentence.

    Raises:
        [`DamagedFile`]: the record is damaged.
    """
    record = read_whole(file, load_yaml, "model", "data", "training", remedy=remedy)
    for section, fields in record.items():
        if not isinstance(fields, dict):
            raise DamagedFile(f"{file} is damaged (its section {section!r} is {fields!r}): {remedy}.")
    return record


def find_record(checkpoint: Path) -> Path | None:
    """The record of the run that a folder belongs to: the folder of the run, of its baseline or of a checkpoint."""
    if not checkpoint.is_dir():  # a model on the Hub, whose name may match local paths by chance
        return None
    places = (checkpoint, *checkpoint.absolute().parents[:2])
    return next((place / RECORD for place in places if (place / RECORD).exists()), None)
