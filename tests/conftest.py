"""Tests that run in several processes (pytest-xdist) leave each other the cores: threads that wait for one cost far more."""

import gc
import os


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also in processes that tests start


def pytest_collection_finish(session):
    """What was imported stays: the Trainer has all objects looked through at every start, which takes a third of a small run."""
    gc.collect()
    gc.freeze()
