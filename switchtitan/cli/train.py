"""Trains: `switchtitan train [--config FILE] [--section.key value ...]`, one rank per process."""

from collections.abc import Sequence

from switchtitan.build import build_trainer
from switchtitan.distributed.world import (
    num_ranks_from_launcher,
    start_world,
    stop_world,
    stop_world_if_single,
)
from switchtitan.errors import UserError, exit_for, exit_for_interrupt, interrupt_on_sigterm
from switchtitan.job.config import parse_arguments


def main(argv: Sequence[str]) -> None:
    """Trains the configured run.

    Raises:
        SystemExit: with status 2 for a user's mistake, 128 + n after signal n.
    """
    if num_ranks_from_launcher() == 1:
        # Treat SIGTERM like Ctrl-C, so that an in-flight save completes. Not on several ranks:
        # torchrun also sends SIGTERM to the survivors of a crash, whose save would hang.
        interrupt_on_sigterm()
    try:
        config = parse_arguments(argv)
        world = start_world(config.parallelism)
        build_trainer(config, world).train()
        # Not after other errors: leaving the process group waits for the other ranks. If they wait
        # for this one, its traceback would never be printed.
        stop_world()
    except UserError as error:
        stop_world_if_single()
        exit_for(error)
    except KeyboardInterrupt as stop:
        stop_world_if_single()
        exit_for_interrupt(stop, "interrupted")
