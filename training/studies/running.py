"""The runs of a study: those that are missing are trained, and what was cut off is resumed."""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from training.results.record import RECORD
from training.studies.report import PICTURES, RAW, TABLE, read_member, record_of, write_comparison, write_record
from training.studies.step_times import measure_step_times
from training.studies.study import (
    Comparison,
    Member,
    check_folder,
    read_recorded,
    read_runs,
    read_study,
    take_recorded,
)
from training.support.errors import UserError
from training.support.files import output_folder, read_json
from training.support.machine import describe_machine


def start(member: Member, resume: bool, log: IO, environment: dict[str, str]) -> subprocess.Popen:
    """Start the training of a run in a process of its own."""
    line = [sys.executable, "-m", f"training.{member.command}", *member.arguments]
    return subprocess.Popen(
        line + ["--resume_from_checkpoint"] * resume,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the comparison, which ends its runs itself
    )


def last_error(log: Path, offset: int) -> str:
    """What a run said last, of that which it wrote into its log from `offset` on."""
    with log.open("rb") as stream:
        stream.seek(offset)
        lines = re.split(r"[\r\n]+", stream.read().decode(errors="replace"))
    errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
    return errors[-1].removeprefix("error: ").strip() if errors else "it said nothing"


def train_missing(members: list[Member], jobs: int, keep: Callable[[], None]) -> dict[str, str]:
    """
    Train the runs that are not whole, `jobs` at a time, or none of them where that is 0.

    A run's log is locked while it is trained, by the process that trains it: no other comparison can meddle with the
    run, not even where this one was killed and has left it behind.

    Args:
        keep: is called when a run has ended.

    Returns:
        What went wrong, by the name of the run.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    waiting = [
        (index, member)
        for index, member in enumerate(members, start=1)
        if not member.is_whole() and member.divergence() is None
    ]
    print(f"{len(members)} runs, {len(members) - len(waiting)} of them whole.", flush=True)
    if not waiting or not jobs:
        return {}
    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sitting = {
        "machine": {**machine, "threads": int(environment.get("OMP_NUM_THREADS", machine["threads"]))},
        "at_a_time": jobs,
    }
    running, failed = [], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, member = waiting.pop(0)
                member.log.parent.mkdir(parents=True, exist_ok=True)
                with member.log.open("ab") as log:
                    try:
                        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        failed[member.name] = f"{member.folder} is being trained by another process: wait for it."
                        continue
                    resume = (member.folder / RECORD).exists()
                    before = (
                        read_json(member.sittings, "sittings")["sittings"]
                        if resume and member.sittings.exists()
                        else []
                    )
                    line = shlex.join(["python", "-m", f"training.{member.command}", *member.arguments])
                    content = {"command": line, "sittings": [*before, sitting]}
                    member.sittings.write_text(json.dumps(content, indent=1), encoding="utf-8")
                    verb = "resumed" if resume else "started"
                    print(f"[{index}/{len(members)}] {member.name}: {verb} ({member.log})", flush=True)
                    offset, began = log.tell(), time.monotonic()
                    running.append((index, member, start(member, resume, log, environment), offset, began))
            for each in list(running):
                index, member, process, offset, began = each
                if process.poll() is None:
                    continue
                running.remove(each)
                ended = f"[{index}/{len(members)}] {member.name}:"
                seconds = time.monotonic() - began
                if process.returncode == 0 and member.is_whole():
                    loss = read_json(member.folder / "all_results.json")["eval_loss"]
                    print(f"{ended} whole after {seconds:,.0f} s, held-out loss {loss:.4f}", flush=True)
                elif divergence := member.divergence():
                    print(f"{ended} diverged at step {divergence['step']:,} after {seconds:,.0f} s", flush=True)
                else:
                    failed[member.name] = f"{last_error(member.log, offset)} (exit status {process.returncode})"
                    print(f"{ended} failed after {seconds:,.0f} s: {failed[member.name]}", flush=True)
                keep()
            time.sleep(0.1)
    finally:
        if running:
            print(f"Ending {len(running)} runs, which can be resumed.", file=sys.stderr, flush=True)
        for _, _, process, _, _ in running:
            process.terminate()
        for _, _, process, _, _ in running:
            process.wait()
    return failed


def tune(trials: list[Member], jobs: int, keep: Callable[[], None]) -> None:
    """
    Train the runs by which the variants of a study are tuned, as far as they are not whole.

    Raises:
        [`UserError`]: one of them failed.
    """
    failed = train_missing(trials, jobs, keep)
    if failed:
        name, error = next(iter(failed.items()))
        others = f" ({len(failed) - 1} more failed, see above)" if len(failed) > 1 else ""
        raise UserError(f"The trial {name} failed{others}, and without it the variants are not tuned alike: {error}")


def read_whole_runs(comparison: Comparison, recorded: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of those runs of a comparison that are whole, or `recorded` by their names."""
    return [
        recorded.get(member.name) or read_member(member)
        for member in comparison.members
        if member.name in recorded or member.is_whole()
    ]


def read_step_times(folder: Path, recorded: Path | None, study: bool) -> dict[str, Any] | None:
    """
    The times of a training step that an earlier comparison in a folder has, if there is one.

    Args:
        recorded: the `comparison.json` whose runs are taken.
        study: whether the comparison is that of a study.

    Raises:
        [`UserError`]: the earlier comparison has runs of a study that are no longer available, and would be lost.
    """
    file = folder / RAW
    if not file.exists():
        return None
    content = read_json(file, remedy="move it away")
    if study and (recorded is None or recorded.resolve() != file.resolve()):
        for run in content.get("runs", ()):
            if not Path(run["folder"]).exists():
                raise UserError(
                    f"{file} has the only record of {run['folder']}, which would be lost: pass --recorded {file}, or choose another "
                    "`output_dir`."
                )
    return content.get("step_times")


def compare(
    named: list[Path],
    output_dir: Path | None,
    jobs: int,
    baseline: str | None,
    recorded: Path | None,
    step_rounds: int,
    line: str,
) -> None:
    """
    Train what a study lacks, and write the comparison of its runs; or of runs that are finished.

    Its `comparison.json` is written whenever a run has ended, so that what was trained until then is on record.

    Args:
        named: the YAML file of the study, or the folders of the runs.
        output_dir: the folder of the table and figures; if none, that of the study.
        jobs: how many runs to train at a time; with 0, those that are whole are compared.
        baseline: the variant to compare with, of finished runs.
        recorded: the `comparison.json` of an earlier comparison, whose runs are not trained again.
        step_rounds: in how many rounds the time of a training step is measured afterwards, if it is.
        line: the command that asks for it.

    Raises:
        [`UserError`]: one of these cannot be, or a run failed.
    """
    if jobs < 0:
        raise UserError(f"`jobs` is {jobs}; it must be at least 0.")
    if step_rounds < 0:
        raise UserError(f"`step_rounds` is {step_rounds}; it must be at least 0.")
    study = named[0].suffix in (".yaml", ".yml")
    if study and (len(named) > 1 or baseline is not None):
        raise UserError("A study is compared alone, with its own `baseline`: leave the rest out.")
    if recorded is not None and not study:
        raise UserError("`--recorded` goes with a study: name its YAML file instead of runs.")
    earlier = read_recorded(recorded) if recorded else None

    def read():
        """The comparison, with the values that were best as far as they are known, and the figures on record."""
        comparison = read_study(named[0], earlier.trials if earlier else ())
        figures = take_recorded(earlier, comparison, (output_dir or comparison.folder) / RAW) if earlier else {}
        for member in missing(comparison, figures):
            check_folder(member)
        return comparison, figures

    def missing(comparison, figures):
        return [member for member in comparison.members if member.name not in figures]

    def keep():
        runs = read_whole_runs(comparison, figures)
        write_record(record_of(comparison, runs, failed, line, step_times), folder)

    comparison, figures = read() if study else (read_runs(named, baseline), {})
    folder, failed = output_dir or comparison.folder, {}
    trials = [trial.member for trial in comparison.trials if trial.recorded is None]
    for member in trials:
        check_folder(member)
    if not jobs and not read_whole_runs(comparison, figures):
        raise UserError("None of the runs is whole, which leaves nothing to compare: train them, with --jobs 1.")
    output_folder(folder, (TABLE, *PICTURES), (folder / RAW).exists)
    step_times = read_step_times(folder, recorded, study)
    if trials:
        tune(trials, jobs, keep)
        comparison, figures = read()
    if study:
        failed = train_missing(missing(comparison, figures), jobs, keep)
    runs = read_whole_runs(comparison, figures)
    if not runs and not failed:
        raise UserError("All of the runs diverged, which leaves nothing to compare: lower the learning rate.")
    if runs and step_rounds:
        step_times = measure_step_times(comparison, step_rounds)
    if runs:
        record = record_of(comparison, runs, failed, line, step_times)
        print(f"\n{write_comparison(comparison, record, folder)}\n")
        print(f"The comparison is in {folder}: {TABLE}, {RAW} and figures.")
    if failed:
        name, error = next(iter(failed.items()))
        others = f" ({len(failed) - 1} more failed, see above)" if len(failed) > 1 else ""
        raise UserError(f"The run {name} failed{others}: {error}")
