"""The largest micro-batch that fits in a device's memory, estimated without the device."""

from dataclasses import dataclass, field

from switchtitan.benchmark.memory_tracker import TrackMemory
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.job.config import JobConfig

MAX_BATCH_SIZE = 64
"""The most sequences per micro-batch that are tried."""
NUM_MICRO_BATCHES = 2
"""Micro-batches per step: gradients are accumulated, as in most runs on few devices."""
USABLE_SHARE = 0.9
"""The share of a device's memory that tensors may take. The rest is for what estimates leave out:
the CUDA context, libraries, kernel workspaces and fragmentation."""
FIT_ASSUMPTIONS = (
    f"a step has {NUM_MICRO_BATCHES} micro-batches; up to {MAX_BATCH_SIZE} sequences are tried",
    f"a micro-batch fits if the estimated peak is at most {USABLE_SHARE:.0%} of the memory",
    "a smaller micro-batch never has a higher peak",
)
"""Assumptions besides those of `estimate`."""


@dataclass
class BatchSizeSearch:
    """Searches the largest micro-batch of a configuration that fits on each of `num_ranks` ranks.

    Each peak is that of a whole step on fake tensors, and is estimated once for all searches.
    """

    config: JobConfig
    num_ranks: int
    peaks: dict[int, int] = field(default_factory=dict)
    """Peak bytes on rank 0, by sequences per micro-batch, as far as estimated."""

    def largest(self, memory_gib: float) -> int:
        """Returns the most sequences per micro-batch that fit, at most `MAX_BATCH_SIZE`; 0 if none.

        Args:
            memory_gib: memory of the device in GiB.
        """
        limit = USABLE_SHARE * memory_gib * 2**30
        if self._peak(1) > limit:
            return 0
        if self._peak(MAX_BATCH_SIZE) <= limit:
            return MAX_BATCH_SIZE
        fits = max(size for size, peak in self.peaks.items() if peak <= limit)
        too_large = min(size for size, peak in self.peaks.items() if peak > limit)
        while too_large - fits > 1:
            # Peaks grow almost linearly, so interpolation needs fewer estimates than bisection.
            slope = (self.peaks[too_large] - self.peaks[fits]) / (too_large - fits)
            guess = fits + int((limit - self.peaks[fits]) / slope)
            guess = min(max(guess, fits + 1), too_large - 1)
            if self._peak(guess) <= limit:
                fits = guess
            else:
                too_large = guess
        return fits

    def _peak(self, batch_size: int) -> int:
        if batch_size not in self.peaks:
            self.peaks[batch_size] = peak_bytes(self.config, self.num_ranks, batch_size)
        return self.peaks[batch_size]


def peak_bytes(config: JobConfig, num_ranks: int, batch_size: int) -> int:
    """Estimates the peak bytes of the second step on rank 0.

    Args:
        batch_size: sequences per micro-batch; replaces the batch sizes of `config`.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    sizes = {
        "local_batch_size": batch_size,
        "global_batch_size": NUM_MICRO_BATCHES * batch_size * num_ranks,
    }
    training = config.training.model_copy(update=sizes)
    config = config.model_copy(update={"training": training})
    with fake_stepper(config, num_ranks) as stepper:
        # The first step may allocate the optimizer's state.
        stepper.step()
        with TrackMemory(stepper) as memory:
            stepper.step()
    return memory.use.peak
