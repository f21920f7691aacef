"""Trainers for measurements: of a configuration, but without its output."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchtitan.build import build_trainer
from switchtitan.checkpoint.config import RESUME_NEVER
from switchtitan.distributed.world import start_world, world_for_a_while
from switchtitan.job.config import JobConfig
from switchtitan.observability import configure_logging
from switchtitan.training.trainer import Trainer


def without_output(config: JobConfig, folder: Path) -> JobConfig:
    """The same training, writing next to nothing, below `folder`, and starting anew."""
    return config.model_copy(
        update={
            "job": config.job.model_copy(update={"output_dir": folder}),
            "checkpoint": config.checkpoint.model_copy(
                update={"resume": RESUME_NEVER, "initial_weights": None}
            ),
            "metrics": config.metrics.model_copy(update={"tensorboard": False, "progress_bar": False}),
            "profiler": config.profiler.model_copy(update={"enabled": False}),
        }
    )


@contextmanager
def quiet_trainer(config: JobConfig) -> Iterator[Trainer]:
    """A trainer on the ranks that the launcher started, writing to a temporary folder, closed at the end."""
    with world_for_a_while(), tempfile.TemporaryDirectory() as folder:
        world = start_world(config.parallelism)
        trainer = build_trainer(without_output(config, Path(folder)), world)
        # The log file lies in the temporary folder.
        configure_logging(is_main=world.is_main, rank=world.rank)
        try:
            yield trainer
        finally:
            trainer.batches.close()
            trainer.reporter.close()
