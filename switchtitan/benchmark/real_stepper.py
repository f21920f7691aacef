"""A stepper on the ranks that the launcher started, on the configuration's data."""

from collections.abc import Iterator
from contextlib import contextmanager

from switchtitan.build import build_batches, build_stepper, open_checked_corpus
from switchtitan.distributed.world import start_world
from switchtitan.job.config import JobConfig
from switchtitan.observability import configure_logging
from switchtitan.training.state import TrainState
from switchtitan.training.stepper import Stepper


@contextmanager
def real_stepper(config: JobConfig) -> Iterator[Stepper]:
    """The stepper of a new run, closed at the end; writes no files but the corpus."""
    world = start_world(config.parallelism)
    configure_logging(is_main=world.is_main, rank=world.rank)
    batches = build_batches(config, open_checked_corpus(config, world), world, TrainState())
    stepper = build_stepper(config, world, batches)
    try:
        yield stepper
    finally:
        stepper.close()
