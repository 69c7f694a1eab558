"""Tests that run in several processes (pytest-xdist) leave each other the cores: threads that wait for one cost far more."""

import os


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also in processes that tests start
