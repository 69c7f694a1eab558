"""
Atomic and verified checkpoints.

A checkpoint gets its name, `checkpoint-<step>`, when all of it is on the disk; until then it is below `.unfinished`. Its
manifest holds the sizes and checksums of its files, so that a run never resumes from a file that has changed. SIGTERM writes
a checkpoint, too.
"""

import contextlib
import errno
import json
import shutil
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import trainer_utils
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training.run.initial import INITIAL_CHECKPOINT
from training.run.parallel import load_optimizer_distributed, unseen
from training.support.errors import UserError, innermost_message
from training.support.files import read_json, share, sync


# The folder of a checkpoint with the optimizer of a model that is divided by `tp_size`.
OPTIMIZER_FOLDER = "optimizer_shards"
# The names, sizes and checksums of the files of a checkpoint.
MANIFEST = "manifest.json"
# The folder of a run where files are written or deleted. Nothing in it is ever read.
UNFINISHED = ".unfinished"

RESUME = "the same command with --resume_from_checkpoint"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, the latest last."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal() and path.is_dir()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(folder: Path, named: str | None) -> Path | None:
    """The checkpoint that the model in `folder` resumes from: the named one, if it is in there, or else the last."""
    if named is None:
        return None
    if Path(named).resolve().parent == folder.resolve():
        return Path(named)
    return next(reversed(checkpoints(folder)), None)


def goes_on(checkpoint: Path) -> str:
    """How to continue from a checkpoint, as the end of a sentence."""
    if any(checkpoint.glob("optimizer*")):
        return f"{RESUME} continues from there"
    return (
        f"it holds only a model (`save_only_model`); start a new run from it with --{INITIAL_CHECKPOINT}={checkpoint}"
    )


# Writing


def files_below(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def finish_checkpoint(unfinished: Path, folder: Path, written: list[list[str]]) -> None:
    """
    Add a manifest to the checkpoint in `unfinished`, wait until it is on the disk, and move it to `folder`. A checkpoint of
    the same name, from an earlier attempt at these steps, is replaced.

    Args:
        written: the names of the files that each process sees in `unfinished`; an empty list if another process reports them.

    Raises:
        [`UserError`]: this process does not see all of these files.
    """
    missing = unseen({unfinished / name for names in written for name in names})
    if missing:
        last = next(reversed(checkpoints(folder)), None)
        discard_unfinished(folder)
        raise UserError(
            f"{unfinished.name} is not complete: {missing[0].relative_to(unfinished)}, which another process wrote, is not "
            f"visible to the first, so the processes do not share {folder}. Choose an `output_dir` on a file system that all "
            "machines share. "
            + (f"The last complete checkpoint is {last}." if last else "There is no checkpoint yet.")
        )
    files = [unfinished / name for name in files_below(unfinished)]
    with ThreadPoolExecutor() as pool:
        checksums = pool.map(checksum, files)
    content = {
        file.relative_to(unfinished).as_posix(): {"size": file.stat().st_size, "crc32": each}
        for file, each in zip(files, checksums)
    }
    (unfinished / MANIFEST).write_text(
        json.dumps({"crc32": _checksum_of(content), "processes": len(written), "files": content}, indent=1),
        encoding="utf-8",
    )
    share(files, unfinished)
    for path in (*unfinished.rglob("*"), unfinished):
        sync(path)
    checkpoint, replaced = folder / unfinished.name, unfinished.with_name("replaced")
    if checkpoint.exists():
        checkpoint.rename(replaced)
    unfinished.rename(checkpoint)
    sync(folder)
    discard_unfinished(folder)


def rotate_checkpoints(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """
    Delete the checkpoints that transformers would delete: of those up to a step, `limit` remain, and the best one. A
    checkpoint is renamed before its files are deleted.
    """
    found = [checkpoint for checkpoint in checkpoints(folder) if _step(checkpoint) <= step]
    names = folder / UNFINISHED / "names"
    for checkpoint in found:
        (names / checkpoint.name).mkdir(parents=True)
    trainer_utils.rotate_checkpoints(str(names), limit, best and str(names / Path(best).name))
    for checkpoint in found:
        if not (names / checkpoint.name).exists():
            checkpoint.rename(folder / UNFINISHED / checkpoint.name)
    discard_unfinished(folder)


def move_finished(unfinished: Path, folder: Path) -> None:
    """Flush the files of `unfinished` to the disk, and move them to `folder`, where each replaces its predecessor."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    share(files, unfinished)
    for file in files:
        sync(file)
    # The index of the weights comes last, the weights before it: without them, nothing is mistaken for a model.
    for file in sorted(files, key=lambda file: (".index." in file.name, file.suffix == ".safetensors", file)):
        target = folder / file.relative_to(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    sync(folder)
    discard_unfinished(folder)


def discard_unfinished(folder: Path) -> None:
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


@contextlib.contextmanager
def told_if_not_written(what: str, folder: Path, *, only_if_full: bool = False) -> Iterator[None]:
    """
    Turns errors of writing to the folder of a run into a `UserError`, which says from where the run can be resumed.

    Args:
        what: what is written, as the beginning of the sentence.
        only_if_full: handle a full disk only, as other errors may have come from reading.

    Raises:
        [`UserError`]: the disk is full, or fails.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        reason = _writing_error(error, only_if_full)
        if reason is None:
            raise
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there"
        discard_unfinished(folder)
        last = next(reversed(checkpoints(folder)), None)
        go_on = "There is no checkpoint yet: the same command with --overwrite starts again"
        if last is not None:
            go_on = f"{last} is intact: {goes_on(last)}"
        raise UserError(f"{what} could not be written to {folder} ({reason}). {go_on} when this is fixed.") from error


def _writing_error(error: BaseException, only_if_full: bool) -> str | None:
    """The reason that something could not be written, or `None` if an exception is about something else."""
    if isinstance(error, CheckpointException):
        # When several processes write a sharded checkpoint, each of them gets the errors of all.
        causes = [wrapped[0] for wrapped in error.failures.values()]
        return next(filter(None, (_writing_error(cause, only_if_full) for cause in causes)), None)
    text = innermost_message(error)
    full = "No space left" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if only_if_full and not full:
        return None
    if isinstance(error, OSError):
        return error.strerror or text
    # safetensors and torch have their own exceptions for writing; torch's do not give the reason.
    if full or isinstance(error, SafetensorError):
        return text
    return "torch failed to write a file" if "PytorchStreamWriter" in text or "inline_container" in text else None


# Reading


def checksum(file: Path) -> str:
    """The CRC-32 of a file. It detects corruption by a disk or a copy, at several GB per second."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _checksum_of(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or `None` if it is unchanged, or from a release without manifests."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        with_manifest = [each for each in checkpoints(checkpoint.parent) if (each / MANIFEST).exists()]
        return f"{manifest} is missing" if any(_step(each) < _step(checkpoint) for each in with_manifest) else None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        intact = content["crc32"] == _checksum_of(content["files"])
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"{manifest} is damaged"

    def damage_of(name: str) -> str | None:
        file, expected = checkpoint / name, content["files"][name]
        try:
            same = file.stat().st_size == expected["size"] and checksum(file) == expected["crc32"]
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        return None if same else f"{file} has changed since it was written"

    with ThreadPoolExecutor() as pool:
        damaged = next(filter(None, pool.map(damage_of, content["files"])), None)
    if damaged is None and (lacking := _lacking(checkpoint, content["files"], content.get("processes", 1))):
        return f"{checkpoint / lacking} is missing, and so is its entry in the manifest"
    return damaged


def _lacking(checkpoint: Path, names: Collection[str], num_processes: int) -> str | None:
    """A file that belongs to a checkpoint according to its other files, but is not among `names`."""
    parts = []
    if num_processes > 1 and any(name.startswith("rng_state_") for name in names):
        parts += [f"rng_state_{process}.pth" for process in range(num_processes)]
    for name in names:
        if name.endswith("/.metadata") and (checkpoint / name).exists():  # of torch.distributed.checkpoint
            folder = Path(name).parent
            stored = FileSystemReader(checkpoint / folder).read_metadata().storage_data.values()
            parts += {str(folder / each.relative_path) for each in stored}
        elif name.endswith(".index.json") and (checkpoint / name).exists():
            parts += read_json(checkpoint / name)["weight_map"].values()
    return next((part for part in sorted(parts) if part not in names), None)


class DamagedCheckpoint(UserError):
    """A checkpoint that has changed since it was written: what is `wrong`, and another one that is `whole`, if any."""

    def __init__(self, checkpoint: Path, wrong: str, whole: Path | None):
        super().__init__(
            f"{checkpoint} cannot be resumed, because {wrong}. "
            + (
                f"{whole} is intact: resume from there with --resume_from_checkpoint={whole}."
                if whole
                else "No other checkpoint is intact: start again with --overwrite."
            )
        )
        self.wrong, self.whole = wrong, whole

    def __reduce__(self):
        return UserError, (str(self),)  # what another process receives


def check_checkpoint(checkpoint: Path) -> None:
    """
    Check that a checkpoint is unchanged since it was written.

    Raises:
        [`DamagedCheckpoint`]: it is not. The error says what is wrong, and which other checkpoint is intact.
    """
    wrong = damage(checkpoint)
    if wrong is None:
        return
    # The nearest before it, or else a later one.
    others = sorted(checkpoints(checkpoint.parent), key=lambda each: (_step(each) < _step(checkpoint), _step(each)))
    whole = next((each for each in reversed(others) if damage(each) is None), None)
    raise DamagedCheckpoint(checkpoint, wrong, whole)


def check_state(checkpoint: Path) -> None:
    """
    Check that a checkpoint holds the whole state of a training, not only the model.

    Raises:
        [`UserError`]: it lacks the optimizer or the state of the trainer.
    """
    if not any(checkpoint.glob("optimizer*")):
        raise UserError(
            f"{checkpoint} cannot be resumed, because it holds only a model, without its optimizer (`save_only_model`): start "
            f"a new run from its weights, with --{INITIAL_CHECKPOINT}={checkpoint} and another `output_dir`."
        )
    read_json(
        checkpoint / "trainer_state.json", "global_step", remedy="choose another with --resume_from_checkpoint=PATH"
    )


def check_sharding(checkpoint: Path, fsdp: bool, tp_size: int) -> None:
    """
    Check that a run can resume from a checkpoint with its kind of parallelism.

    Args:
        fsdp: whether the run uses FSDP.
        tp_size: the number of processes that the model is divided over.

    Raises:
        [`UserError`]: the checkpoint was written with another kind of parallelism.
    """
    if any(checkpoint.glob(f"{FSDP_MODEL_NAME}*")) != fsdp:
        raise UserError(
            f"{checkpoint} was written {'without' if fsdp else 'with'} FSDP: resume it "
            f"{'without' if fsdp else 'with'} it, too, on any number of devices."
        )
    divided = (checkpoint / OPTIMIZER_FOLDER).exists()
    if divided and load_optimizer_distributed is None:
        raise UserError(
            f"{checkpoint} was written with `tp_size`, and needs a later release of transformers (5.24 was tested)."
        )
    if tp_size > 1 and not divided:
        raise UserError(
            f"{checkpoint} was written without `tp_size`: resume it without, too, or start a new run from its weights, with "
            f"--{INITIAL_CHECKPOINT}={checkpoint} and another `output_dir`."
        )
