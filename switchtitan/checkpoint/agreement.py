"""Raise an error of one rank on all ranks, so that none waits forever."""

import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from switchtitan.errors import CheckpointError

Result = TypeVar("Result")


def run_together(function: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """Calls `function` on every rank of `group` and returns the results of all ranks in rank order.

    Args:
        group: None means the default group, or this process alone if torch.distributed is not
            initialized.

    Raises:
        CheckpointError: on every rank, if a file operation or a check failed on any; names ranks
            and reasons.
        RuntimeError: likewise for any other failure; the rank that failed raises the original
            error.
    """
    error: BaseException | None = None
    result: Result | None = None
    try:
        result = function()
    except (Exception, CheckpointException) as caught:  # DCP's derives from BaseException
        error = caught
    outcomes = _gather(
        (result, error and _reason(error), error is None or is_expected(error)), group
    )
    failures = {rank: reason for rank, (_, reason, _) in enumerate(outcomes) if reason is not None}
    if not failures:
        return [outcome for outcome, _, _ in outcomes]
    if error is not None and not is_expected(error):
        raise error
    message = describe_failures(failures, len(outcomes))
    if all(expected for _, _, expected in outcomes):
        raise CheckpointError(message) from error
    raise RuntimeError(message) from error


def is_expected(error: BaseException) -> bool:
    """Whether a user can fix `error`: a full disk, a corrupted file, another model's checkpoint."""
    if isinstance(error, CheckpointException):
        return all(is_expected(cause) for cause, _ in error.failures.values())
    return isinstance(error, OSError | CheckpointError)


def raise_unwrapped(error: CheckpointException) -> NoReturn:
    """Raises a `CheckpointError` if a user can fix `error`, otherwise `error` itself.

    DCP's own exception derives from BaseException and hides the cause.
    """
    if is_expected(error):
        reasons = dict.fromkeys(_reason(cause) for cause, _ in error.failures.values())
        raise CheckpointError("; ".join(reasons)) from error
    raise error


def describe_failures(failures: dict[int, str], num_ranks: int) -> str:
    """Returns one message for all failures; ranks with the same reason share an entry."""
    if num_ranks == 1:
        return failures[0]
    ranks_by_reason: dict[str, list[int]] = {}
    for rank, reason in failures.items():
        ranks_by_reason.setdefault(reason, []).append(rank)
    if len(failures) == num_ranks and len(ranks_by_reason) == 1:
        return next(iter(ranks_by_reason))
    return "; ".join(
        f"on rank {', '.join(map(str, ranks))}: {reason}"
        for reason, ranks in ranks_by_reason.items()
    )


def ignore_warning_about_single_process() -> None:
    """Silences DCP's warning about a missing process group."""
    warnings.filterwarnings(
        "ignore", message="torch.distributed is (disabled|unavailable).*single process"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return describe_failures(
            {rank: _reason(cause) for rank, (cause, _) in error.failures.items()}, num_ranks=2
        )
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _gather(value: tuple, group: dist.ProcessGroup | None) -> list[tuple]:
    if not dist.is_initialized():
        return [value]
    values: list[tuple] = [()] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
