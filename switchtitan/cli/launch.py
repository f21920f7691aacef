"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train TRAIN_OPTIONS`.

It can also launch `benchmark`, a script, or `-m MODULE`. It is torchrun that checks the rendezvous
and the configuration first, prints a `UserError` of ranks once, and exits with its status."""

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
from torch.distributed.run import (
    determine_local_world_size,
    get_args_parser,
    parse_min_max_nnodes,
)
from torch.distributed.run import run as run_torchrun

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks
from switchtitan.distributed.world import raise_file_limit
from switchtitan.errors import EXIT_STATUS_KEY, USER_ERROR_STATUS, ConfigError, final_line
from switchtitan.job.config import RunConfig, parse_arguments, parse_unchecked
from switchtitan.process import num_cores, threads_per_process

OWN_COMMANDS = ("train", "benchmark")
"""The commands of `switchtitan` that run on several ranks."""
_KILLED_AFTER_GRACE_S = 15
"""Seconds after `[checkpoint] grace_s` that torchrun waits for ranks until it kills them."""
_FIRST_SIGNAL = 128


def run(words: Sequence[str]) -> None:
    """Checks rendezvous and configuration, then runs torchrun.

    Raises:
        UserError: for a mistake, before any rank starts.
        SystemExit: with the status of the ranks' mistake, 1 after a crash, 128 + n after signal n.
    """
    parser = get_args_parser()
    parser.prog = "switchtitan launch"
    parser.description = (
        "Starts one process per rank. The options are those of torchrun; training_script is "
        "`train`, `benchmark`, or your script."
    )
    options = parser.parse_args(words)
    script = options.training_script
    is_given = options.module or options.no_python or script in OWN_COMMANDS
    if not (is_given or os.path.exists(script)):
        raise ConfigError(f"launch {script}: expected {', '.join(OWN_COMMANDS)}, a file, -m MODULE")
    least_nodes, most_nodes, num_processes = _counts(options)
    _check_machines(options, least_nodes, most_nodes)
    if options.training_script == "train":
        keys = options.training_script_args

        def ignore(note: str) -> None:
            """The first rank prints it."""

        if least_nodes == most_nodes:
            config = parse_arguments(keys, least_nodes * num_processes, ignore)
        else:
            config = parse_unchecked(keys, ignore)
        _let_ranks_stop(options, config.checkpoint.grace_s, config.job.stop_signal)
    else:  # a script of the user's may train with other keys
        fields = RunConfig.model_fields
        _let_ranks_stop(options, CheckpointConfig().grace_s, fields["stop_signal"].default)
    # The store of the rendezvous has a connection to every rank. Ranks inherit the limit.
    raise_file_limit()
    if options.training_script in OWN_COMMANDS:
        options.training_script_args.insert(0, options.training_script)
        options.module, options.training_script = True, "switchtitan"
    # torchrun's own default is one thread.
    threads = threads_per_process(num_cores(), num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # A failing rank prints its own error; the agent would repeat it on every node.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the ranks
    with tempfile.TemporaryDirectory(prefix="switchtitan-") as folder:
        options.log_dir = options.log_dir or folder
        run_ranks(options)


def _counts(options: argparse.Namespace) -> tuple[int, int, int]:
    """Returns the least and the most machines, which differ in "1:4", and processes on each."""
    given = f"--nnodes {options.nnodes} --nproc_per_node {options.nproc_per_node}"
    try:
        counts = (
            *parse_min_max_nnodes(options.nnodes),
            determine_local_world_size(options.nproc_per_node),  # counts "gpu"
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{given}: {error}") from error
    if min(counts) < 1:
        raise ConfigError(f"{given}: expected integers >= 1")
    return counts


def _check_machines(options: argparse.Namespace, least_nodes: int, most_nodes: int) -> None:
    check_slurm_tasks(most_nodes)
    is_static = options.rdzv_backend == "static"
    if least_nodes == most_nodes and (is_static or options.rdzv_backend == "c10d"):
        node_rank = options.node_rank if is_static else None
        check_rendezvous(_endpoint(options), least_nodes, node_rank)


def _endpoint(options: argparse.Namespace) -> str:
    if options.rdzv_backend == "static" and not options.rdzv_endpoint:  # torchrun's older options
        return f"{options.master_addr}:{options.master_port}"
    return str(options.rdzv_endpoint)


def _let_ranks_stop(options: argparse.Namespace, grace_s: float, stop_signal: str | None) -> None:
    """Makes torchrun pass the run's signals on to the ranks, and give them the time to save."""
    if options.shutdown_timeout is None and not os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        options.shutdown_timeout = grace_s + _KILLED_AFTER_GRACE_S
    names = [name.strip() for name in options.signals_to_handle.split(",")]
    if stop_signal is not None and stop_signal not in names:
        names.append(stop_signal)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "SIGHUP" in names:
        names.remove("SIGHUP")  # torchrun would undo `nohup`
    options.signals_to_handle = ",".join(names)
    if options.max_restarts:
        # torchrun would keep the store, with the addresses of ranks that have ended.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def run_ranks(options: argparse.Namespace) -> None:
    """Runs torchrun; turns its errors into one message and an exit status; see `run`."""
    folder = Path(options.log_dir)
    earlier = set(folder.glob("*"))
    launcher_api.LocalElasticAgent = _Agent  # type: ignore[misc]
    try:
        run_torchrun(options)
    except ChildFailedError as error:
        recorded = first_cause(list(error.failures.values())).error_file_data
        if EXIT_STATUS_KEY in recorded:
            _exit_as(recorded)
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    except (RendezvousError, dist.DistError) as error:
        # The ranks of this machine say why, unless it only lost the others.
        attempts = attempts_in(folder, earlier)
        for end in recorded_ends(attempts):
            _exit_as(end)
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        print(
            f"error: RDZV_ENDPOINT={_endpoint(options)}: the {options.nnodes} machines did not all "
            f"meet there, or lost each other ({reason}); see the others' output, start the same "
            "command on each, and check that the port is free on HOST and reachable from the rest",
            file=sys.stderr,
        )
        raise SystemExit(1 if attempts else USER_ERROR_STATUS) from error
    except SignalException as error:
        # The ranks say whether they have saved.
        for end in recorded_ends(attempts_in(folder, earlier)):
            if end[EXIT_STATUS_KEY] < _FIRST_SIGNAL:
                _exit_as(end)
        raise SystemExit(_FIRST_SIGNAL + error.sigval) from error


def first_cause(failures: Sequence[ProcessFailure]) -> ProcessFailure:
    """Returns the earliest failure that is not a consequence of another.

    torchrun sends SIGTERM to the other ranks after a failure. They count only if they found a
    user's mistake.
    """

    def order(failure: ProcessFailure) -> tuple[bool, int, bool]:
        status = failure.error_file_data.get(EXIT_STATUS_KEY)
        if status is None:
            return failure.exitcode == -signal.SIGTERM, failure.timestamp, True
        # Timestamps have a resolution of one second; within one, prefer a mistake to a crash.
        return status >= _FIRST_SIGNAL, failure.timestamp, False

    return min(failures, key=order)


def attempts_in(folder: Path, earlier: Collection[Path]) -> list[Path]:
    """Returns the folders of this launch's starts, in order: not in `earlier` folders."""
    found = [path for path in folder.glob("*/attempt_*") if path.parent not in earlier]
    return sorted(found, key=lambda path: int(path.name.removeprefix("attempt_")))


def recorded_ends(attempts: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns what the ranks of the last attempt have recorded about their ends."""
    ends = []
    for file in sorted(file for attempt in attempts[-1:] for file in attempt.rglob("error.json")):
        with suppress(OSError, ValueError):
            recorded = json.loads(file.read_text(encoding="utf-8"))
            if EXIT_STATUS_KEY in recorded:
                ends.append(recorded)
    return ends


def _exit_as(recorded: dict[str, Any]) -> NoReturn:
    """Prints a rank's message, and exits with its status."""
    status = recorded[EXIT_STATUS_KEY]
    print(final_line(recorded["message"], status), file=sys.stderr)
    raise SystemExit(status) from None


class _Agent(LocalElasticAgent):
    """torchrun's agent. `--max-restarts` restarts crashes only: others would end the same way."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        failures = list(result.failures.values())
        if failures and EXIT_STATUS_KEY in first_cause(failures).error_file_data:
            self._remaining_restarts = 0
        return result
