"""Trains: `switchtitan train [--config FILE] [--section.key value ...]`, one rank per process.

`--dry-run` only says what would be trained."""

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from switchtitan.builders.reports import build_memory_snapshots
from switchtitan.builders.trainer import build_trainer
from switchtitan.cli.rendezvous import check_slurm_tasks
from switchtitan.cores import OtherLoad, num_cores
from switchtitan.distributed.board import Board
from switchtitan.distributed.launcher import is_launched
from switchtitan.distributed.world import start_world, stop_world, stop_world_if_single
from switchtitan.errors import UserError, exit_for, exit_for_stop
from switchtitan.job.config import DRY_RUN, parse_arguments
from switchtitan.observability import configure_logging
from switchtitan.training.run_lock import lock_output_dir
from switchtitan.training.signals import ExitNow, StopSignals
from switchtitan.training.stop import RunStop, Stopped

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Trains the configured run.

    Raises:
        SystemExit: with status 2 for a user's mistake, 128 + n after signal n; docs/USAGE.md has
            all statuses.
    """
    if DRY_RUN in argv:
        _dry_run(argv)
        return
    load = OtherLoad()
    try:
        with StopSignals(is_launched()) as signals:
            try:
                train(argv, load, signals)
            except UserError as error:
                stop_world_if_single()
                exit_for(error)
            except Stopped as stop:
                stop_world()
                exit_for_stop(stop.signal_number)
            except KeyboardInterrupt as stop:
                stop_world_if_single()
                exit_for_stop(signal_number_of(stop))
    except ExitNow as ending:
        ending.exit()


def _dry_run(argv: Sequence[str]) -> None:
    # Imported here: training does not use it.
    from switchtitan.cli import dry_run

    dry_run.main(argv)


def train(argv: Sequence[str], load: OtherLoad, signals: StopSignals) -> None:
    """Trains the configured run on this rank; `signals` stop it."""
    if not is_launched():
        check_slurm_tasks(num_nodes=1)
    config = parse_arguments(argv)
    if config.job.stop_signal is not None:
        signals.add(signal.Signals[config.job.stop_signal])
    world = start_world(config.parallelism)
    configure_logging(is_main=world.is_main, rank=world.rank)
    board = Board(world.rank, world.size) if world.size > 1 else None
    with (
        RunStop(
            signals,
            board,
            grace_s=config.checkpoint.grace_s,
            timeout_s=config.parallelism.timeout_s,
        ) as stop,
        explained(stop, signals),
        lock_output_dir(config.job.output_dir, world),
        build_memory_snapshots(config, world),
    ):
        trainer = build_trainer(config, world, stop=stop)
        if world.size == 1 and world.device.type == "cpu":
            warning = load.warning(torch.get_num_threads(), num_cores())
            if warning is not None:
                logger.warning(warning)
        trainer.train()
    # Not after other errors: leaving the process group waits for the other ranks. If they wait
    # for this one, its traceback would never be printed.
    stop_world()


@contextmanager
def explained(stop: RunStop, signals: StopSignals) -> Iterator[None]:
    """Tells the other ranks why this one fails; names the rank that makes a collective fail."""
    try:
        yield
    except BaseException as error:
        if signals.ending is not None:
            raise signals.ending from error
        if isinstance(error, KeyboardInterrupt):
            number = signal_number_of(error)
            stop.report_failure(f"stopped by {signal.Signals(number).name}", 128 + number)
        elif isinstance(error, UserError):
            stop.report_failure(str(error), error.exit_status)
        elif not isinstance(error, Stopped):
            lost = stop.explain(error)
            if lost is not None:
                raise lost from error
            stop.report_failure(f"{type(error).__name__}: {error}", None)
        raise


def signal_number_of(interrupt: KeyboardInterrupt) -> int:
    return interrupt.args[0] if interrupt.args else signal.SIGINT
