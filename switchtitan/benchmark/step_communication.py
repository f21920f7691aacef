"""What a training step communicates on any number of ranks, found without them."""

from switchtitan.benchmark.fake_stepper import fake_stepper
from switchtitan.distributed.count_collectives import CommunicationCounts, CountCommunication
from switchtitan.job.config import JobConfig


def communication_of_a_step(config: JobConfig, num_ranks: int, step: int = 2) -> CommunicationCounts:
    """Counts what one rank of `num_ranks` sends in a training step; see `CountCommunication` for what a byte is.

    The step is that of training, uncompiled; see `fake_stepper` for what it does not take.

    Args:
        step: which step of the run, from 1; those before it are run too. By default not the first, in which a method may have
            work to do that does not come again. Of work that grows rarer during a run, an early step's is the upper end.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    with fake_stepper(config, num_ranks) as stepper:
        for _ in range(step - 1):
            stepper.step()
        with CountCommunication() as counter:
            stepper.step()
    return counter.counts
