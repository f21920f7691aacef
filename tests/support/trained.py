"""Small trained models on disk: a run with a checkpoint, and a folder that transformers saved."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from support.commands import succeed
from support.tiny import tiny_trainer, train_steps
from switchtitan.distributed.world import stop_world

TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 270
_EVERY_FIVE_STEPS = (
    *("--training.steps", "15", "--evaluation.interval", "15", "--metrics.tensorboard", "true"),
    *("--checkpoint.interval", "5", "--checkpoint.keep_latest", "0", "--spectrum.interval", "5"),
)


class Trained(NamedTuple):
    """A finished run of SwitchLoRA, with checkpoints and spectra after 5, 10 and 15 steps."""

    run: Path
    config: Path
    exported: Path
    loss: float
    """On the validation split, from the run itself."""
    logits: torch.Tensor
    """Of `TOKENS`, from the model that was trained."""


def _quiet():
    """As in a process of its own, in which no run has set up its log."""
    logging.getLogger("switchtitan").setLevel(logging.WARNING)


def train_and_export(folder):
    """Trains a tiny run in `folder / "run"`, and exports its newest checkpoint."""
    trainer = tiny_trainer(folder, "switchlora", *_EVERY_FIVE_STEPS)
    trainer.train()
    with torch.no_grad():
        logits = trainer.stepper.model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))
    stop_world()
    _quiet()
    (config,) = folder.glob("*.toml")
    succeed("export", folder / "run")
    exported = folder / "run" / "exports" / "step-000000015"
    loss = trainer.stepper.state.last_validation_loss
    assert loss is not None
    return Trained(folder / "run", config, exported, loss, logits)


def train_and_save(folder, method, *overrides, num_steps=7):
    """Trains a tiny run, saves and closes it; its folder is `folder / "run"`."""
    trainer = tiny_trainer(folder, method, *overrides)
    train_steps(trainer, num_steps)
    trainer.save()
    trainer.checkpointer.finish()
    trainer.close()
    _quiet()
    return trainer
