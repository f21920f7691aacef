"""`switchtitan benchmark startup`: from the start of the process to the first step, without and
with compiled code at hand."""

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
    """Starts a process of its own for a run; see `switchtitan.benchmark.startup_process`.

    Args:
        arguments: as of training.
        compile_cache: the folder where torch.compile leaves and finds compiled code.

    Raises:
        EnvironmentMismatchError: if the process fails, with what it said.
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
            f"a run of its own process ended with status {result.returncode}: {result.stderr}"
        )
    durations: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return durations


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    (config,) = load_sides([options.config], overrides, num_ranks=1).values()
    # Once and for all; preparing it is no part of starting.
    open_corpus(config.data, is_main=True)
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
    rows += [
        ("", *(f"{of_start[part]:.2f}" for of_start in starts.values()), part) for part in PARTS
    ]
    first_step = PARTS[: PARTS.index("first step") + 1]
    totals = {name: sum(of_start[part] for part in first_step) for name, of_start in starts.items()}
    rows.append(
        ("", *(f"{total:.2f}" for total in totals.values()), "to the end of the first step")
    )
    record: dict[str, JsonValue] = {
        name: {"parts_s": dict(of_start), "to_first_step_s": totals[name]}
        for name, of_start in starts.items()
    }
    return Measurement(aligned(rows), {"startup": record})


STARTUP = Command(
    name="startup",
    summary="time a run's way to its first step, with and without compiled code at hand",
    description="Starts a configuration's run twice in processes of their own, first with an empty "
    "cache of compiled code and "
    "then with what the first has left, and splits the time to the end of the first step into its "
    "parts. The corpus "
    "is prepared before.",
    add_arguments=add_config,
    measure=_measure,
)
