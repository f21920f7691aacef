"""A small state on one process without torch.distributed."""

import pytest
import torch

from switchtitan.checkpoint import CheckpointConfig, Checkpointer


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "model.layers.0.weight": torch.randn(5, 7, generator=generator),
        "model.norm.weight": torch.randn(11, generator=generator).to(torch.bfloat16),
        "optimizer.step": torch.tensor(17),
        "optimizer.vector_steps": torch.arange(3),
        "optimizer.unused": torch.empty(0, 7),
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def make_checkpointer(folder):
    def make(comparable_identity=dict, **config):
        return Checkpointer(
            folder,
            CheckpointConfig(**{"async_save": False, **config}),
            identity={"model": {"size": "9m"}, "corpus": "abc"},
            metadata={"corpus": "a stand-in"},
            versions={"torch": "2.0"},
            is_main=True,
            group=None,
            background_group=None,
            comparable_identity=comparable_identity,
        )

    return make
