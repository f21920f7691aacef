"""Stops a run: all ranks after the same step, and before a deadline; names ranks that are lost.

A rank that receives a signal tells the others by the store of the rendezvous, to which a thread of
every rank looks. Each rank then publishes how many boundaries between steps it has passed, and may
pass one more. When all have published, the run stops at the last of those boundaries. So a step
costs no message: the ranks agree only when there is something to agree on. Until then, each rank
sends the store two requests of about 0.1 ms per second.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

from pydantic import JsonValue

from switchtitan.distributed.board import Board, Failure
from switchtitan.errors import LostRankError, SaveAbandonedError, UserError
from switchtitan.training.lost_ranks import (
    ANSWER_S,
    POLL_WHILE_ASKING_S,
    SHARED_WITHIN_S,
    describe_lost,
    error_of,
    explain_connection_error,
    first_line,
    is_connection_error,
    is_first_of_others,
)
from switchtitan.training.signals import ExitNow, StopSignals

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_FAILED_TOO_S = 5.0
"""Time in which a rank may find by itself that another one has failed."""
_STALLED = 0.9
"""Share of the timeout of collectives after which a rank without progress calls the others."""
_PASSED = "passed"
_START, _STEPS, _END = "is before the first step", "trains", "is after the last step"


class Stopped(Exception):  # noqa: N818
    """A signal stopped the run; its last step is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Stop(Protocol):
    """Tells a run when to stop. All ranks call it at the same places."""

    def steps(self, describe_checkpoint: Callable[[], str]) -> AbstractContextManager[None]:
        """Returns a context for the steps of a run. Outside, nothing can be lost: a signal ends the
        process.

        Args:
            describe_checkpoint: what the run resumes from if it stops now.
        """
        ...

    def note_step(self) -> None:
        """Counts a step. Before the first one, a signal ends the process as well."""
        ...

    def is_due(self) -> int | None:
        """Returns the signal for which the run must save and stop here; None to continue."""
        ...


class NeverStop:
    """A `Stop` for runs that receive no signals."""

    def steps(self, describe_checkpoint: Callable[[], str]) -> AbstractContextManager[None]:
        return nullcontext()

    def note_step(self) -> None:
        return None

    def is_due(self) -> int | None:
        return None


class RunStop:
    """A `Stop` by signals, on any number of ranks; a context.

    Args:
        board: of all ranks; None for a single one.
        grace_s: time between the signal and the end of the last save.
        timeout_s: of collectives.
    """

    def __init__(
        self, signals: StopSignals, board: Board | None, *, grace_s: float, timeout_s: float
    ) -> None:
        self._signals = signals
        self._board = board
        self._grace_s = grace_s
        self._stalled_after_s = _STALLED * timeout_s
        self._describe_checkpoint: Callable[[], str] = lambda: ""
        self._changed = threading.Condition()
        self._phase = _START
        self._num_passed = 0
        self._num_steps = 0
        self._progress_at = time.monotonic()
        self._has_called = False
        self._signal: int | None = None
        self._hold = math.inf
        """The boundary at which this rank waits until `_stop_at` is known."""
        self._stop_at: float | None = None
        # Of the board's thread.
        self._has_asked = False
        self._answers_by: float | None = None
        self._failed_by: float | None = None
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._watch, name="board", daemon=True)

    def __enter__(self) -> "RunStop":
        if self._board is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed = True
        self._wake.set()
        self._signals.clear_deadline()
        if self._board is not None:
            self._thread.join(ANSWER_S)

    @contextmanager
    def steps(self, describe_checkpoint: Callable[[], str]) -> Iterator[None]:
        with self._changed:
            self._phase = _STEPS
            self._progress_at = time.monotonic()
            self._describe_checkpoint = describe_checkpoint
        self._signals.defer(self._on_signal)
        try:
            yield
        except Stopped:
            self._leave()
            self._signals.finish()
            raise
        self._leave()
        # Nothing is lost after the last step.
        self._signals.release()
        if self._signal is not None:
            raise KeyboardInterrupt(self._signal)

    def note_step(self) -> None:
        self._num_steps += 1

    def is_due(self) -> int | None:
        with self._changed:
            if self._phase != _STEPS:
                return None
            self._num_passed += 1
            self._progress_at, self._has_called = time.monotonic(), False
            if self._num_passed < self._hold:
                return None
            while self._stop_at is None:
                self._changed.wait()
            if self._num_passed < self._stop_at:
                return None
        # The loader's workers may end too. torch's handler would raise for them during the save.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self._signal

    def explain(self, error: BaseException) -> UserError | None:
        """Returns an error that names the rank that caused `error`; None if it is not another one.

        May take seconds, in which the other ranks answer.
        """
        if self._board is None or not is_connection_error(error):
            return None
        return explain_connection_error(self._board, error)

    def report_failure(self, reason: str, exit_status: int | None) -> None:
        """Tells the other ranks why this one ends, if they can be reached."""
        if self._board is None:
            return
        board = self._board

        def report() -> None:
            with suppress(RuntimeError):
                board.report_failure(reason, exit_status)
                board.share_failure(SHARED_WITHIN_S)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(ANSWER_S)

    def _leave(self) -> None:
        with self._changed:
            self._phase = _END
        self._signals.clear_deadline()

    def _on_signal(self, number: int) -> None:
        """Runs in the thread of the signals."""
        if self._board is None:
            with self._changed:
                self._begin(number)
            self._agree(self._num_passed + 1, has_work=self._num_steps > 0)
        else:
            self._signal = number
            self._wake.set()

    def _begin(self, number: int) -> None:
        self._signal = number
        self._hold = self._num_passed + 1
        self._signals.set_deadline(time.monotonic() + self._grace_s, self._abandon)
        if self._phase == _STEPS:
            logger.info(
                "%s: stopping after this step; another signal exits at once",
                signal.Signals(number).name,
            )

    def _agree(self, stop_at: float, has_work: bool) -> None:
        assert self._signal is not None
        if has_work:
            with self._changed:
                self._stop_at = stop_at
                self._changed.notify_all()
        else:
            name = signal.Signals(self._signal).name
            self._signals.exit_now(ExitNow(f"stopped by {name}", 128 + self._signal))

    def _abandon(self) -> ExitNow:
        return ExitNow(
            f"[checkpoint] grace_s = {self._grace_s:g}: the save was not complete that many seconds"
            f" after the signal, and is abandoned; {self._describe_checkpoint()}",
            SaveAbandonedError.exit_status,
        )

    def _watch(self) -> None:
        assert self._board is not None
        try:
            while not self._is_closed:
                is_asking = self._answers_by is not None and self._stop_at is None
                self._wake.wait(POLL_WHILE_ASKING_S if is_asking else _POLL_S)
                self._wake.clear()
                if not self._is_closed:
                    self._look(self._board)
        except RuntimeError as error:
            # The process that holds the store has ended; collectives will fail too.
            while not self._is_closed and self._stop_at is None and self._phase != _END:
                if self._signal is not None:
                    reason = f"lost the store of the rendezvous ({first_line(error)})"
                    self._give_up(f"cannot save: {reason}")
                    return
                self._wake.wait()

    def _look(self, board: Board) -> None:
        if self._signal is not None and not self._has_asked:
            board.ask_for_stop(self._signal)
            self._has_asked = True
        self._call_if_stalled(board)
        if not board.has_news:
            return
        board.answer(self._state())
        failure = board.failure()
        if failure is not None:
            self._end_after(failure)
        number = board.stop_asked_for()
        if number is not None and self._stop_at is None:
            self._ask_where_to_stop(board, self._signal or number)

    def _ask_where_to_stop(self, board: Board, number: int) -> None:
        if self._answers_by is None:
            with self._changed:
                self._begin(number)
                passed: list[JsonValue] = [
                    self._num_passed,
                    self._num_steps > 0,
                    self._phase == _END,
                ]
            board.post(_PASSED, passed)
            self._answers_by = time.monotonic() + ANSWER_S
        if board.have_all_posted(_PASSED):
            passed_by_rank = board.posts(_PASSED)
            is_over = any(has_ended for _, _, has_ended in passed_by_rank)
            last = max(num_passed for num_passed, _, _ in passed_by_rank)
            self._agree(
                math.inf if is_over else last + 1,
                has_work=is_over or any(has_work for _, has_work, _ in passed_by_rank),
            )
        elif time.monotonic() > self._answers_by and self._signals.ending is None:
            lost = board.missing(_PASSED)
            reason = f"cannot save: {describe_lost(board, lost)}"
            if is_first_of_others(board, lost):
                logger.error("%s", reason)
            self._give_up(reason)

    def _end_after(self, failure: Failure) -> None:
        if self._failed_by is None:
            self._failed_by = time.monotonic() + _FAILED_TOO_S
        elif time.monotonic() > self._failed_by:
            error = error_of(failure)
            self._signals.exit_now(ExitNow(str(error), error.exit_status, is_consequence=True))

    def _give_up(self, reason: str) -> None:
        message = f"{reason}; {self._describe_checkpoint()}"
        self._signals.exit_now(ExitNow(message, LostRankError.exit_status, is_consequence=True))

    def _call_if_stalled(self, board: Board) -> None:
        stalled_s = time.monotonic() - self._progress_at
        if self._phase != _STEPS or stalled_s < self._stalled_after_s or self._has_called:
            return
        self._has_called = True
        call = board.call()
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline and not board.have_all_posted(call):
            board.answer(self._state())
            time.sleep(POLL_WHILE_ASKING_S)
        lost = board.missing(call)
        if lost and is_first_of_others(board, lost):
            logger.error("no step for %.0f s: %s", stalled_s, describe_lost(board, lost))

    def _state(self) -> str:
        return f"{self._phase} ({self._num_steps} steps done)"
