"""Starts several ranks: `python -m switchtitan.launch TORCHRUN_OPTIONS -m switchtitan.train ...`.

What it adds to torchrun is how a mistake ends: the configuration is checked before any rank starts, and a
`UserError` of a rank is printed once, with status 2, without tracebacks and without torchrun's report.
"""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from switchtitan.config.errors import UserError, exit_for
from switchtitan.job_config import parse_arguments


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
        _, failure = error.get_first_failure()
        # A rank that meets a user's mistake leaves its message and exits; one that crashes leaves a traceback and 1.
        if failure.exitcode > 1 and failure.error_file_data.get("message") == failure.message:
            print(f"error: {failure.message}", file=sys.stderr)
            raise SystemExit(failure.exitcode) from None
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error


def num_ranks_of(num_nodes: str, num_processes: str) -> int | None:
    """Ranks of the run, or None where only torchrun can tell ("1:4" nodes, "gpu" processes)."""
    if num_nodes.isdecimal() and num_processes.isdecimal():
        return int(num_nodes) * int(num_processes)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
