"""Estimates by another way than the product's."""

from unittest.mock import patch

from switchtitan.benchmark import estimate
from switchtitan.benchmark.estimate import StepEstimate, estimate_step
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.job.config import JobConfig
from switchtitan.observability.collectives import CommunicationCounts, CountCommunication


def estimate_all_micro_batches(config: JobConfig, num_ranks: int) -> StepEstimate:
    """Simulates every micro-batch of a step; `estimate_step` simulates a few."""
    with patch.object(estimate, "_NUM_SIMULATED", config.training.global_batch_size):
        return estimate_step(config, num_ranks)


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
