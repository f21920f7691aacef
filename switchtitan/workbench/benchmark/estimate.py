"""Estimates a training step on any number of ranks without them: memory, communication, FLOPs, and
the largest micro-batch that fits in a device's memory."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from switchtitan.checkpoint.save import CheckpointTensors
from switchtitan.job.config import JobConfig
from switchtitan.training.describe import count_parameters
from switchtitan.training.step import Stepper
from switchtitan.workbench.benchmark.counters import CollectiveCount, CountCommunication, CountFlops
from switchtitan.workbench.benchmark.memory_tracker import MemoryUse, TrackMemory
from switchtitan.workbench.benchmark.steppers import fake_batches, fake_stepper

_NUM_SIMULATED = 3
"""Micro-batches: a first, a last, and one that stands for all others."""
MAX_BATCH_SIZE = 64
"""The most sequences per micro-batch that are tried."""
NUM_MICRO_BATCHES = 2
"""Micro-batches of `largest_batch_sizes`: gradients are accumulated, as in most runs."""
USABLE_SHARE = 0.9
"""The share of a device's memory that tensors may take. The rest is for what estimates leave out:
the CUDA context, libraries, kernel workspaces and fragmentation."""


@dataclass(frozen=True)
class StepEstimate:
    """Memory, communication and FLOPs of one rank's training step."""

    memory: MemoryUse
    communication: Mapping[str, CollectiveCount]
    """By kind; those that did not occur have zeros."""
    forward_backward_flops: int
    update_flops: int
    """FLOPs of matrix products in the optimizer's update."""
    full_rank_flops: int
    """Forward and backward of the plain model with all weights trained."""
    parameters: dict[str, int]
    """Values of trainable parameters, frozen parameters and buffers, over all ranks."""
    checkpoint_bytes: int
    """Tensors of a checkpoint of the run, over all ranks."""

    @property
    def flops_ratio(self) -> float:
        """This step's FLOPs divided by those of full rank."""
        return (self.forward_backward_flops + self.update_flops) / self.full_rank_flops


def estimate_step(config: JobConfig, num_ranks: int) -> StepEstimate:
    """Estimates a step by running it on fake tensors; see `fake_stepper`.

    Measures the second step, since the first may allocate the optimizer's state. Of many
    micro-batches it runs `_NUM_SIMULATED`: all but the first and the last cost the same.
    docs/PERFORMANCE.md says what else is assumed. Raises an EnvironmentMismatchError if the ranks
    do not fill the mesh of `config`.
    """
    training = config.training
    num_micro_batches = training.global_batch_size // (num_ranks * training.local_batch_size)
    num_more = num_micro_batches - _NUM_SIMULATED
    if num_more <= 0:
        return _simulate_step(config, num_ranks, num_micro_batches)
    fewer = _simulate_step(config, num_ranks, _NUM_SIMULATED - 1)
    few = _simulate_step(config, num_ranks, _NUM_SIMULATED)
    communication = {
        kind: CollectiveCount._make(
            high + num_more * (high - low)
            for low, high in zip(fewer.communication[kind], count, strict=True)
        )
        for kind, count in few.communication.items()
    }
    return replace(
        few,
        communication=communication,
        forward_backward_flops=few.forward_backward_flops * num_micro_batches // _NUM_SIMULATED,
        full_rank_flops=few.full_rank_flops * num_micro_batches // _NUM_SIMULATED,
    )


def _simulate_step(config: JobConfig, num_ranks: int, num_micro_batches: int) -> StepEstimate:
    size, seq_len = config.training.local_batch_size, config.data.seq_len
    with fake_stepper(config, num_ranks) as stepper:
        stepper.batches = fake_batches(size, seq_len, num_micro_batches)
        stepper.step()
        return measure_step(stepper, seq_len)


def measure_step(stepper: Stepper, seq_len: int) -> StepEstimate:
    """Runs an uncompiled step, on real or fake tensors, under all counters."""
    tokens_seen_before = stepper.state.tokens_seen
    with (
        TrackMemory(stepper) as memory,
        CountCommunication() as communication,
        CountFlops() as flops,
    ):
        result = stepper.compute_gradients()
        forward_backward_flops = flops.num_flops
        stepper.update()
        stepper.finish_step(result)
    tokens_of_rank = (stepper.state.tokens_seen - tokens_seen_before) // stepper.world.size
    saved = CheckpointTensors(stepper.model, stepper.optimizer)()
    return StepEstimate(
        memory.use,
        communication.counts,
        forward_backward_flops=forward_backward_flops,
        update_flops=flops.num_flops - forward_backward_flops,
        full_rank_flops=stepper.model.num_flops_per_token(seq_len) * tokens_of_rank,
        parameters=count_parameters(stepper.model),
        checkpoint_bytes=sum(tensor.numel() * tensor.itemsize for tensor in saved.values()),
    )


@dataclass(frozen=True)
class Fit:
    """What fits on each rank."""

    batch_size: dict[str, int]
    """The most sequences per micro-batch that fit, at most `MAX_BATCH_SIZE`, by GiB of memory; 0 if
    not even one fits."""
    peak: dict[int, int]
    """Estimated peak bytes on rank 0 by sequences per micro-batch, of all that were tried."""


def largest_batch_sizes(config: JobConfig, num_ranks: int, memories_gib: Sequence[float]) -> Fit:
    """Searches the largest micro-batches of `config`, whose local batch size is not used, for each
    kind of device. Raises an EnvironmentMismatchError if the ranks do not fill the mesh."""
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
            f"{memory:g}": bisect_right(sizes, USABLE_SHARE * memory * 2**30, key=peak)
            for memory in memories_gib
        }
        peak(1)  # which the table shows
    return Fit(found, dict(sorted(peaks.items())))
