"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train TRAIN_OPTIONS`.

It can also launch `benchmark`, a script, or `-m MODULE`. Wraps torchrun: checks rendezvous and
configuration before ranks start, and says once why they ended."""

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# torch reads it when it is imported. Its C++ log has a stack trace for every failed connection.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from switchtitan.cores import num_cores
from switchtitan.distributed.world import check_slurm_tasks, raise_file_limit
from switchtitan.errors import (
    ENDED,
    USER_ERROR_STATUS,
    ConfigError,
    EnvironmentMismatchError,
    record_end,
    recorded_end,
)
from switchtitan.job.config import parse_unchecked

OWN_COMMANDS = ("train", "benchmark")
"""The commands of `switchtitan` that run on several ranks."""


def run(words: Sequence[str]) -> None:
    """Checks rendezvous and configuration, then runs torchrun. Raises a UserError for a mistake
    before any rank starts; SystemExit with the status that the first process to end has recorded, 1
    after a crash."""
    parser = torchrun.get_args_parser()
    parser.prog = "switchtitan launch"
    parser.description = "Starts one process per rank: of `train`, `benchmark`, or your script."
    options = parser.parse_args(words)
    script = options.training_script
    is_given = options.module or options.no_python or script in OWN_COMMANDS
    if not (is_given or os.path.exists(script)):
        raise ConfigError(f"launch {script}: expected {', '.join(OWN_COMMANDS)}, a file, -m MODULE")
    given = f"--nnodes {options.nnodes} --nproc_per_node {options.nproc_per_node}"
    try:
        least_nodes, most_nodes = torchrun.parse_min_max_nnodes(options.nnodes)
        num_processes = torchrun.determine_local_world_size(options.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{given}: {error}") from error
    if min(least_nodes, num_processes) < 1:
        raise ConfigError(f"{given}: expected integers >= 1")
    check_slurm_tasks(most_nodes)
    if options.rdzv_backend == "static" and not options.rdzv_endpoint:  # torchrun's older options
        options.rdzv_endpoint = f"{options.master_addr}:{options.master_port}"
    if 1 < least_nodes == most_nodes and options.rdzv_backend in ("static", "c10d"):
        check_rendezvous(options.rdzv_endpoint)
    # Other scripts may have other keys. The first rank prints notes.
    keys = options.training_script_args if script == "train" else []
    config = parse_unchecked(keys, lambda note: None)
    if script in OWN_COMMANDS:
        options.training_script_args.insert(0, script)
        options.module, options.training_script = True, "switchtitan"
    # Ranks save when torchrun passes a signal on. It kills them 15 s after they should have ended.
    if options.shutdown_timeout is None and not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        options.shutdown_timeout = config.checkpoint.grace_s + 15
    passed_on = {*options.signals_to_handle.split(","), config.job.stop_signal} - {None}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        passed_on -= {"SIGHUP"}  # torchrun would undo `nohup`
    options.signals_to_handle = ",".join(passed_on)
    if options.max_restarts:
        # torchrun would keep the store, with the addresses of ranks that have ended.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The store of the rendezvous has a connection to every rank. Ranks inherit the limit.
    raise_file_limit()
    # torchrun's own default is one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    # A failing rank prints its own error; the agent would repeat it on every node.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the ranks
    with tempfile.TemporaryDirectory(prefix="switchtitan-") as folder:
        options.log_dir = options.log_dir or folder
        is_told_here = ENDED not in os.environ  # else by the batch script, for all machines
        os.environ.setdefault(ENDED, f"{folder}/ended")
        status, reason = run_ranks(options)
        if status != 0:
            record_end(reason, status)
        status, line = recorded_end() or (status, "")
        if is_told_here:
            del os.environ[ENDED]
            print(line, end="", file=sys.stderr)
    if status != 0:
        raise SystemExit(status)


def check_rendezvous(endpoint: str) -> None:
    """Checks HOST:PORT, where machines would wait for each other in vain. Raises an
    EnvironmentMismatchError if they cannot meet there."""
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    problem = "expected HOST:PORT"
    if host and port.isdecimal() and 0 < int(port) < 1 << 16:
        try:
            socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            return
        except OSError as error:
            problem = f"{host} cannot be resolved on this machine ({error.strerror or error})"
    raise EnvironmentMismatchError(
        f"RDZV_ENDPOINT={endpoint}: {problem}; give one of the machines, by a name that all know "
        "or an IP address, and the same HOST:PORT on every machine"
    )


def run_ranks(options: argparse.Namespace) -> tuple[int, str]:
    """Runs torchrun; returns the status and the reason of the end, as torchrun knows them."""
    earlier = {*Path(options.log_dir).glob("*/attempt_*")}
    try:
        try:
            torchrun.run(options)
        finally:
            # srun sends SIGTERM when another machine's launcher has ended.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    except ChildFailedError as error:
        # One that was killed makes others crash; torchrun ends the rest by SIGTERM.
        rank, failure = min(
            error.failures.items(),
            key=lambda failed: failed[1].exitcode >= 0 or failed[1].exitcode == -signal.SIGTERM,
        )
        how = f"crashed (status {failure.exitcode})"
        if failure.exitcode < 0:
            how = f"was killed by {failure.signal_name()}"
        return 1, f"rank {rank} on {socket.gethostname()} {how}"
    except SignalException as error:
        return 128 + error.sigval, f"stopped by {error.sigval.name}"
    except (RendezvousError, dist.DistError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        has_started = {*Path(options.log_dir).glob("*/attempt_*")} > earlier
        return 1 if has_started else USER_ERROR_STATUS, (
            f"RDZV_ENDPOINT={options.rdzv_endpoint}: the {options.nnodes} machines did not all "
            f"meet there, or lost each other ({reason}); see the others' output, start the same "
            "command on each, and check that the port is free on HOST and reachable from the rest"
        )
    return 0, ""
