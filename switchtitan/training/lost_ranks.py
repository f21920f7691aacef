"""Names the rank for which the others wait."""

import logging
import threading
import time

import torch.distributed as dist

from switchtitan.distributed.board import Board, Failure
from switchtitan.errors import LostRankError, UserError

logger = logging.getLogger(__name__)

ANSWER_S = 5.0
"""A rank that is alive answers within this time, whatever its main thread does."""
POLL_WHILE_ASKING_S = 0.05
SHARED_WITHIN_S = 4.0
"""A rank that is alive looks for failures of others more often."""
_NUM_SHOWN = 8


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not take part."""
    # gloo raises RuntimeError. Other errors may quote it.
    return isinstance(error, dist.DistError) or "gloo/transport/" in str(error)


def explain_connection_error(board: Board, error: BaseException) -> UserError:
    """Returns an error that names the rank that is the cause of a failed collective.

    Asks all ranks to answer, which takes seconds if one of them cannot.
    """
    found: list[UserError] = []
    # In a thread: the process that holds the store may be the one that hangs.
    thread = threading.Thread(target=lambda: found.append(_find(board, error)), daemon=True)
    thread.start()
    thread.join(2 * ANSWER_S)
    return (
        found[0]
        if found
        else LostRankError(
            f"{_reason(error)}; the store of the rendezvous does not answer: its process has ended "
            "or hangs"
        )
    )


def error_of(failure: Failure) -> LostRankError:
    """Returns what other ranks raise for a failed rank; has the status of a known error."""
    error = LostRankError(f"{failure.name} failed: {failure.reason}")
    if failure.exit_status is not None:
        error.exit_status = failure.exit_status
    return error


def describe_lost(board: Board, ranks: list[int]) -> str:
    """Says that ranks do not answer."""
    return f"{board.names(ranks)} did not answer within {ANSWER_S:.0f} s: ended, or hangs"


def is_first_of_others(board: Board, lost: list[int]) -> bool:
    """Whether this is the first rank that is not lost."""
    return board.rank == min(set(range(board.num_ranks)) - set(lost))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _find(board: Board, error: BaseException) -> UserError:
    try:
        call = board.call()
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline and not board.have_all_posted(call):
            if (failure := board.failure()) is not None:
                board.share_failure(SHARED_WITHIN_S)
                return _log_on_one_rank(board, [failure.rank], error_of(failure))
            time.sleep(POLL_WHILE_ASKING_S)
        lost = board.missing(call)
        if lost:
            named = LostRankError(f"{describe_lost(board, lost)}; {_reason(error)}")
            return _log_on_one_rank(board, lost, named)
        states = board.posts(call)[:_NUM_SHOWN]
        shown = "; ".join(f"rank {rank} {state}" for rank, state in enumerate(states))
        return LostRankError(f"{_reason(error)}, but all ranks answer: {shown}")
    except RuntimeError as store_error:
        if (failure := board.known_failure) is not None:
            return error_of(failure)
        return LostRankError(
            f"{_reason(error)}; lost the store of the rendezvous ({first_line(store_error)}): its "
            "process has ended"
        )


def _log_on_one_rank(board: Board, lost: list[int], error: LostRankError) -> LostRankError:
    # A launcher prints it only when all ranks have ended.
    if is_first_of_others(board, lost):
        logger.error("%s", error)
    return error


def _reason(error: BaseException) -> str:
    return f"a collective failed ({first_line(error)})"
