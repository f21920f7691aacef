"""A long run with saves, evaluations, switches and spectra holds no more at its end."""

import pytest
from support.long_form import IS_LONG
from support.ranks import run_on_ranks
from support.soak import Sampler, rising
from support.tiny import tiny_trainer

INTERVAL = 20
"""Steps between two saves and between two samples."""
pytestmark = pytest.mark.skipif(not IS_LONG, reason="part of the long form")


def soak(rank, folder, num_ranks, num_steps):
    """Trains; no quantity of this rank's process rises."""
    keys = {
        "training.steps": num_steps,
        "checkpoint.interval": INTERVAL,
        "checkpoint.keep_latest": 2,
        "checkpoint.async_save": "true",
        "evaluation.interval": INTERVAL,
        "spectrum.interval": INTERVAL,
        "metrics.tensorboard": "true",
        "parallelism.check_interval": INTERVAL // 2,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    trainer = tiny_trainer(folder, "switchlora", *words, num_ranks=num_ranks)
    sampler = Sampler(trainer, folder / "run", INTERVAL)
    trainer.hooks.append(sampler)
    trainer.train()
    assert len(sampler.samples) == num_steps // INTERVAL
    assert rising(sampler.samples, warmup_steps=num_steps // 3) == {}


@pytest.mark.parametrize(("num_ranks", "num_steps"), [(1, 3000), (2, 1000)])
def test_what_a_run_holds_does_not_grow(corpora, num_ranks, num_steps):
    folder = corpora / f"soak-{num_ranks}"
    folder.mkdir()
    run_on_ranks(num_ranks, soak, folder, num_ranks, num_steps)
