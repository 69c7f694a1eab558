"""
Compare runs with each other, over several seeds:

    python -m training.compare configuration/evidence/STUDY.yaml   # trains what is missing
    python -m training.compare RUN RUN ...                         # of runs that are finished

A study's YAML file names the configuration that its runs share, the fields in which its variants differ, and the seeds:

    configuration: ../demo/text.yaml  # as seen from the folder of this file; a variant may name its own
    fields: {max_steps: 1000}         # for all variants, by their names on the command line
    baseline: standard                # the variant that the others are compared with
    seeds: [0, 1, 2]
    variants:
      standard: {residual_scheme: standard}
      2-DCA: {residual_scheme: dca, last_k: 2}

and, if it likes, a `title`; the `command` that trains them (`causal_lm`, if not given, `image_classification`, or `altered`);
`groups`, named as the variants are, each with its fields: all variants are then trained in each, and compared with the
baseline of their own group; and `runs_of`, the file of another study, whose runs are its own where they are the same.
The runs are then in `runs/<path of the file below configuration>/[<group>/]<variant>/seed-<seed>`, with their logs in `logs`
beside them. Those that are whole are kept, also those that ended because they diverged, and those that were cut off are
resumed, so that the same command can always be given again. `--recorded` takes runs with the same fields from the
`comparison.json` of another comparison instead of training them again: to add to one whose runs are no longer at hand.
"""

import argparse
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

from training.arguments import RECORD
from training.benchmarks.run import describe_machine
from training.card import read_json
from training.comparison import CURVES, OVER_PARAMETERS, OVER_TIME, RAW, TABLE, read_member, write_comparison
from training.errors import UserError, command
from training.study import Member, check_folder, read_recorded, read_runs, read_study


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
                    before = read_json(member.sittings)["sittings"] if resume and member.sittings.exists() else []
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


def check_output(folder: Path) -> None:
    """
    See that a comparison can be written into a folder, and make it.

    Raises:
        [`UserError`]: it cannot, or something that is no comparison would be overwritten.
    """
    written = [name for name in (TABLE, CURVES, OVER_TIME, OVER_PARAMETERS) if (folder / name).exists()]
    if written and not (folder / RAW).exists():
        raise UserError(
            f"`output_dir` is {str(folder)!r}, where a {written[0]} is that is not of a comparison: name another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`output_dir` is {str(folder)!r}, which cannot be made: {error.strerror}.") from error


@command
def main():
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="STUDY.yaml | RUN", nargs="+", type=Path, help="a study, or finished runs")
    parser.add_argument("--output_dir", type=Path, help="the folder of the table and figures (default: of the study)")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs to train at a time (default: %(default)s)")
    parser.add_argument(
        "--baseline", help="the variant to compare with, of finished runs (default: standard, if there)"
    )
    parser.add_argument(
        "--recorded", type=Path, help="the comparison.json of an earlier comparison; runs that it has are not trained"
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        raise UserError(f"`jobs` is {arguments.jobs}; it must be at least 1.")
    study = arguments.runs[0].suffix in (".yaml", ".yml")
    if study:
        if len(arguments.runs) > 1 or arguments.baseline is not None:
            raise UserError("A study is compared alone, with its own `baseline`: leave the rest out.")
        comparison = read_study(arguments.runs[0])
    else:
        if arguments.recorded is not None:
            raise UserError("`--recorded` goes with a study: name its YAML file instead of runs.")
        comparison = read_runs(arguments.runs, arguments.baseline)
    folder = arguments.output_dir or comparison.folder
    recorded = read_recorded(arguments.recorded, comparison.members, folder / RAW) if arguments.recorded else {}
    own = [member for member in comparison.members if member.name not in recorded]
    for member in own if study else ():
        check_folder(member)
    check_output(folder)
    failed = {}
    if study:
        failed = train_missing(own, arguments.jobs)
    runs = [
        recorded.get(member.name) or read_member(member)
        for member in comparison.members
        if member.name in recorded or member.is_whole()
    ]
    if not runs and not failed:
        raise UserError("All of the runs diverged, which leaves nothing to compare: lower the learning rate.")
    if runs:
        line = shlex.join(["python", "-m", "training.compare", *sys.argv[1:]])
        print(f"\n{write_comparison(comparison, runs, failed, folder, line)}\n")
        print(f"The comparison is in {folder}: {TABLE}, {RAW} and figures.")
    if failed:
        name, error = next(iter(failed.items()))
        others = f" ({len(failed) - 1} more failed, see above)" if len(failed) > 1 else ""
        raise UserError(f"The run {name} failed{others}: {error}")


if __name__ == "__main__":
    main()
