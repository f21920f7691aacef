"""Estimates by another way than the product's."""

from unittest.mock import patch

from switchtitan.benchmark import estimate
from switchtitan.benchmark.estimate import StepEstimate, estimate_step
from switchtitan.job.config import JobConfig


def estimate_all_micro_batches(config: JobConfig, num_ranks: int) -> StepEstimate:
    """Simulates every micro-batch of a step; `estimate_step` simulates a few."""
    with patch.object(estimate, "_NUM_SIMULATED", config.training.global_batch_size):
        return estimate_step(config, num_ranks)
