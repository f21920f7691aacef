"""Stops a run by a signal: all ranks after the same step, with a limit to the last save."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from switchtitan.errors import SAVE_ABANDONED_STATUS, end_now

logger = logging.getLogger(__name__)

SAME_ACTION_S = 2.0
"""Signals within this time are one action: a terminal or Slurm signals the launcher and its ranks,
and the launcher then signals the ranks."""


class Stopped(Exception):  # noqa: N818
    """A signal stopped the run; its last step is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Stop:
    """A context that receives SIGTERM, SIGINT, SIGHUP and added signals, in the main thread.

    During `steps`, `is_due` returns the first signal. Before and after, nothing can be lost: the
    signal raises KeyboardInterrupt(number). A second signal, 2 s after the first or later, ends the
    process. Ignored signals stay ignored, as `nohup` asks for, unless a launcher passes them on.
    """

    def __init__(self, is_launched: bool = False) -> None:
        self._is_launched = is_launched
        self._group: dist.ProcessGroup | None = None
        self._grace_s = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._number, self._received_at = 0, 0.0
        self._is_of_another_rank = False
        self._is_in_steps = False
        self._describe_checkpoint: Callable[[], str] = str
        self._deadline: threading.Timer | None = None
        self._flag = torch.zeros((), dtype=torch.int64, device="cpu")
        self._agreement: dist.Work | None = None

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.add(number)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def add(self, number: int) -> None:
        """Receives another signal too."""
        is_ignored = signal.getsignal(number) is signal.SIG_IGN and not self._is_launched
        if number not in self._previous and not is_ignored:
            self._previous[number] = signal.signal(number, self._handle)

    def configure(self, group: dist.ProcessGroup | None, grace_s: float) -> None:
        """Sets the ranks to stop together, over gloo (None: a single one), and the seconds from the
        signal to the end of the last save."""
        self._group, self._grace_s = group, grace_s

    @contextmanager
    def steps(self, describe_checkpoint: Callable[[], str]) -> Iterator[None]:
        """Returns a context for the steps of a run and its last save; raises Stopped on every rank
        for a signal after the last `is_due`.

        Args:
            describe_checkpoint: returns what the run resumes from if it stops now.
        """
        self._describe_checkpoint, self._is_in_steps = describe_checkpoint, True
        try:
            if self._number:  # a destructor has swallowed the interrupt
                raise KeyboardInterrupt(self._number)
            yield
            for _ in range(1 if self._group is None else 2):
                if (number := self.is_due()) is not None:
                    raise Stopped(number)
        except Stopped:
            # A launcher sends SIGTERM when the first of several ranks has ended.
            self._received_at = time.monotonic()
            raise
        finally:
            self._is_in_steps = False
            if self._deadline is not None:
                self._deadline.cancel()
        if self._number:
            raise KeyboardInterrupt(self._number)

    def is_due(self) -> int | None:
        """Returns the signal to save and stop for, the same on every rank, or None; collective."""
        if not self._is_in_steps:
            return None
        number = self._number if self._group is None else self._agree()
        if number == 0:
            return None
        if not self._number:
            self._receive(number)
            self._is_of_another_rank = True
        logger.info("%s: stopping here; another signal exits at once", signal.Signals(number).name)
        return number

    def _agree(self) -> int:
        """Returns a signal of any rank at the last boundary; shares the one at this boundary. So no
        step waits for the other ranks, and several ranks stop one step later."""
        if self._agreement is not None:
            self._agreement.wait()
        number = int(self._flag)
        self._flag.fill_(self._number)
        self._agreement = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker has its own signals
            raise SystemExit(128 + number)
        if not self._number:
            self._receive(number)
            if not self._is_in_steps:
                raise KeyboardInterrupt(number)
        elif self._is_of_another_rank:
            # This rank's own first signal, of the same action: schedulers are not in step.
            self._is_of_another_rank = False
        elif time.monotonic() - self._received_at >= SAME_ACTION_S:
            end_now(f"stopped at once by {signal.Signals(number).name}", 128 + number)

    def _receive(self, number: int) -> None:
        if self._deadline is not None:
            return
        self._number, self._received_at = number, time.monotonic()
        # The loader's workers may end too. torch's handler would raise for them during the save.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._is_in_steps:
            self._deadline = threading.Timer(self._grace_s, self._abandon)
            self._deadline.daemon = True
            self._deadline.start()

    def _abandon(self) -> None:
        end_now(
            f"[checkpoint] grace_s = {self._grace_s:g}: the save was not complete that many seconds"
            f" after the signal, and is abandoned; {self._describe_checkpoint()}",
            SAVE_ABANDONED_STATUS,
        )
