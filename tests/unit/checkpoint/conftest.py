"""A small state in a world of one rank."""

from functools import partial

import pytest
import torch
from support import checkpoints

from switchtitan.distributed.world import temporary_world


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "model.layers.0.weight": torch.randn(5, 7, generator=generator),
        "model.norm.weight": torch.randn(11, generator=generator).to(torch.bfloat16),
        "optimizer.step": torch.tensor(17),
        "optimizer.vector_steps": torch.arange(3),
        "optimizer.unused": torch.empty(0, 7),
        "switch.column": torch.arange(15).view(5, 3)[:, 1:2],
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def make_checkpointer(folder):
    with temporary_world():
        yield partial(checkpoints.make_checkpointer, folder, async_save=False)


@pytest.fixture
def saved(make_checkpointer, tensors, folder):
    """A folder with complete checkpoints of steps 1, 2 and 10."""
    checkpointer = make_checkpointer(keep_latest=0)
    for step in (1, 2, 10):
        tensors["optimizer.step"].fill_(step)
        checkpointer.save(step, tensors, {"tokens_seen": 100 * step})
    return folder
