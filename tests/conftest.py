"""Fixtures for all tests."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A folder beside which runs share one prepared corpus: give tiny runs subfolders of it."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left_behind():
    """A process group that a module's tests have started ends with them, whatever order modules run in."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
