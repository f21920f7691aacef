"""The largest micro-batch that fits in a device's memory, estimated without the device."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from switchtitan.benchmark.memory_tracker import TrackMemory
from switchtitan.benchmark.steppers import fake_batches, fake_stepper
from switchtitan.job.config import JobConfig

MAX_BATCH_SIZE = 64
"""The most sequences per micro-batch that are tried."""
NUM_MICRO_BATCHES = 2
"""Micro-batches per step: gradients are accumulated, as in most runs on few devices."""
USABLE_SHARE = 0.9
"""The share of a device's memory that tensors may take. The rest is for what estimates leave out:
the CUDA context, libraries, kernel workspaces and fragmentation."""


@dataclass(frozen=True)
class Fit:
    """What fits on each rank."""

    batch_sizes: dict[float, int]
    """The most sequences per micro-batch that fit, at most `MAX_BATCH_SIZE`, by GiB of memory; 0 if
    not even one fits."""
    local_batch_sizes: dict[float, int]
    """The largest of those that fit and divide a rank's share of the global batch."""
    peaks: dict[int, int]
    """Estimated peak bytes on rank 0 by sequences per micro-batch, of all that were tried."""


def largest_batch_sizes(config: JobConfig, num_ranks: int, memories_gib: Sequence[float]) -> Fit:
    """Searches the largest micro-batches of `config`, whose local batch size is not used.

    Args:
        memories_gib: memory of each kind of device, in GiB.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    peaks: dict[int, int] = {}
    with fake_stepper(config, num_ranks) as stepper:
        # The first step may allocate the optimizer's state.
        stepper.batches = fake_batches(1, config.data.seq_len, NUM_MICRO_BATCHES)
        stepper.step()

        def peak(size: int) -> int:
            if size not in peaks:
                stepper.batches = fake_batches(size, config.data.seq_len, NUM_MICRO_BATCHES)
                with TrackMemory(stepper) as memory:
                    stepper.step()
                peaks[size] = memory.use.peak
            return peaks[size]

        sizes = range(1, MAX_BATCH_SIZE + 1)  # peaks grow with the size
        found = {
            memory: bisect_right(sizes, USABLE_SHARE * memory * 2**30, key=peak)
            for memory in memories_gib
        }
        peak(1)  # which the table shows
    total = config.training.global_batch_size
    divisors = [d for d in sizes if total % (num_ranks * d) == 0]
    dividing = {gib: max([0, *(d for d in divisors if d <= most)]) for gib, most in found.items()}
    return Fit(found, dividing, dict(sorted(peaks.items())))
