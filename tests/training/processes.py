"""Processes that start as copies of the test's own: they need no imports, and end as they like."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.tiny import call


def forked(work) -> tuple[int, str]:
    """How `work()` ends in a process of its own, that starts as a copy of this one, and what it prints."""
    file = Path("printed.txt")
    process = fork(work, file)
    return wait(process), file.read_text()


def fork(work, file: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)  # threads do not live on in a fork
        with file.open("w", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            try:
                work()
                status = 0
            except SystemExit as exit:
                status = exit.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            stream.flush()
    finally:
        os._exit(status)


def ended(process: int) -> int | None:
    """The exit status of a process, negative for the signal that killed it; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(process: int, seconds: float = 60) -> int:
    """The exit status of a process, negative for the signal that killed it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (status := ended(process)) is not None:
            return status
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    pytest.fail(f"The process did not end within {seconds} s.")


def run_as_main(module: str, *arguments) -> None:
    """What `python -m module` does."""
    call(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), *arguments)
