"""A long run with saves, evaluations, switches and spectra holds no more at its end."""

import json
from pathlib import Path

import pytest
from support.long_form import IS_LONG
from support.ranks import run_on_ranks
from support.soak import Leaks, Sampler, rising
from support.tiny import tiny_trainer

INTERVAL = 20
"""Steps between two saves and between two samples."""
pytestmark = pytest.mark.skipif(not IS_LONG, reason="part of the long form")


def soak(rank, folder, num_ranks, num_steps, leaks, file):
    """Trains, and writes which quantities of this rank's process rise."""
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
    leaking = Leaks(folder / "run", INTERVAL)
    trainer.hooks.extend([leaking, sampler] if leaks else [sampler])
    trainer.train()
    leaking.close()
    assert len(sampler.samples) == num_steps // INTERVAL
    found = rising(sampler.samples, warmup_steps=max(num_steps // 3, 3 * INTERVAL))
    Path(f"{file}-{rank}").write_text(json.dumps(found))


def rising_in(folder, num_ranks, num_steps, leaks=False):
    """Returns the quantities that rise, of each rank. Each runs in a new process."""
    folder.mkdir()
    file = folder / "rising"
    run_on_ranks(num_ranks, soak, folder, num_ranks, num_steps, leaks, file)
    return [json.loads(Path(f"{file}-{rank}").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize(("num_ranks", "num_steps"), [(1, 3000), (2, 1000)])
def test_what_a_run_holds_does_not_grow(corpora, num_ranks, num_steps):
    for found in rising_in(corpora / f"soak-{num_ranks}", num_ranks, num_steps):
        assert found == {}


def test_the_measurement_sees_leaks_of_every_kind(corpora):
    (found,) = rising_in(corpora / "soak-leaks", 1, 120, leaks=True)
    assert found.keys() == {
        "memory_bytes",
        "shared_memory_bytes",
        "open_files",
        "threads",
        "tensors",
        "checkpoints_bytes",
    }
