"""Frozen weights outside the units are sharded between steps too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import tiny_config
from torch import nn
from torch.distributed.tensor import DTensor

from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.distributed.world import stop_world
from switchtitan.models.llama.model import Llama

GATHER_ONCE = ("--parallelism.frozen_weights", "gather_once")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def test_a_model_without_outer_units_shards_all_frozen_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze_embedding(model: Llama) -> list[list[nn.Module]]:
        model.model.embed_tokens.weight.requires_grad_(False)
        return []

    monkeypatch.setattr(Llama, "outer_units", freeze_embedding)
    config = tiny_config(tmp_path, "switchlora", *GATHER_ONCE, num_ranks=2)
    with fake_stepper(config, 2) as stepper:
        assert not stepper.model.model.embed_tokens.weight.requires_grad
        for _ in range(2):
            stepper.step()
            for name, parameter in stepper.model.named_parameters():
                assert isinstance(parameter, DTensor), name


def test_a_unit_without_modules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "outer_units", lambda model: [[]])
    config = tiny_config(tmp_path, "lora")
    refusal = pytest.raises(ValueError, match=r"outer_units\(\) contains a list without modules")
    with refusal, fake_stepper(config, 1):
        pass
