"""A process that runs two training steps and prints the time of each part of the start.

`switchtitan benchmark startup` starts it:

    python -m switchtitan.benchmark.startup_process STARTED_AT [--config FILE] [--KEY VALUE ...]

STARTED_AT is the system's monotonic clock before the process starts. Prints one line of JSON:
seconds by part.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from switchtitan.builders.trainer import build_trainer
from switchtitan.checkpoint.config import RESUME_NEVER
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.errors import UserError, exit_for
from switchtitan.job.config import JobConfig, parse_arguments

PARTS = (
    "imports",
    "configuration",
    "corpus",
    "model",
    "optimizer",
    "rest",
    "first step",
    "second step",
)
"""In order. "model" includes sharding and initial values; "rest" follows the optimizer."""


def main(argv: Sequence[str]) -> None:
    """Runs two steps of the configuration on the command line."""
    marks = [("start", float(argv[0])), ("imports", time.monotonic())]

    def mark(part: str) -> None:
        marks.append((part, time.monotonic()))

    try:
        with tempfile.TemporaryDirectory() as folder:
            config = _without_output(parse_arguments(argv[1:], num_ranks=1), Path(folder))
            world = start_world(config.parallelism)
            mark("configuration")
            trainer = build_trainer(config, world, on_part=mark)
            mark("rest")
            for part in ("first step", "second step"):
                trainer.stepper.step()
                world.synchronize()
                mark(part)
            trainer.close()
    except UserError as error:
        exit_for(error)
    finally:
        stop_world()
    durations = {part: at - before for (_, before), (part, at) in pairwise(marks)}
    print(json.dumps(durations), flush=True)


def _without_output(config: JobConfig, folder: Path) -> JobConfig:
    """Starts from scratch in `folder`, without TensorBoard, progress bar and trace."""
    checkpoint = {"resume": RESUME_NEVER, "initial_weights": None}
    return config.model_copy(
        update={
            "job": config.job.model_copy(update={"output_dir": folder}),
            "checkpoint": config.checkpoint.model_copy(update=checkpoint),
            "metrics": config.metrics.model_copy(
                update={"tensorboard": False, "progress_bar": False}
            ),
            "profiler": config.profiler.model_copy(update={"enabled": False}),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1:])
