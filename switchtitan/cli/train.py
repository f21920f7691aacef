"""Trains: `switchtitan train [--config FILE] [--section.key value ...]`, one rank per process."""

import signal
from collections.abc import Sequence

import torch

from switchtitan.cores import OtherLoad, num_cores
from switchtitan.distributed.world import (
    check_slurm_tasks,
    is_launched,
    start_world,
    stop_world,
    stop_world_if_single,
)
from switchtitan.errors import UserError, exit_for, recorded_end
from switchtitan.job.config import parse_arguments
from switchtitan.observability.log import configure_logging
from switchtitan.observability.profiler import snapshot_if_memory_runs_out
from switchtitan.training.build import build_trainer
from switchtitan.training.output import lock_output_dir
from switchtitan.training.stop import Stop, Stopped


def run(words: Sequence[str]) -> None:
    """Trains the configured run. Raises SystemExit with status 2 for a user's mistake, 128 + n
    after signal n; docs/USAGE.md has all statuses."""
    if (end := recorded_end()) is not None:
        raise SystemExit(end[0])  # torchrun restarts ranks after a mistake as after a crash
    # Ends inside: a second signal, from a launcher, must not end this process by itself.
    with Stop(is_launched()) as stop:
        try:
            _train(words, stop)
        except Stopped as stopped:
            stop_world()
            exit_for(stopped)
        except (UserError, KeyboardInterrupt) as error:
            stop_world_if_single()
            if is_launched() and isinstance(error, KeyboardInterrupt):
                # torchrun sends SIGTERM after a crash of another rank, too.
                raise SystemExit(128 + (*error.args, signal.SIGINT)[0]) from None
            exit_for(error)


def _train(words: Sequence[str], stop: Stop) -> None:
    load = OtherLoad()
    if not is_launched():
        check_slurm_tasks(num_nodes=1)
    config = parse_arguments(words)
    if config.job.stop_signal is not None:
        stop.add(signal.Signals[config.job.stop_signal])
    world = start_world(config.parallelism)
    configure_logging(is_main=world.is_main, rank=world.rank)
    output_dir = config.job.output_dir
    snapshots = snapshot_if_memory_runs_out(config.profiler, output_dir, world.rank)
    with lock_output_dir(output_dir, world), snapshots:
        trainer = build_trainer(config, world, stop=stop)
        if world.size == 1 and world.device.type == "cpu":
            load.warn(torch.get_num_threads(), num_cores())
        trainer.train()
    # Not after other errors: leaving the process group waits for the other ranks. If they wait
    # for this one, its traceback would never be printed. A save in the background needs the group.
    stop_world()
