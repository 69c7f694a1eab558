"""The tools of others, run for real on a small trained DCA model beside a Llama of the same shape: `make test-clients`."""

from pathlib import Path

import pytest
import torch

from tests.clients.tools import MODELS, TEXT, build_tokenizer, train


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session", autouse=True)
def quiet(tmp_path_factory):
    """One thread, no network, caches of their own; also in the processes that tests start."""
    torch.set_num_threads(1)
    settings = {
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """The folders of both models, trained alike, with their tokenizer."""
    tokenizer, folders = build_tokenizer(), {}
    ids = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"])
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        assert train(model, ids) < 4.0  # of 5.95 at the start: it has learned what to draw from where
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=MODELS)
def checkpoint(request, checkpoints) -> str:
    """Each of both folders in turn."""
    return checkpoints[request.param]
