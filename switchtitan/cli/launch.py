"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train TRAIN_OPTIONS`.

It can also launch `benchmark`, a script, or `-m MODULE`. Unlike torchrun, it checks the
rendezvous and the configuration before any rank starts. It prints a `UserError` of a rank once,
without tracebacks and torchrun's report, and exits with its status."""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# torch reads it when it is imported. Its C++ log has a stack trace for every failed connection.
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")

import torch.distributed as dist
import torch.distributed.launcher.api as launcher_api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, run

from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks
from switchtitan.config.void_keys import ignore_note
from switchtitan.cores import num_cores, threads_per_process
from switchtitan.distributed.world import raise_file_limit
from switchtitan.errors import (
    EXIT_STATUS_KEY,
    USER_ERROR_STATUS,
    UserError,
    exit_for,
    final_line,
)
from switchtitan.job.config import JobConfig, parse_arguments

_RANKS_FOLDERS = "*/attempt_*"
"""Folders of started ranks in torchrun's log folder."""
_KILLED_AFTER_GRACE_S = 15
"""Seconds after `[checkpoint] grace_s` that torchrun waits for ranks until it kills them."""
_SIGNALS_FROM = 128
"""Exit statuses from here on are those of signals."""
OWN_COMMANDS = ("train", "benchmark")
"""The commands of `switchtitan` that run on several ranks."""


def main(argv: Sequence[str]) -> None:
    """Checks the configuration, then runs torchrun with `argv`.

    Raises:
        SystemExit: with status 2 for a user's mistake, 1 if a rank crashed, 128 + n after signal n.
    """
    options = read_options(argv)
    try:
        config = check_options(options)
        # The store of the rendezvous has a connection to every rank. Ranks inherit the limit.
        raise_file_limit()
    except UserError as error:
        exit_for(error)
    if options.training_script in OWN_COMMANDS:
        options.training_script_args.insert(0, options.training_script)
        options.module, options.training_script = True, "switchtitan"
    if options.nproc_per_node.isdecimal():  # torchrun's own default is one thread
        threads = threads_per_process(num_cores(), int(options.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A failing rank prints its own error; the agent would repeat it on every node.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the ranks
    if config is not None:
        let_ranks_stop(options, config)
    with tempfile.TemporaryDirectory(prefix="switchtitan-") as folder:
        options.log_dir = options.log_dir or folder
        run_ranks(options)


def let_ranks_stop(options: argparse.Namespace, config: JobConfig) -> None:
    """Makes torchrun pass the run's signals on to the ranks, and give them the time to save."""
    if options.shutdown_timeout is None and not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        options.shutdown_timeout = config.checkpoint.grace_s + _KILLED_AFTER_GRACE_S
    names = [name.strip() for name in options.signals_to_handle.split(",")]
    if config.job.stop_signal is not None and config.job.stop_signal not in names:
        names.append(config.job.stop_signal)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "SIGHUP" in names:
        names.remove("SIGHUP")  # torchrun would undo `nohup`
    options.signals_to_handle = ",".join(names)
    if options.max_restarts:
        # torchrun would keep the store, with the addresses of ranks that have ended.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def run_ranks(options: argparse.Namespace) -> None:
    """Runs torchrun; turns its errors into one message and an exit status.

    Raises:
        SystemExit: see `main`.
    """
    folder = Path(options.log_dir)
    earlier = set(folder.glob(_RANKS_FOLDERS))
    launcher_api.LocalElasticAgent = _Agent  # type: ignore[misc]
    try:
        run(options)
    except ChildFailedError as error:
        cause = first_cause(list(error.failures.values()))
        if is_known(cause):
            exit_as(cause.error_file_data)
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    except (RendezvousError, dist.DistError) as error:
        # On a machine that only lost the others, which may have ended first.
        started = last_start(folder, earlier)
        reason, status = describe_lost_rendezvous(options, error, started)
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(status) from error
    except SignalException as error:
        # The ranks say whether they have saved.
        for recorded in recorded_ends(last_start(folder, earlier)):
            if recorded[EXIT_STATUS_KEY] < _SIGNALS_FROM:
                exit_as(recorded)
        raise SystemExit(128 + error.sigval) from error


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses torchrun's options; argparse exits with status 2 on an error."""
    parser = get_args_parser()
    parser.prog = "switchtitan launch"
    parser.description = (
        "Starts one process per rank. The options are those of torchrun; training_script is "
        "`train`, `benchmark`, or your script."
    )
    return parser.parse_args(argv)


def check_options(options: argparse.Namespace) -> JobConfig | None:
    """Checks Slurm's tasks, the rendezvous, and the configuration if the ranks can be counted.

    Returns:
        The configuration; None for `benchmark`.

    Raises:
        UserError: for the first mistake.
    """
    most_nodes = options.nnodes.rpartition(":")[2]  # "1:4" is elastic
    if most_nodes.isdecimal():
        check_slurm_tasks(int(most_nodes))
    is_static = options.rdzv_backend == "static"
    if options.nnodes.isdecimal() and (is_static or options.rdzv_backend == "c10d"):
        endpoint = options.rdzv_endpoint
        if is_static and not endpoint:
            endpoint = f"{options.master_addr}:{options.master_port}"
        node_rank = options.node_rank if is_static else None
        check_rendezvous(endpoint, int(options.nnodes), node_rank, describe_endpoint(options))
    if options.training_script == "benchmark":
        return None
    num_ranks = num_ranks_of(options.nnodes, options.nproc_per_node)
    # Checks need the number of ranks.
    checks = () if num_ranks is None else None
    # The first rank prints the notes.
    return parse_arguments(options.training_script_args, num_ranks, checks=checks, say=ignore_note)


def describe_lost_rendezvous(
    options: argparse.Namespace, error: Exception, ranks_folders: Sequence[Path]
) -> tuple[str, int]:
    """Returns a message and an exit status for a rendezvous that failed.

    Args:
        error: torchrun's.
        ranks_folders: where the ranks of this machine, if they have started, record their errors.
    """
    for recorded in recorded_ends(ranks_folders):
        return recorded["message"], recorded[EXIT_STATUS_KEY]
    endpoint = describe_endpoint(options)
    reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    if ranks_folders:
        return f"{endpoint}: lost the connection ({reason}); see the other machines' output", 1
    return (
        f"{endpoint}: the {options.nnodes} machines did not all meet there ({reason}); start the "
        "same command on each of them, and check that the port is free on HOST and reachable from "
        "the others"
    ), USER_ERROR_STATUS


def describe_endpoint(options: argparse.Namespace) -> str:
    """Returns what sets the address of the rendezvous: an endpoint, or torchrun's older options."""
    if options.rdzv_endpoint:
        return f"RDZV_ENDPOINT={options.rdzv_endpoint}"
    if options.rdzv_backend == "static":
        return f"--master_addr {options.master_addr} --master_port {options.master_port}"
    return "RDZV_ENDPOINT is not set"


def first_cause(failures: Sequence[ProcessFailure]) -> ProcessFailure:
    """Returns the earliest failure that is not a consequence of another.

    torchrun sends SIGTERM to the other ranks after a failure. They count only if they found a
    user's mistake.
    """
    causes = [failure for failure in failures if not is_consequence(failure)]
    # Timestamps have a resolution of one second; within one, prefer a mistake to a crash.
    return min(causes or failures, key=lambda failure: (failure.timestamp, not is_known(failure)))


def is_consequence(failure: ProcessFailure) -> bool:
    """Whether a rank ended because another one did."""
    if is_known(failure):
        return failure.error_file_data[EXIT_STATUS_KEY] >= _SIGNALS_FROM
    return failure.exitcode == -signal.SIGTERM


def is_known(failure: ProcessFailure) -> bool:
    """Whether a rank has recorded an exit status and a message, unlike a crash."""
    return EXIT_STATUS_KEY in failure.error_file_data


def exit_as(recorded: dict[str, Any]) -> NoReturn:
    """Prints a rank's message, and exits with its status."""
    status = recorded[EXIT_STATUS_KEY]
    print(final_line(recorded["message"], status), file=sys.stderr)
    raise SystemExit(status) from None


def last_start(folder: Path, earlier: Collection[Path]) -> list[Path]:
    """Returns the folders of the last attempt's ranks in the log folder, without `earlier` ones."""
    ranks_folders = set(folder.glob(_RANKS_FOLDERS)) - set(earlier)
    attempts = {path: int(path.name.rpartition("_")[2]) for path in ranks_folders}
    last = max(attempts.values(), default=0)
    return sorted(path for path, attempt in attempts.items() if attempt == last)


def recorded_ends(ranks_folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns what ranks have recorded about their ends."""
    ends = []
    for file in sorted(file for folder in ranks_folders for file in folder.rglob("error.json")):
        with suppress(OSError, ValueError):
            recorded = json.loads(file.read_text(encoding="utf-8"))
            if EXIT_STATUS_KEY in recorded:
                ends.append(recorded)
    return ends


class _Agent(LocalElasticAgent):
    """torchrun's agent. `--max-restarts` restarts crashes only: others would end the same way."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.failures and is_known(first_cause(list(result.failures.values()))):
            self._remaining_restarts = 0
        return result


def num_ranks_of(num_nodes: str, num_processes: str) -> int | None:
    """Returns the number of ranks, or None if only torchrun knows it ("1:4" nodes, "gpu"
    processes)."""
    least, _, most = num_nodes.partition(":")
    if most in ("", least) and least.isdecimal() and num_processes.isdecimal():
        return int(least) * int(num_processes)
    return None
