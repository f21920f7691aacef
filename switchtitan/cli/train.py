"""Trains: `switchtitan train [--config FILE] [--section.key value ...]`. This process is one rank."""

import signal
import sys
from collections.abc import Sequence

from switchtitan.build import build_trainer
from switchtitan.distributed.world import (
    num_ranks_from_launcher,
    start_world,
    stop_world,
    stop_world_if_alone,
)
from switchtitan.errors import UserError, exit_for
from switchtitan.job.config import parse_arguments


def main(argv: Sequence[str]) -> None:
    """Trains as the command line asks.

    Raises:
        SystemExit: with status 2, after a message, for a mistake that the user can mend; 128 + n after signal n.
    """
    if num_ranks_from_launcher() == 1:
        # What ends a job on a cluster lets a save under way be completed, as a Ctrl-C does. Among several ranks the launcher
        # also sends it to those that wait for one that has crashed, and a save of theirs would never be done.
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = parse_arguments(argv)
        world = start_world(config.parallelism)
        build_trainer(config, world).train()
        # Not after just any error, since leaving waits for the other ranks, and they may be waiting for this one: its traceback
        # would never be seen. Nor would a save in the background come to its end, as it has before either of the following.
        stop_world()
    except UserError as error:
        stop_world_if_alone()
        exit_for(error)
    except KeyboardInterrupt as stop:
        stop_world_if_alone()
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None


def _interrupt(signum: int, frame: object) -> None:
    # Who ends a whole process group ends the loader's workers too, which torch would report in the middle of the save.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)
