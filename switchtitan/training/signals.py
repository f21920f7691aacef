"""Signals that stop a run. A thread sees them also while the main thread waits in C++ code."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from switchtitan.errors import record_end

SAME_ACTION_S = 2.0
"""Signals within this time are one action: a terminal or Slurm signals the launcher and its ranks,
and the launcher then signals the ranks."""
UNWIND_S = 3.0
"""Time for the main thread to release what it holds. After it, the process ends without that."""
_UNWIND_AT_START_S = 10.0
_WAKE = 0
"""Not the number of a signal."""

_active: "StopSignals | None" = None


class ExitNow(BaseException):
    """Ends the process without waiting for anything. Not an `Exception`: no code handles it."""

    def __init__(self, message: str, status: int, is_consequence: bool = False) -> None:
        # All arguments: torch.distributed.checkpoint pickles errors.
        super().__init__(message, status, is_consequence)
        self.message = message
        self.status = status
        self.is_consequence = is_consequence

    def exit(self) -> None:
        """Ends the process, also if threads or other processes have not ended."""
        record_end(self.message, self.status, is_consequence=self.is_consequence)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


class StopSignals:
    """A context that receives SIGTERM, SIGINT, SIGHUP and added signals.

    The first signal raises KeyboardInterrupt(number) in the main thread. Between `defer` and
    `release` it does not: it calls a function in this object's thread. A second signal ends the
    process. Use it in the main thread.

    Args:
        is_launched: receive signals that are ignored too: a launcher passes on those that it does
            not ignore. Otherwise they stay ignored, as `nohup` asks for.
    """

    def __init__(self, is_launched: bool = False) -> None:
        self._is_launched = is_launched
        self.received: int | None = None
        """The first signal's number."""
        self._lock = threading.RLock()
        self._received_at = 0.0
        self._has_raised = False
        self._on_stop: Callable[[int], None] | None = None
        self._exit: ExitNow | None = None
        """How the process ends at `_exit_at`, if the main thread has not left before."""
        self._exit_at: float | None = None
        self._is_ending = False
        self._is_finished = False
        self._to_raise: ExitNow | None = None
        self._deadline: float | None = None
        self._on_deadline: Callable[[], ExitNow] | None = None
        self._previous: dict[int, Any] = {}
        self._is_closed = False
        self._reader, self._writer = -1, -1
        self._previous_fd = -1
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    @property
    def ending(self) -> ExitNow | None:
        """What `exit_now` was called with. Other code may have caught it in the main thread."""
        return self._exit if self._is_ending else None

    def __enter__(self) -> "StopSignals":
        global _active
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _active = self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.add(number)
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _active
        self._is_closed = True
        self._wake()
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        _active = None
        os.close(self._reader)
        os.close(self._writer)

    def add(self, number: int) -> None:
        """Receives another signal too."""
        is_ignored = signal.getsignal(number) is signal.SIG_IGN and not self._is_launched
        if number not in self._previous and not is_ignored:
            self._previous[number] = signal.signal(number, self._handle)

    def defer(self, on_stop: Callable[[int], None]) -> None:
        """Calls `on_stop(number)` in this object's thread for the first signal, from now on.

        For one that came before, calls it at once. If it has raised, other code has swallowed that,
        such as a destructor.
        """
        with self._lock:
            self._on_stop = on_stop
            earlier = self.received
            if earlier is not None:
                self._exit_at, self._has_raised = None, False
        if earlier is not None:
            on_stop(earlier)

    def release(self) -> None:
        """Raises KeyboardInterrupt for the first signal again.

        Raises:
            KeyboardInterrupt: if there was one since `defer`.
        """
        with self._lock:
            self._on_stop = None
            if self.received is not None and not self._has_raised:
                self._has_raised = True
                raise KeyboardInterrupt(self.received)

    def finish(self) -> None:
        """Lets the process end: a further signal only sets a limit to it.

        A launcher may send SIGTERM when the first of several ranks has ended.
        """
        with self._lock:
            self._has_raised, self._is_finished = True, True

    def set_deadline(self, deadline: float, on_deadline: Callable[[], ExitNow]) -> None:
        """Ends the process with the result of `on_deadline` at `deadline`, by the monotonic
        clock."""
        with self._lock:
            self._deadline, self._on_deadline = deadline, on_deadline
        self._wake()

    def clear_deadline(self) -> None:
        with self._lock:
            self._deadline = None

    def exit_now(self, ending: ExitNow) -> None:
        """Raises `ending` in the main thread; ends the process if that does not."""
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
            self._to_raise = self._exit = ending
            self._exit_at = time.monotonic() + UNWIND_S
        self._wake()
        main, number = threading.main_thread().ident, next(iter(self._previous), None)
        if main is not None and number is not None:
            signal.pthread_kill(main, number)  # wakes it

    def _handle(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            if self._to_raise is not None:
                ending, self._to_raise = self._to_raise, None
                raise ending
            if self._is_ending or self._on_stop is not None or self._has_raised:
                return
            self._has_raised = True
        # The loader's workers may end too. torch's handler would raise for them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    def _watch(self) -> None:
        while not self._is_closed:
            with self._lock:
                times = [at for at in (self._exit_at, self._deadline) if at is not None]
            timeout = max(min(times) - time.monotonic(), 0.0) if times else None
            if select.select([self._reader], [], [], timeout)[0]:
                for number in os.read(self._reader, 4096):
                    self._see(number)
            self._check_deadlines()

    def _see(self, number: int) -> None:
        now = time.monotonic()
        with self._lock:
            if number not in self._previous or self._is_ending:
                return
            ending = ExitNow(f"stopped by {signal.Signals(number).name}", 128 + number)
            is_first, on_stop = self.received is None, self._on_stop
            if is_first:
                self.received, self._received_at = number, now
            if self._is_finished or (is_first and on_stop is None):
                self._exit, self._exit_at = ending, now + _UNWIND_AT_START_S
                return
        # Without the lock: the main thread may hold locks of `on_stop` while it handles a signal.
        if is_first and on_stop is not None:
            on_stop(number)
        elif now - self._received_at > SAME_ACTION_S:
            name = signal.Signals(number).name
            self.exit_now(ExitNow(f"stopped at once by {name}", 128 + number))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._exit_at is not None and now >= self._exit_at and self._exit is not None:
            self._exit.exit()
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            if self._on_deadline is not None:
                self.exit_now(self._on_deadline())

    def _wake(self) -> None:
        os.write(self._writer, bytes([_WAKE]))


def _forget_in_child() -> None:
    """A forked process has its parent's handlers; its signals are not its parent's."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        _active._lock = threading.RLock()  # a thread may have held the other one
        _active._on_stop, _active._has_raised, _active._is_ending = None, False, False


os.register_at_fork(after_in_child=_forget_in_child)
