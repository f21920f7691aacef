"""A long run with saves, evaluations, switches and spectra holds no more at its end."""

import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import wait_until_written
from support.long_form import IS_LONG
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer

from switchtitan.checkpoint.save import join_writers

INTERVAL = 20
"""Steps between two saves and between two samples."""
RISES = {
    # Pages that the allocator keeps differ from sample to sample.
    "memory_bytes": 4 << 20,
    "open_files": 0.5,
    "threads": 0.5,
}
"""Quantity -> its greatest rise between the first and the last sample, by a straight line. Events
and the log grow with the steps, by design."""
pytestmark = pytest.mark.skipif(not IS_LONG, reason="part of the long form")


class Sampler:
    """A hook of the trainer that measures its process."""

    def __init__(self, trainer):
        self._trainer = trainer
        self.samples = {}

    def is_due(self, step):
        return step % INTERVAL == 0

    def after(self, step, reporter):
        wait_until_written(self._trainer.checkpointer)
        assert join_writers(timeout_s=10.0)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples[step] = {
            "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }


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
    sampler = Sampler(trainer)
    trainer.hooks.append(sampler)
    trainer.train()
    samples = sampler.samples
    assert len(samples) == num_steps // INTERVAL
    steps = [step for step in samples if step > num_steps // 3]
    for name, bound in RISES.items():
        slope, _ = np.polyfit(steps, [samples[step][name] for step in steps], 1)
        assert float(slope) * (steps[-1] - steps[0]) <= bound, name


@pytest.mark.parametrize(("num_ranks", "num_steps"), [(1, 3000), (2, 1000)])
def test_what_a_run_holds_does_not_grow(corpora, num_ranks, num_steps):
    folder = corpora / f"soak-{num_ranks}"
    folder.mkdir()
    run_on_ranks(num_ranks, soak, folder, num_ranks, num_steps)
