"""What a training step needs on any number of ranks, found without them: memory, communication,
arithmetic."""

from dataclasses import dataclass

from switchtitan.benchmark.counters import CountFlops
from switchtitan.benchmark.memory_tracker import MemoryUse, TrackMemory
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.distributed.count_collectives import CommunicationCounts, CountCommunication
from switchtitan.job.config import JobConfig
from switchtitan.training.stepper import Stepper

ASSUMPTIONS = (
    "memory is that of rank 0, whose shards are the largest, and of tensors alone: no rounding and "
    "reserve of an allocator, no "
    "kernels' workspaces, libraries, or batches; neither evaluation nor saving",
    "nothing is compiled, and collectives do not overlap: compiled regions keep less; a GPU "
    "gathers a block ahead",
    "attention is a fused kernel that keeps no scores, and counts in full where a mask halves it",
    "FLOPs are those of matrix products and attention; the ratio is to a step that trains all "
    "weights and computes nothing "
    "twice, and is none of times",
)
"""What figures of a step must be read with."""


@dataclass(frozen=True)
class StepEstimate:
    """Of one rank's training step."""

    memory: MemoryUse
    communication: CommunicationCounts
    forward_backward_flops: int
    update_flops: int
    """Of matrix products in the optimizer's update."""
    full_rank_flops: int
    """Forward and backward, if all of the plain model's weights trained."""

    @property
    def flops_ratio(self) -> float:
        """This step's floating-point operations over full rank's."""
        return (self.forward_backward_flops + self.update_flops) / self.full_rank_flops


def estimate_step(config: JobConfig, num_ranks: int) -> StepEstimate:
    """Runs the second step on tensors without values, see `fake_stepper`; the figures rest on
    `ASSUMPTIONS`.

    The optimizer's state may be made in the first step.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    with fake_stepper(config, num_ranks) as stepper:
        stepper.step()
        return measure_step(stepper, config.data.seq_len)


def communication_of_a_step(
    config: JobConfig, num_ranks: int, step: int = 2
) -> CommunicationCounts:
    """Counts what one rank of `num_ranks` sends in a training step; see `CountCommunication` for
    what a byte is.

    The step is that of training, uncompiled; see `fake_stepper` for what it does not take.

    Args:
        step: which step of the run, from 1; those before it are run too. By default not the first,
            in which a method may have work to do that does not come again. Of work that grows rarer
            during a run, an early step's is the upper end.

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
    """Takes a step, with or without values, uncompiled, under all counters."""
    tokens_seen_before = stepper.state.tokens_seen
    with (
        TrackMemory(stepper) as memory,
        CountCommunication() as communication,
        CountFlops() as flops,
    ):
        result = stepper.compute_gradients()
        forward_backward_flops = flops.num_flops
        stepper.optimizer.step()
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
