"""Estimates a training step on any number of ranks without them: memory, communication, FLOPs."""

from dataclasses import dataclass

from switchtitan.benchmark.counters import CountFlops
from switchtitan.benchmark.memory_tracker import MemoryUse, TrackMemory
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.distributed.count_collectives import CommunicationCounts, CountCommunication
from switchtitan.job.config import JobConfig
from switchtitan.training.stepper import Stepper

MEMORY_ASSUMPTIONS = (
    '[training] dtype = "auto" means bfloat16, as on GPUs since Ampere; for other devices pass '
    "--training.dtype float32",
    "memory is that of tensors on rank 0, whose shards are the largest, without allocator "
    "overhead, kernel workspaces, libraries and batches; evaluation and saving are not included",
    "nothing is compiled, and collectives do not overlap: compiled regions keep less; a GPU "
    "gathers one block ahead",
    "attention is a fused kernel that keeps no scores, and is not halved for the causal mask",
)
"""Assumptions of the estimates of memory."""
ASSUMPTIONS = (
    *MEMORY_ASSUMPTIONS,
    "FLOPs are those of matrix products and attention; the ratio compares FLOPs, not times, with "
    "full-rank training without recomputation",
)
"""Assumptions of the estimates."""


@dataclass(frozen=True)
class StepEstimate:
    """Memory, communication and FLOPs of one rank's training step."""

    memory: MemoryUse
    communication: CommunicationCounts
    forward_backward_flops: int
    update_flops: int
    """FLOPs of matrix products in the optimizer's update."""
    full_rank_flops: int
    """Forward and backward of the plain model with all weights trained."""

    @property
    def flops_ratio(self) -> float:
        """This step's FLOPs divided by those of full rank."""
        return (self.forward_backward_flops + self.update_flops) / self.full_rank_flops


def estimate_step(config: JobConfig, num_ranks: int) -> StepEstimate:
    """Estimates a step, under `ASSUMPTIONS`, by running it on fake tensors; see `fake_stepper`.

    Measures the second step, since the first may allocate the optimizer's state.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    with fake_stepper(config, num_ranks) as stepper:
        stepper.step()
        return measure_step(stepper, config.data.seq_len)


def communication_of_a_step(
    config: JobConfig, num_ranks: int, step: int = 2
) -> CommunicationCounts:
    """Counts what one of `num_ranks` ranks sends in a step; `CountCommunication` defines the bytes.

    Runs uncompiled training steps on fake tensors; see `fake_stepper`.

    Args:
        step: step of the run, from 1; earlier steps run too. Not the first by default, since a
            method may do work only then. For events that become rarer during a run, an early step
            is an upper bound.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    with fake_stepper(config, num_ranks) as stepper:
        for _ in range(step - 1):
            stepper.step()
        with CountCommunication() as counter:
            stepper.step()
    return counter.counts


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
    num_tokens = stepper.state.tokens_seen - tokens_seen_before
    return StepEstimate(
        memory.use,
        communication.counts,
        forward_backward_flops=forward_backward_flops,
        update_flops=flops.num_flops - forward_backward_flops,
        full_rank_flops=stepper.model.num_flops_per_token(seq_len)
        * num_tokens
        // stepper.world.size,
    )
