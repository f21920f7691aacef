"""Starts several ranks: `switchtitan launch TORCHRUN_OPTIONS train [--config FILE] [--section.key value ...]`.

In the place of `train`, `benchmark` and whatever torchrun runs (a script, `-m MODULE`) can be launched too. What this adds
to torchrun is how a mistake ends: the configuration is checked before any rank starts, and a `UserError` of a rank is
printed once, with its status, without tracebacks and without torchrun's report.
"""

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
"""Commands of `switchtitan` that run on several ranks."""


def main(argv: Sequence[str]) -> None:
    """Checks the configuration, then runs torchrun with `argv`.

    Raises:
        SystemExit: with status 2 for a user's mistake, 1 where a rank crashed, 128 + n after signal n.
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
    # A rank that fails says so itself on standard error; the agent would repeat it on every node.
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
    """torchrun's options; argparse ends the program with status 2 where they are wrong."""
    parser = get_args_parser()
    parser.prog = "switchtitan launch"
    parser.description = "Starts one process per rank. The options are those of torchrun; training_script is `train`,"
    parser.description += " `benchmark`, or a script of yours."
    return parser.parse_args(argv)


def first_cause(failures: Sequence[ProcessFailure]) -> ProcessFailure:
    """The first failure in time. One of a rank that torchrun ended because another had failed is no cause, unless that rank had
    met a user's mistake by itself."""
    causes = [
        failure
        for failure in failures
        if failure.exitcode != -signal.SIGTERM or is_mistake(failure)
    ]
    # Timestamps are in full seconds: of several in one second, a mistake is the cause rather than a crash.
    return min(causes or failures, key=lambda failure: (failure.timestamp, not is_mistake(failure)))


def is_mistake(failure: ProcessFailure) -> bool:
    """Whether a rank met a user's mistake: it leaves its message and the status. One that crashes leaves a traceback alone."""
    return EXIT_STATUS_KEY in failure.error_file_data


def num_ranks_of(num_nodes: str, num_processes: str) -> int | None:
    """Ranks of the run, or None where only torchrun can tell ("1:4" nodes, "gpu" processes)."""
    if num_nodes.isdecimal() and num_processes.isdecimal():
        return int(num_nodes) * int(num_processes)
    return None
