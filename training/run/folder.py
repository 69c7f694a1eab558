"""The folder of a run: the check of what is in it before the run, and the record of the requested fields."""

import dataclasses
import platform
import secrets
import shutil
from pathlib import Path

import yaml

from modeling_dca.configuration_dca import RESIDUAL_SCHEMES
from training.results.record import RECORD, read_record
from training.run.checkpoints import (
    MANIFEST,
    UNFINISHED,
    DamagedCheckpoint,
    check_checkpoint,
    check_sharding,
    check_state,
    checkpoint_to_resume,
    discard_unfinished,
)
from training.run.fields import AUTO, LAST, Run, RunArguments
from training.run.parallel import from_all, from_first, in_group, unseen, uses_fsdp
from training.support.errors import UserError
from training.support.files import read_json, unfinished_name, write_whole


# Fields that a resumed run takes from its checkpoint, or that the checkpoint does not fit if they differ.
OF_THE_OPTIMIZER = (
    *("learning_rate", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("freeze_backbone", "lora_rank"),
)


# What a run that was killed right after its start may leave in its folder.
LEFTOVERS = {UNFINISHED, unfinished_name(RECORD)}


def check_output_folder(arguments: RunArguments) -> None:
    """
    Check that a run may use its folder, and resolve `resume_from_checkpoint` = `auto`. The first process does it for all.

    Raises:
        [`UserError`]: the folder holds another run and neither `overwrite` nor `resume_from_checkpoint` is set, it
        holds something else than a run, there is nothing to resume, or the checkpoint is damaged or was sharded in another
        way.
    """
    arguments.resume_from_checkpoint = from_first(lambda: _checked_checkpoint(arguments))


def _checked_checkpoint(arguments: RunArguments) -> str | None:
    """The resolved `resume_from_checkpoint`: a checkpoint, `LAST`, or `None` if there is nothing to resume."""
    folder, checkpoint = Path(arguments.output_dir), arguments.resume_from_checkpoint
    auto = checkpoint == AUTO
    named = f"`output_dir` is {str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{named}, which is a file: choose a folder.")
    holds_run = (folder / RECORD).exists()
    holds_anything = folder.exists() and any(path.name not in LEFTOVERS for path in folder.iterdir())
    if checkpoint is not None and arguments.overwrite:
        raise UserError("Both `overwrite` and `resume_from_checkpoint` are set: leave one of them out.")
    if checkpoint == AUTO:
        checkpoint = LAST if holds_anything else None
    if checkpoint is not None:
        if not holds_run:
            raise UserError(
                f"{named}, which holds no run to resume: "
                + ("choose another folder." if auto else "leave `resume_from_checkpoint` out.")
            )
        if checkpoint != LAST and not (
            any((Path(checkpoint) / file).exists() for file in ("trainer_state.json", MANIFEST))
            and folder.resolve() in Path(checkpoint).resolve().parents
        ):
            raise UserError(
                f"`resume_from_checkpoint` is {checkpoint!r}, which is not a checkpoint of the run in {folder}."
            )
        for model_folder in filter(None, (folder, arguments.baseline and folder / arguments.baseline)):
            resumed = checkpoint_to_resume(model_folder, checkpoint)
            if resumed is not None:
                try:
                    check_checkpoint(resumed)
                except DamagedCheckpoint as error:
                    if not auto or error.whole is None or checkpoint != LAST:
                        raise
                    print(f"note: {resumed} is skipped, because {error.wrong}: the run resumes from {error.whole}.")
                    checkpoint, resumed = str(error.whole), error.whole
                check_state(resumed)
                check_sharding(resumed, uses_fsdp(arguments), arguments.tp_size)
                check_gates(resumed)
            results = model_folder / "all_results.json"
            if results.exists():  # the final results are added to it
                read_json(results, remedy="move it and train_results.json away to have them written again")
    elif holds_anything:
        if not holds_run:
            raise UserError(f"{named}, which holds files that do not belong to a run: choose another folder.")
        if not arguments.overwrite:
            raise UserError(
                f"{named}, which holds another run: choose another folder, or pass --overwrite to delete it or "
                "--resume_from_checkpoint to resume it."
            )
        # (`runs/demo` of one configuration can hold `runs/demo/text` of another.)
        other = next((record.parent for record in folder.rglob(RECORD) if record.parent != folder), None)
        if other is not None:
            raise UserError(f"{named}, which also holds the run {str(other)!r}: move that, or choose another folder.")
    return checkpoint


def check_gates(checkpoint: Path) -> None:
    """
    Raises:
        [`UserError`]: the checkpoint has gates of release 0.1, with which this release computes another model.
    """
    file = checkpoint / "config.json"
    config = read_json(file) if file.exists() else {}
    scheme = RESIDUAL_SCHEMES.get(config.get("residual_scheme"))
    if scheme is not None and scheme.gated and "gate_norm" not in config:
        raise UserError(
            f"{checkpoint} is of a run with modeling-dca 0.1, whose gates have no norm: resume it with that release, or pass "
            "--overwrite to start again."
        )


def _variant(named: dict[str, dict]) -> str | None:
    """The variant of a run, which `training.altered` calls `alteration`."""
    return named["training"].get("variant") or named["training"].get("alteration")


def make_output_folder(run: Run) -> None:
    """
    Create the folder of a run, which `check_output_folder` has checked, with a record of the requested fields, and check
    that all processes see the same folder.

    Raises:
        [`UserError`]: the run in it was started with other fields, it cannot be written, or some process does not see it.
    """
    from_first(lambda: _make(run) if run.training.should_save else None)
    if in_group():
        _check_shared(Path(run.training.output_dir))


def _check_shared(folder: Path) -> None:
    """
    Raises:
        [`UserError`]: a process does not see what the first process wrote to the folder of the run.
    """
    sign = folder / UNFINISHED / from_first(lambda: f"seen-{secrets.token_hex(8)}")

    def write():
        sign.parent.mkdir(exist_ok=True)
        sign.touch()

    from_first(write)
    machines = from_all((platform.node(), not unseen([sign])))
    from_first(lambda: discard_unfinished(folder))
    others = [f"{process} (on {machine})" for process, (machine, seen) in enumerate(machines) if not seen]
    if others:
        raise UserError(
            f"`output_dir` is {str(folder)!r}, which the processes do not share: what process 0 (on {machines[0][0]}) writes "
            f"there is not visible to process {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}. Choose a folder on a "
            "file system that all machines share."
        )


def _make(run: Run) -> None:
    folder = Path(run.training.output_dir)
    record = folder / RECORD
    if run.training.resume_from_checkpoint is not None:
        before = read_record(record, "choose another `output_dir`, or pass --overwrite to start again")
        if "split_seed" in run.named["data"]:  # in earlier releases, the run's seed
            before["data"].setdefault("split_seed", before["training"].get("seed", 42))
        for section in ("model", "data"):
            if before[section] != run.named[section]:
                raise UserError(
                    f"The run in {folder} was started with other `{section}` fields ({record}): resume it with those, or "
                    "choose another `output_dir`."
                )
        fields = ((named["training"].get("variant_fields") or {}) for named in (before, run.named))
        for name, (was, now) in {
            "variant": (_variant(before), _variant(run.named)),
            "variant_fields": fields,
        }.items():
            if was != now:
                raise UserError(
                    f"The run in {folder} was started with {was!r} as `{name}`, not {now!r}: resume it with that, or choose "
                    "another `output_dir`."
                )
        defaults = {field.name: field.default for field in dataclasses.fields(run.training)}
        for name in OF_THE_OPTIMIZER:
            was, now = (named["training"].get(name, defaults[name]) for named in (before, run.named))
            if was != now:
                raise UserError(
                    f"The run in {folder} was started with {was!r} as `{name}`, not {now!r}, and its checkpoints depend on it: "
                    "resume it with that, or choose another `output_dir`."
                )
    try:
        if run.training.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").unlink(missing_ok=True)  # A card says that the run is finished, and its results.
        write_whole(record, yaml.safe_dump(run.named, sort_keys=False))
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be written: {error.strerror}.") from error
