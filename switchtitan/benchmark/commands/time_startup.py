"""`switchtitan benchmark startup`: from process start to the first step, with a cold and a warm
compile cache."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pydantic import JsonValue

from switchtitan.benchmark.commands.command import Command, Measurement, Overrides, add_config
from switchtitan.benchmark.sides import load_sides, read_side
from switchtitan.benchmark.startup_process import PARTS
from switchtitan.benchmark.tables import aligned
from switchtitan.data import open_corpus
from switchtitan.errors import EnvironmentMismatchError


def seconds_by_part(arguments: list[str], compile_cache: Path) -> dict[str, float]:
    """Starts a run in a new process; see `switchtitan.benchmark.startup_process`.

    Args:
        arguments: arguments of training.
        compile_cache: cache folder of torch.compile.

    Raises:
        EnvironmentMismatchError: if the process fails, with its error output.
    """
    command = [
        sys.executable,
        "-m",
        "switchtitan.benchmark.startup_process",
        repr(time.monotonic()),
        *arguments,
    ]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compile_cache)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode != 0:
        raise EnvironmentMismatchError(
            f"the run's process exited with status {result.returncode}: {result.stderr}"
        )
    durations: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return durations


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    (config,) = load_sides([options.config], overrides, num_ranks=1).values()
    # Prepared here, so that the measured start does not include it.
    open_corpus(config.data)
    side = read_side(options.config)
    words = [
        word
        for key, values in (overrides | side.overrides).items()
        for word in (f"--{key}", *values)
    ]
    arguments = ["--config", side.file, *words]
    with tempfile.TemporaryDirectory() as compile_cache:
        starts = {
            name: seconds_by_part(arguments, Path(compile_cache))
            for name in ("cold cache", "warm cache")
        }
    rows: list[tuple[str, ...]] = [("s", *starts, "")]
    rows += [("", *(f"{seconds[part]:.2f}" for seconds in starts.values()), part) for part in PARTS]
    first_step = PARTS[: PARTS.index("first step") + 1]
    totals = {name: sum(seconds[part] for part in first_step) for name, seconds in starts.items()}
    rows.append(
        ("", *(f"{total:.2f}" for total in totals.values()), "to the end of the first step")
    )
    record: dict[str, JsonValue] = {
        name: {"parts_s": dict(seconds), "to_first_step_s": totals[name]}
        for name, seconds in starts.items()
    }
    return Measurement(aligned(rows), {"startup": record})


STARTUP = Command(
    name="startup",
    summary="time a run's start up to its first step, with a cold and a warm compile cache",
    description="Starts a configuration's run in two new processes, first with a cold and then "
    "with a warm compile cache, and prints the time of each part up to the first step. Prepares "
    "the corpus before.",
    add_arguments=add_config,
    measure=_measure,
)
