"""The runs of a study: those that are missing are trained, and what was cut off is resumed."""

import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from training.results.record import RECORD
from training.studies.report import (
    CURVES,
    OVER_PARAMETERS,
    OVER_STEP_TIME,
    OVER_TIME,
    RAW,
    TABLE,
    read_member,
    write_comparison,
)
from training.studies.study import Member, check_folder, read_recorded, read_runs, read_study
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


def train_missing(members: list[Member], jobs: int) -> dict[str, str]:
    """
    Train the runs that are not whole, `jobs` at a time.

    A run's log is locked while it is trained, by the process that trains it: no other comparison can meddle with the
    run, not even where this one was killed and has left it behind.

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
    if not waiting:
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
            time.sleep(0.1)
    finally:
        if running:
            print(f"Ending {len(running)} runs, which can be resumed.", file=sys.stderr, flush=True)
        for _, _, process, _, _ in running:
            process.terminate()
        for _, _, process, _, _ in running:
            process.wait()
    return failed


def tune(trials: list[Member], jobs: int) -> None:
    """
    Train the runs by which the variants of a study are tuned, as far as they are not whole.

    Raises:
        [`UserError`]: one of them failed, or is another than the study asks for now.
    """
    for member in trials:
        check_folder(member)
    failed = train_missing(trials, jobs)
    if failed:
        name, error = next(iter(failed.items()))
        others = f" ({len(failed) - 1} more failed, see above)" if len(failed) > 1 else ""
        raise UserError(f"The trial {name} failed{others}, and without it the variants are not tuned alike: {error}")


def compare(
    named: list[Path], output_dir: Path | None, jobs: int, baseline: str | None, recorded: Path | None, line: str
) -> None:
    """
    Train what a study lacks, and write the comparison of its runs; or of runs that are finished.

    Args:
        named: the YAML file of the study, or the folders of the runs.
        output_dir: the folder of the table and figures; if none, that of the study.
        jobs: how many runs to train at a time.
        baseline: the variant to compare with, of finished runs.
        recorded: the `comparison.json` of an earlier comparison, whose runs are not trained again.
        line: the command that asks for it.

    Raises:
        [`UserError`]: one of these cannot be, or a run failed.
    """
    if jobs < 1:
        raise UserError(f"`jobs` is {jobs}; it must be at least 1.")
    study = named[0].suffix in (".yaml", ".yml")
    if study:
        if len(named) > 1 or baseline is not None:
            raise UserError("A study is compared alone, with its own `baseline`: leave the rest out.")
        comparison = read_study(named[0])
        if comparison.trials:
            tune([trial.member for trial in comparison.trials], jobs)
            comparison = read_study(named[0])  # with the values that were best
    else:
        if recorded is not None:
            raise UserError("`--recorded` goes with a study: name its YAML file instead of runs.")
        comparison = read_runs(named, baseline)
    folder = output_dir or comparison.folder
    figures = read_recorded(recorded, comparison.members, folder / RAW) if recorded else {}
    own = [member for member in comparison.members if member.name not in figures]
    for member in own if study else ():
        check_folder(member)
    output_folder(folder, (TABLE, CURVES, OVER_TIME, OVER_PARAMETERS, OVER_STEP_TIME), (folder / RAW).exists)
    failed = {}
    if study:
        failed = train_missing(own, jobs)
    runs = [
        figures.get(member.name) or read_member(member)
        for member in comparison.members
        if member.name in figures or member.is_whole()
    ]
    if not runs and not failed:
        raise UserError("All of the runs diverged, which leaves nothing to compare: lower the learning rate.")
    if runs:
        print(f"\n{write_comparison(comparison, runs, failed, folder, line)}\n")
        print(f"The comparison is in {folder}: {TABLE}, {RAW} and figures.")
    if failed:
        name, error = next(iter(failed.items()))
        others = f" ({len(failed) - 1} more failed, see above)" if len(failed) > 1 else ""
        raise UserError(f"The run {name} failed{others}: {error}")
