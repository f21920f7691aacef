"""A process that starts a run up to its second step and says how long each part took; started by `benchmark.py startup`.

    python -m switchtitan.benchmark.startup_process STARTED_AT --config FILE [--section.key value ...]

STARTED_AT is the system's monotonic clock when the process was asked for. Prints one line of JSON: seconds by part.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

from switchtitan import build
from switchtitan.benchmark.quiet_trainer import without_output
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.errors import UserError, exit_for
from switchtitan.job.config import parse_arguments

PARTS = ("imports", "configuration", "corpus", "model", "optimizer", "rest", "first step", "second step")
"""In order. The model is built, sharded and filled; the rest is what follows the optimizer."""


def main(argv: Sequence[str]) -> None:
    """Starts the run that a command line asks for."""
    marks = [("start", float(argv[0])), ("imports", time.monotonic())]

    def mark(part: str) -> None:
        marks.append((part, time.monotonic()))

    try:
        with tempfile.TemporaryDirectory() as folder:
            config = without_output(parse_arguments(argv[1:], num_ranks=1), Path(folder))
            world = start_world(config.parallelism)
            mark("configuration")
            # From outside, so that building a trainer knows nothing of measurements.
            _mark_after("open_corpus", lambda: mark("corpus"))
            _mark_after("prepare_model", lambda: mark("model"))
            _mark_after("checkpoint_tensors", lambda: mark("optimizer"))
            trainer = build.build_trainer(config, world)
            mark("rest")
            for part in ("first step", "second step"):
                trainer.train_step()
                world.synchronize()
                mark(part)
            trainer.batches.close()
            trainer.reporter.close()
    except UserError as error:
        exit_for(error)
    finally:
        stop_world()
    durations = {part: at - before for (_, before), (part, at) in pairwise(marks)}
    print(json.dumps(durations), flush=True)


def _mark_after(function_name: str, mark: Callable[[], None]) -> None:
    function = getattr(build, function_name)

    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark()
        return result

    setattr(build, function_name, marked)


if __name__ == "__main__":
    main(sys.argv[1:])
