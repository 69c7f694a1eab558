"""What the tests of runs of several processes are compared with."""

import pytest

from tests.training.run.launching import KINDS, RUN
from tests.training.tiny import call, write_room
from training import causal_lm


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The folders of runs of one process, by the kind of their data."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, options in KINDS.items():
            room = tmp_path_factory.mktemp("alone")
            write_room(room)
            patch.chdir(room)
            call(causal_lm.main, *RUN, *options)
            folders[kind] = room / "run"
    return folders
