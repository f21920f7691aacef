"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train TRAIN_OPTIONS`.

It can also launch `benchmark`, a script, or `-m MODULE`. It is torchrun that checks the rendezvous
and the configuration first, and that says once why the ranks ended."""

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# torch reads it when it is imported. Its C++ log has a stack trace for every failed connection.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import (
    determine_local_world_size,
    get_args_parser,
    parse_min_max_nnodes,
)
from torch.distributed.run import run as run_torchrun

from switchtitan import errors
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks
from switchtitan.config import raise_together
from switchtitan.distributed.world import device_type, raise_file_limit
from switchtitan.job.checks import check
from switchtitan.job.config import RunConfig, parse_unchecked
from switchtitan.process import num_cores, threads_per_process

OWN_COMMANDS = ("train", "benchmark")
"""The commands of `switchtitan` that run on several ranks."""
_KILLED_AFTER_GRACE_S = 15
"""Seconds after `[checkpoint] grace_s` that torchrun waits for ranks until it kills them."""


def run(words: Sequence[str]) -> None:
    """Checks rendezvous and configuration, then runs torchrun.

    Raises:
        UserError: for a mistake, before any rank starts.
        SystemExit: with the status that the first rank to end has recorded; else with 1 after a
            crash, 128 + n after signal n.
    """
    parser = get_args_parser()
    parser.prog = "switchtitan launch"
    parser.description = "Starts one process per rank: of `train`, `benchmark`, or your script."
    options = parser.parse_args(words)
    script = options.training_script
    is_given = options.module or options.no_python or script in OWN_COMMANDS
    if not (is_given or os.path.exists(script)):
        expected = f"{', '.join(OWN_COMMANDS)}, a file, -m MODULE"
        raise errors.ConfigError(f"launch {script}: expected {expected}")
    given = f"--nnodes {options.nnodes} --nproc_per_node {options.nproc_per_node}"
    try:
        least_nodes, most_nodes = parse_min_max_nnodes(options.nnodes)
        num_processes = determine_local_world_size(options.nproc_per_node)  # counts "gpu"
    except (ValueError, RuntimeError) as error:
        raise errors.ConfigError(f"{given}: {error}") from error
    if min(least_nodes, num_processes) < 1:
        raise errors.ConfigError(f"{given}: expected integers >= 1")
    check_slurm_tasks(most_nodes)
    is_static = options.rdzv_backend == "static"
    if is_static and not options.rdzv_endpoint:  # torchrun's older options
        options.rdzv_endpoint = f"{options.master_addr}:{options.master_port}"
    if least_nodes == most_nodes and options.rdzv_backend in ("static", "c10d"):
        node_rank = options.node_rank if is_static else None
        check_rendezvous(options.rdzv_endpoint, least_nodes, node_rank)
    grace_s, stop_signal = CheckpointConfig().grace_s, RunConfig.model_fields["stop_signal"].default
    if script == "train":  # a script of the user's may train with other keys
        config = parse_unchecked(options.training_script_args, lambda note: None)
        if least_nodes == most_nodes:
            raise_together(check(config, least_nodes * num_processes, device_type()))
        grace_s, stop_signal = config.checkpoint.grace_s, config.job.stop_signal
    _let_ranks_stop(options, grace_s, stop_signal)
    if script in OWN_COMMANDS:
        options.training_script_args.insert(0, script)
        options.module, options.training_script = True, "switchtitan"
    # The store of the rendezvous has a connection to every rank. Ranks inherit the limit.
    raise_file_limit()
    # torchrun's own default is one thread.
    threads = threads_per_process(num_cores(), num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A failing rank prints its own error; the agent would repeat it on every node.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the ranks
    with tempfile.TemporaryDirectory(prefix="switchtitan-") as folder:
        options.log_dir = options.log_dir or folder
        _run_ranks(options, Path(folder) / "ended")


def _let_ranks_stop(options: argparse.Namespace, grace_s: float, stop_signal: str | None) -> None:
    """Makes torchrun pass the run's signals on to the ranks, and give them the time to save."""
    if options.shutdown_timeout is None and not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        options.shutdown_timeout = grace_s + _KILLED_AFTER_GRACE_S
    passed_on = {*options.signals_to_handle.split(","), stop_signal} - {None}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        passed_on -= {"SIGHUP"}  # torchrun would undo `nohup`
    options.signals_to_handle = ",".join(passed_on)
    if options.max_restarts:
        # torchrun would keep the store, with the addresses of ranks that have ended.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _run_ranks(options: argparse.Namespace, ended: Path) -> None:
    """Runs torchrun; exits as `run`.

    Args:
        ended: where ranks leave their end, unless a batch script reads it elsewhere and prints it.
    """
    is_told_here = errors.ENDED not in os.environ
    os.environ.setdefault(errors.ENDED, str(ended))
    status, reason = 0, ""
    try:
        try:
            run_torchrun(options)
        finally:
            # srun sends SIGTERM when another machine's launcher has ended.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    except ChildFailedError as error:
        status, reason = 1, _first_cause(error.failures)
    except SignalException as error:
        status, reason = 128 + error.sigval, f"stopped by {error.sigval.name}"
    except (RendezvousError, dist.DistError) as error:
        has_started = any(Path(options.log_dir).glob("*/attempt_*"))
        cause = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        status, reason = (
            1 if has_started else errors.USER_ERROR_STATUS,
            (
                f"RDZV_ENDPOINT={options.rdzv_endpoint}: the {options.nnodes} machines did not all "
                f"meet there, or lost each other ({cause}); see the others' output, start the same "
                "command on each, and check that the port is free on HOST and reachable from the rest"
            ),
        )
    if status != 0:
        errors.record_end(reason, status)
    status, line = errors.recorded_end() or (status, "")
    if is_told_here:
        del os.environ[errors.ENDED]
        print(line, end="", file=sys.stderr)
    if status != 0:
        raise SystemExit(status)


def _first_cause(failures: Mapping[int, ProcessFailure]) -> str:
    """Returns which rank of this machine crashed, or was killed, which makes the others crash."""

    def order(rank: int) -> tuple[bool, int]:
        status = failures[rank].exitcode
        return status == -signal.SIGTERM, status  # torchrun sends SIGTERM to the rest

    rank = min(failures, key=order)
    status = failures[rank].exitcode
    how = f"crashed with status {status}"
    if status < 0:
        how = f"was killed by {failures[rank].signal_name()}"
    return f"rank {rank} on {socket.gethostname()} {how}"
