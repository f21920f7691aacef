"""The output folder of a run."""

import os
from pathlib import Path

from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.job.config import JobConfig
from switchtitan.observability import configure_logging
from switchtitan.training.state import TrainState

CONFIG_FILE = "config.toml"
"""File in the output folder with the configuration that the run started with."""


def check_output_dir(output_dir: Path) -> None:
    """Checks that the folder can be created and written. Does not create it.

    Raises:
        ConfigError: if it cannot.
    """
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"[job] output_dir = {str(output_dir)!r}: expected a writable folder, but {nearest} is "
            f"{'read-only' if nearest.is_dir() else 'a file'}; choose another"
        )


def start_output(config: JobConfig, resolved: str, world: World, state: TrainState) -> None:
    """Opens the run's log file and writes its configuration.

    A resumed run writes its configuration next to the first one.
    """
    if not world.is_main:
        return
    output_dir = config.job.output_dir
    configure_logging(is_main=True, log_file=output_dir / "train.log")
    if state.step >= config.training.steps:
        return
    name = f"config-from-step-{state.step}.toml" if state.step else CONFIG_FILE
    write_atomically(output_dir / name, resolved)
