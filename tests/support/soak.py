"""Measures what a long run holds, and how fast that grows."""

import ctypes
import gc
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from support.leftovers import num_tensors
from switchtitan.checkpoint.background import join_writers
from switchtitan.training.trainer import Trainer

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
RISES: dict[str, float] = {
    # Pages that the allocator keeps differ from sample to sample.
    "memory_bytes": 4 << 20,
    "shared_memory_bytes": _PAGE_BYTES,
    "open_files": 0.5,
    "threads": 0.5,
    "tensors": 2,
    # The lengths of numbers in the indices differ.
    "checkpoints_bytes": 16 << 10,
}
"""Quantity -> its greatest rise between the first and the last sample, by a straight line."""
GROWING = "other_files_bytes"
"""Events, spectra and the log grow with the steps, by design."""


class Slope(NamedTuple):
    """A least-squares line through the samples after the warm-up."""

    per_1000_steps: float
    rise: float
    """Over all of these samples."""


class Sampler:
    """A hook of the trainer that measures its process every `interval` steps."""

    def __init__(self, trainer: Trainer, output_dir: Path, interval: int) -> None:
        self._trainer = trainer
        self._output_dir = output_dir
        self._interval = interval
        self.samples: dict[int, dict[str, float]] = {}

    def around(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def is_due(self, step: int) -> bool:
        return step % self._interval == 0

    def after(self, step: int) -> None:
        while self._trainer.checkpointer.is_writing:
            time.sleep(0.005)
        assert join_writers(timeout_s=10.0)
        dist.barrier()  # the main rank renames and deletes checkpoints
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.samples[step] = self._measure()

    def results(self) -> dict[str, float | None]:
        return {}

    def _measure(self) -> dict[str, float]:
        resident = Path("/proc/self/statm").read_text().split()
        checkpoints = _num_bytes(self._output_dir / "checkpoints")
        return {
            "memory_bytes": int(resident[1]) * _PAGE_BYTES,
            "shared_memory_bytes": _shared_memory_bytes(),
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "tensors": num_tensors(),
            "checkpoints_bytes": checkpoints,
            GROWING: _num_bytes(self._output_dir) - checkpoints,
        }


def _shared_memory_bytes() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "RssShmem" in line
    )
    return int(line.split()[1]) << 10


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def slopes(samples: dict[int, dict[str, float]], warmup_steps: int) -> dict[str, Slope]:
    """Returns the slope of each quantity after `warmup_steps`."""
    steps = [step for step in samples if step > warmup_steps]
    found = {}
    for name in samples[steps[0]]:
        slope, _ = np.polyfit(steps, [samples[step][name] for step in steps], 1)
        found[name] = Slope(1000 * float(slope), float(slope) * (steps[-1] - steps[0]))
    return found


def rising(found: dict[str, Slope]) -> list[str]:
    """Returns the quantities that rise by more than `RISES`."""
    return [name for name, bound in RISES.items() if found[name].rise > bound]
