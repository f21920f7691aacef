"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train TRAIN_OPTIONS`.

It can also launch `benchmark`, a script, or `-m MODULE`. Unlike torchrun, it checks the
configuration before any rank starts. It prints a `UserError` of a rank once, without tracebacks and
torchrun's report, and exits with its status."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

from switchtitan.errors import EXIT_STATUS_KEY, UserError, exit_for
from switchtitan.job.config import parse_arguments

OWN_COMMANDS = ("train", "benchmark")
"""The commands of `switchtitan` that run on several ranks."""


def main(argv: Sequence[str]) -> None:
    """Checks the configuration, then runs torchrun with `argv`.

    Raises:
        SystemExit: with status 2 for a user's mistake, 1 if a rank crashed, 128 + n after signal n.
    """
    options = read_options(argv)
    num_ranks = num_ranks_of(options.nnodes, options.nproc_per_node)
    if num_ranks is not None and options.training_script != "benchmark":
        try:
            parse_arguments(options.training_script_args, num_ranks)
        except UserError as error:
            exit_for(error)
    if options.training_script in OWN_COMMANDS:
        options.training_script_args.insert(0, options.training_script)
        options.module, options.training_script = True, "switchtitan"
    # A failing rank prints its own error; the agent would repeat it on every node.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(options)
    except ChildFailedError as error:
        cause = first_cause(list(error.failures.values()))
        if is_mistake(cause):
            print(f"error: {cause.message}", file=sys.stderr)
            raise SystemExit(cause.error_file_data[EXIT_STATUS_KEY]) from None
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    except SignalException as error:
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


def first_cause(failures: Sequence[ProcessFailure]) -> ProcessFailure:
    """Returns the earliest failure that is not a consequence of another.

    torchrun sends SIGTERM to the other ranks after a failure; those count only if they found a
    user's mistake."""
    causes = [
        failure
        for failure in failures
        if failure.exitcode != -signal.SIGTERM or is_mistake(failure)
    ]
    # Timestamps have a resolution of one second; within one, prefer a mistake to a crash.
    return min(causes or failures, key=lambda failure: (failure.timestamp, not is_mistake(failure)))


def is_mistake(failure: ProcessFailure) -> bool:
    """Whether a rank ended with a `UserError`, which records an exit status, unlike a crash."""
    return EXIT_STATUS_KEY in failure.error_file_data


def num_ranks_of(num_nodes: str, num_processes: str) -> int | None:
    """Returns the number of ranks, or None if only torchrun knows it ("1:4" nodes, "gpu"
    processes)."""
    if num_nodes.isdecimal() and num_processes.isdecimal():
        return int(num_nodes) * int(num_processes)
    return None
