"""With full rank, `[optimizer] lr` is the rate of the layers that low-rank methods adapt."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world
from switchtitan.methods.full_rank import linear_weights
from switchtitan.methods.lowrank.config import ADAPTED_LINEARS
from switchtitan.models import MODELS

QWEN2 = ("--model.name", "qwen2", "--model.head_dim", "8")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.mark.parametrize("keys", [(), QWEN2, ("--model.tied_head", "true")])
def test_the_linear_weights_are_those_of_the_layers_that_low_rank_methods_adapt(tmp_path, keys):
    config = tiny_config(tmp_path, "full_rank", *keys)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    adapted = [name for name in config.model.linear_shapes() if name.endswith(ADAPTED_LINEARS)]
    assert len(adapted) == 7 * config.model.num_layers
    assert linear_weights(model) == {f"{name}.weight" for name in adapted}


@pytest.mark.parametrize("keys", [(), QWEN2])
def test_other_lr_is_the_rate_of_all_other_parameters(corpora: Path, keys) -> None:
    folder = corpora / f"full-rank-other-lr-{len(keys)}"
    trainer = tiny_trainer(folder, "full_rank", *keys, "--optimizer.other_lr", "1e-30")
    model = trainer.stepper.model
    treated = linear_weights(model)
    before = full_tensors(trainer)
    train_steps(trainer, 2)
    after = full_tensors(trainer)
    moved = {
        name
        for name, _ in model.named_parameters()
        if (after[f"model.{name}"] - before[f"model.{name}"]).abs().max() > 1e-28
    }
    assert moved == treated
    trainer.stepper.close()


def test_without_other_lr_every_parameter_has_one_rate_bitwise(corpora: Path) -> None:
    losses = {}
    for label, keys in {
        "default": (),
        "equal": ("--optimizer.other_lr", "1e-2"),
        "lower": ("--optimizer.other_lr", "1e-3"),
    }.items():
        trainer = tiny_trainer(corpora / f"full-rank-{label}-rates", "full_rank", *keys)
        losses[label] = train_steps(trainer, 4)
        trainer.stepper.close()
    assert losses["equal"] == losses["default"]
    # Shows that the check above can fail.
    assert losses["lower"] != losses["default"]
