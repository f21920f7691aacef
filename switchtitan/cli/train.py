"""Trains: `switchtitan train [--config FILE] [--section.key value ...]`, one rank per process."""

import logging
from collections.abc import Sequence

import torch

from switchtitan.builders.trainer import build_trainer
from switchtitan.cli.rendezvous import check_slurm_tasks
from switchtitan.cores import OtherLoad, num_cores
from switchtitan.distributed.launcher import is_launched, num_ranks_from_launcher
from switchtitan.distributed.world import start_world, stop_world, stop_world_if_single
from switchtitan.errors import UserError, exit_for, exit_for_interrupt, interrupt_on_sigterm
from switchtitan.job.config import parse_arguments
from switchtitan.observability import configure_logging
from switchtitan.training.run_lock import lock_output_dir

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Trains the configured run.

    Raises:
        SystemExit: with status 2 for a user's mistake, 128 + n after signal n.
    """
    load = OtherLoad()
    try:
        if num_ranks_from_launcher() == 1:
            # Treat SIGTERM like Ctrl-C, so that an in-flight save completes. Not on several ranks:
            # torchrun also sends SIGTERM to the survivors of a crash, whose save would hang.
            interrupt_on_sigterm()
        if not is_launched():
            check_slurm_tasks(num_nodes=1)
        config = parse_arguments(argv)
        world = start_world(config.parallelism)
        configure_logging(is_main=world.is_main, rank=world.rank)
        with lock_output_dir(config.job.output_dir, world):
            trainer = build_trainer(config, world)
            if world.size == 1 and world.device.type == "cpu":
                warning = load.warning(torch.get_num_threads(), num_cores())
                if warning is not None:
                    logger.warning(warning)
            trainer.train()
        # Not after other errors: leaving the process group waits for the other ranks. If they wait
        # for this one, its traceback would never be printed.
        stop_world()
    except UserError as error:
        stop_world_if_single()
        exit_for(error)
    except KeyboardInterrupt as stop:
        stop_world_if_single()
        exit_for_interrupt(stop, "interrupted")
