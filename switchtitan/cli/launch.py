"""Starts several ranks: `python -m switchtitan.cli.launch TORCHRUN_OPTIONS -m switchtitan.cli.train ...`.

What it adds to torchrun is how a mistake ends: the configuration is checked before any rank starts, and a
`UserError` of a rank is printed once, with status 2, without tracebacks and without torchrun's report.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from switchtitan.errors import EXIT_STATUS_KEY, UserError, exit_for
from switchtitan.job.config import parse_arguments


def main(argv: Sequence[str]) -> None:
    """Checks the configuration, then runs torchrun with `argv`.

    Raises:
        SystemExit: with status 2 for a user's mistake, 1 where a rank crashed, 128 + n after signal n.
    """
    options = parse_args(list(argv))
    num_ranks = num_ranks_of(options.nnodes, options.nproc_per_node)
    if num_ranks is not None:
        try:
            parse_arguments(options.training_script_args, num_ranks)
        except UserError as error:
            exit_for(error)
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


def first_cause(failures: Sequence[ProcessFailure]) -> ProcessFailure:
    """The first failure in time. One of a rank that torchrun ended because another had failed is no cause, unless that rank had
    met a user's mistake by itself."""
    causes = [failure for failure in failures if failure.exitcode != -signal.SIGTERM or is_mistake(failure)]
    # Seconds are whole: of several in one, a mistake is the reason rather than a crash.
    return min(causes or failures, key=lambda failure: (failure.timestamp, not is_mistake(failure)))


def is_mistake(failure: ProcessFailure) -> bool:
    """Whether a rank met a user's mistake: it leaves its message and the status. One that crashes leaves a traceback alone."""
    return EXIT_STATUS_KEY in failure.error_file_data


def num_ranks_of(num_nodes: str, num_processes: str) -> int | None:
    """Ranks of the run, or None where only torchrun can tell ("1:4" nodes, "gpu" processes)."""
    if num_nodes.isdecimal() and num_processes.isdecimal():
        return int(num_nodes) * int(num_processes)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
