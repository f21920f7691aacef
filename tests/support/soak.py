"""Measures what a long run holds, and whether that grows."""

import ctypes
import gc
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from support.checkpoints import wait_until_written
from support.observed import num_tensors
from switchtitan.checkpoint.save import join_writers

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
RISES = {
    # Pages that the allocator keeps differ from sample to sample.
    "memory_bytes": 4 << 20,
    "shared_memory_bytes": _PAGE_BYTES,
    "open_files": 0.5,
    "threads": 0.5,
    "tensors": 2,
    # The lengths of numbers in the indices differ.
    "checkpoints_bytes": 16 << 10,
}
"""Quantity -> its greatest rise between the first and the last sample, by a straight line. Events,
spectra and the log grow with the steps, by design."""


class Sampler:
    """A hook of the trainer that measures its process after every `interval` steps."""

    def __init__(self, trainer, output_dir, interval):
        self._trainer, self._checkpoints = trainer, output_dir / "checkpoints"
        self._interval, self.samples = interval, {}

    def is_due(self, step):
        return step % self._interval == 0

    def after(self, step):
        wait_until_written(self._trainer.checkpointer)
        assert join_writers(timeout_s=10.0)
        dist.barrier()  # the main rank renames and deletes checkpoints
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        files = [path for path in self._checkpoints.rglob("*") if path.is_file()]
        self.samples[step] = {
            "memory_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES,
            "shared_memory_bytes": _shared_memory_bytes(),
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "tensors": num_tensors(),
            "checkpoints_bytes": sum(path.stat().st_size for path in files),
        }


def _shared_memory_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if "RssShmem" in line)
    return int(line.split()[1]) << 10


def rising(samples, warmup_steps):
    """Returns the quantities that rise by more than `RISES`: by how much, by a least-squares line
    through the samples after the warm-up."""
    steps = [step for step in samples if step > warmup_steps]
    found = {}
    for name, bound in RISES.items():
        slope, _ = np.polyfit(steps, [samples[step][name] for step in steps], 1)
        rise = float(slope) * (steps[-1] - steps[0])
        if rise > bound:
            found[name] = rise
    return found
