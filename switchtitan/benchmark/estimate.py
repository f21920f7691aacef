"""What a training step needs on any number of ranks, found without them: memory, communication, arithmetic."""

from dataclasses import dataclass

from switchtitan.benchmark.fake_trainer import fake_trainer
from switchtitan.benchmark.flops import CountFlops
from switchtitan.benchmark.memory_tracker import MemoryUse, TrackMemory
from switchtitan.benchmark.stopwatch import MarkedOptimizer
from switchtitan.distributed.count_collectives import CommunicationCounts, CountCommunication
from switchtitan.job.config import JobConfig
from switchtitan.training.trainer import Trainer

ASSUMPTIONS = (
    "memory is that of rank 0, whose shards are the largest, and of tensors alone: no rounding and reserve of an allocator, no "
    "kernels' workspaces, libraries, or batches; neither evaluation nor saving",
    "nothing is compiled, and collectives do not overlap: compiled regions keep less; a GPU gathers a block ahead",
    "attention is a fused kernel that keeps no scores, and counts in full where a mask halves it",
    "FLOPs are those of matrix products and attention; the ratio is to a step that trains all weights and computes nothing "
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


def estimate_step(config: JobConfig, num_ranks: int, step: int = 2) -> StepEstimate:
    """Runs a step on tensors without values, see `fake_trainer`; the figures rest on `ASSUMPTIONS`.

    Args:
        step: which step of the run, from 2; those before it are run too, since the optimizer's state may come with the first.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    assert step > 1
    with fake_trainer(config, num_ranks) as trainer:
        for _ in range(step - 1):
            trainer.train_step()
        return measure_step(trainer, config.data.seq_len)


def measure_step(trainer: Trainer, seq_len: int) -> StepEstimate:
    """Takes a step of a trainer, with or without values, uncompiled, under all counters."""
    num_tokens = -trainer.state.tokens_seen
    flops_at_marks: list[int] = []
    optimizer = trainer.optimizer
    with TrackMemory(trainer) as memory, CountCommunication() as communication, CountFlops() as flops:
        trainer.optimizer = MarkedOptimizer(optimizer, lambda: flops_at_marks.append(flops.num_flops))
        try:
            trainer.train_step()
        finally:
            trainer.optimizer = optimizer
    num_tokens += trainer.state.tokens_seen
    before_update, after_update = flops_at_marks
    return StepEstimate(
        memory.use,
        communication.counts,
        forward_backward_flops=before_update,
        update_flops=after_update - before_update,
        full_rank_flops=trainer.model.num_flops_per_token(seq_len) * num_tokens // trainer.world.size,
    )
