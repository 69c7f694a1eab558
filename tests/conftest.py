"""What has to be set before anything is imported."""

import gc
import os


if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests that run in several processes leave each other the cores: threads that wait for one cost far more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also in processes that tests start

import torch


if not torch.cuda.is_available():
    # Triton's kernels run on the CPU then; they look at this when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish(session):
    """What was imported stays: the Trainer has all objects looked through at every start, which takes a third of a small run."""
    gc.collect()
    gc.freeze()
