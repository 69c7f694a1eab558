"""What all tests of the training room share: caches of their own, no network, and one finished run."""

import contextlib
import os
from pathlib import Path

import datasets
import evaluate
import huggingface_hub.constants
import pytest
import transformers.dynamic_module_utils
from PIL import Image

from tests.training.tiny import TEXT_RUN, call, record_training, write_room
from training import causal_lm
from training.results import card
from training.run import depth_weights
from training.studies import report


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Everything that would be kept in the user's home is kept in a temporary folder."""
    home = tmp_path_factory.mktemp("hf_home")
    with pytest.MonkeyPatch.context() as patch:
        # The libraries have read their environment by now; that is for the processes that tests start.
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_DATASETS_CACHE", str(home / "datasets"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(home / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(home / "modules"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        yield home
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """A run waits for the disk a hundred times, for longer than it computes: that is for the loss of power, which no test has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


DRAWING = {
    (module, name): getattr(module, name)
    for module, names in {
        card: ("draw_loss_curves", "draw_depth_weights"),
        depth_weights: ("draw_depth_weights", "draw_depth_spreads", "draw_without"),
        report: (
            "draw_compared_curves",
            "draw_differences",
            "draw_loss_over_parameters",
            "draw_loss_over_time",
        ),
    }.items()
    for name in names
}


@contextlib.contextmanager
def drawing(functions):
    """Has figures drawn by these functions."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), function in functions.items():
            patch.setattr(module, name, function)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """The two figures of a run take as long as a training of a few steps: they are drawn where `figures` are asked for."""

    def not_drawn(*data_and_file):
        (file,) = [each for each in data_and_file if isinstance(each, Path)]
        Image.new("L", (1, 1)).save(file)

    with drawing(dict.fromkeys(DRAWING, not_drawn)):
        yield


@pytest.fixture
def figures(no_figures):
    """The figures of a test are drawn."""
    with drawing(DRAWING):
        yield


@pytest.fixture
def offline(monkeypatch):
    """No hub is asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def room(tmp_path, monkeypatch, offline):
    """The current folder: with a small text, and with `text.yaml` and `image.yaml`, which run in a moment."""
    monkeypatch.chdir(tmp_path)
    write_room(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def comparison(tmp_path_factory, no_figures):
    """The room of a finished run in `run`, of DCA next to the standard scheme, and the record of its training."""
    room = tmp_path_factory.mktemp("comparison")
    write_room(room)
    with pytest.MonkeyPatch.context() as patch, drawing(DRAWING):
        patch.chdir(room)
        steps = record_training(patch)
        call(causal_lm.main, TEXT_RUN, "--output_dir=run", "--baseline=standard", "--report_to=tensorboard")
    return room, steps
