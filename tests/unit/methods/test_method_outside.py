"""A method outside the package, with its own scale, trains and exports correct weights."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from support.checkpoints import read_tensors
from support.tiny import tiny_config, tiny_trainer, train_steps
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from switchtitan.builders.trainer import build_trainer
from switchtitan.cli import export
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.methods.lowrank import LowRankConfig, LowRankMethod, low_rank_layers
from switchtitan.models import MODELS
from switchtitan.registry import Component
from switchtitan.spectra.spectra_files import read_spectra
from switchtitan.spectra.weight_change import checkpoint_spectra
from switchtitan.training.trainer import Trainer

RANK, ALPHA = 6, 1.5
STEPS = 9
TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 270


class RootScaledConfig(LowRankConfig):
    """`name = "root_scaled"`: the scale is alpha / sqrt(rank), twice that in `down_proj`."""

    name: Literal["root_scaled"] = "root_scaled"
    """The method."""

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)


class RootScaled(LowRankMethod[RootScaledConfig]):
    """LoRA with that scale."""

    def scale_of(self, layer_name: str) -> float:
        return self.config.scale * (2 if layer_name.endswith("down_proj") else 1)


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with METHODS.registered("root_scaled", Component(RootScaledConfig, RootScaled)):
        yield


def config_of(folder: Path) -> JobConfig:
    measured = ("--spectrum.interval", str(STEPS), "--training.steps", str(STEPS))
    config = tiny_config(folder, "lora", *measured)
    return config.model_copy(update={"method": RootScaledConfig(rank=RANK, alpha=ALPHA)})


def trained_run(folder: Path) -> Trainer:
    torch.set_num_threads(1)
    config = config_of(folder)
    trainer = build_trainer(config, start_world(config.parallelism))
    trainer.train()
    return trainer


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32)).clone()


def logits_with_the_scale_of_lora(config: JobConfig, checkpoint: Path) -> Tensor:
    """What a reader that computed alpha / rank from the section would export."""
    lora = Lora(LoraConfig(rank=RANK, alpha=ALPHA), STEPS, seed=0)
    plain = MODELS.build(config.model)
    plain.load_state_dict(lora.dense_weights(read_tensors(checkpoint, prefix="model.")))
    return logits(plain)


def test_its_export_its_warm_start_and_its_spectra_have_its_own_scale(corpora):
    folder = corpora / "outside"
    trainer = trained_run(folder)
    live = logits(trainer.stepper.model)
    checkpoint = trainer.checkpointer.latest
    scales = {layer.scale for layer in low_rank_layers(trainer.stepper.model).values()}
    assert scales == {ALPHA / math.sqrt(RANK), 2 * ALPHA / math.sqrt(RANK)}
    wrong = logits_with_the_scale_of_lora(config_of(folder), checkpoint)

    export.main(["--checkpoint", str(folder / "run")])
    exported = AutoModelForCausalLM.from_pretrained(folder / "run" / "exports" / checkpoint.name)
    # (W + s B A) x against W x + s B (A x): fp32 rounding errors of 6e-8 through two blocks;
    # logits are of order 1.
    torch.testing.assert_close(exported(TOKENS).logits, live, rtol=1e-5, atol=1e-5)
    assert (wrong - live).abs().max() > 0.01

    warm = ("--checkpoint.initial_weights", str(checkpoint))
    dense = tiny_trainer(corpora / "outside-warm", "full_rank", *warm)
    dense.stepper.close()
    torch.testing.assert_close(logits(dense.stepper.model), live, rtol=1e-5, atol=1e-5)

    measured = read_spectra(folder / "run" / "spectra")[STEPS]
    from_checkpoint = checkpoint_spectra(checkpoint)
    assert len(measured) == 14
    assert from_checkpoint.keys() == measured.keys()
    for name, values in measured.items():
        assert torch.equal(from_checkpoint[name], values), name


def test_a_run_of_it_resumes_bitwise(corpora):
    straight = trained_run(corpora / "outside-straight")
    config = config_of(corpora / "outside-resumed")
    first = build_trainer(config, start_world(config.parallelism))
    train_steps(first, 4)
    first.save()
    first.checkpointer.finish()
    first.stepper.close()
    resumed = build_trainer(config, start_world(config.parallelism))
    assert resumed.stepper.state.step == 4
    resumed.train()
    dense = read_dense_checkpoint(resumed.checkpointer.latest)
    for name, tensor in read_dense_checkpoint(straight.checkpointer.latest).items():
        assert torch.equal(dense[name], tensor), name
