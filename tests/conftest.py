"""What has to be set before anything is imported."""

import gc
import os
import time


if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests that run in several processes leave each other the cores: threads that wait for one cost far more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also in processes that tests start

import pytest
import torch


if not torch.cuda.is_available():
    # Triton's kernels run on the CPU then; they look at this when they are defined.
    os.environ["TRITON_INTERPRET"] = "1"


SLOW = 0.02  # seconds


class Freezer:
    """
    What was imported stays: the Trainer, and every conversion, has all objects looked through, which takes a third of a small
    run. So what is there is set aside once that is slow, before the next test; what a test leaves is garbage before.
    """

    def __init__(self):
        self.is_slow, self.start = True, 0.0
        self.clock = time.perf_counter  # which a test may replace

    def __call__(self, phase, info):
        if phase == "start":
            self.start = self.clock()
        elif info["generation"] == 2 and self.clock() - self.start > SLOW:
            self.is_slow = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.is_slow:
            gc.collect()
            gc.freeze()
            self.is_slow = False


def pytest_configure(config):
    freezer = Freezer()
    config.pluginmanager.register(freezer)
    gc.callbacks.append(freezer)
