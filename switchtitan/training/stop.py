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


class Stopped(KeyboardInterrupt):
    """A signal, `args[0]`, stopped the run; its last step is saved."""


class Stop:
    """A context that receives SIGTERM, SIGINT, SIGHUP and added signals, in the main thread.

    During `steps`, `raise_if_due` raises Stopped for the first signal. Before and after, nothing
    can be lost: the signal raises KeyboardInterrupt(number). A second signal, 2 s after the first
    or later, ends the process. Ignored signals stay ignored, as `nohup` asks for, unless a launcher
    passes them on.
    """

    def __init__(self, is_launched: bool = False) -> None:
        self._is_launched = is_launched
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._number = 0
        self._received_at: float | None = None
        """None until this rank has received a signal itself."""
        self._deadline: threading.Timer | None = None
        self._is_in_steps = False
        self._describe_checkpoint: Callable[[], str] = str
        self._grace_s = 0.0
        self._group: dist.ProcessGroup | None = None
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

    @contextmanager
    def steps(
        self,
        describe_checkpoint: Callable[[], str],
        grace_s: float,
        group: dist.ProcessGroup | None = None,
    ) -> Iterator[None]:
        """Returns a context for the steps of a run and its last save; raises Stopped on every rank
        for a signal after the last `raise_if_due`.

        Args:
            describe_checkpoint: returns what the run resumes from if it stops now.
            grace_s: seconds from the signal to the end of the last save.
            group: the ranks to stop together, over gloo; None: a single one.
        """
        self._describe_checkpoint, self._grace_s, self._group = describe_checkpoint, grace_s, group
        self._is_in_steps = True
        try:
            if self._number:  # a destructor has swallowed the interrupt
                raise KeyboardInterrupt(self._number)
            yield
            for _ in range(1 if group is None else 2):
                self.raise_if_due()
        except Stopped:
            if self._received_at is not None:
                # A launcher sends SIGTERM when the first of several ranks has ended.
                self._received_at = time.monotonic()
            raise
        finally:
            self._is_in_steps = False
            if self._deadline is not None:
                self._deadline.cancel()
        if self._number:
            raise KeyboardInterrupt(self._number)

    def raise_if_due(self) -> None:
        """Raises Stopped if a rank has received a signal, on every rank; collective."""
        if not self._is_in_steps:
            return
        number = self._number if self._group is None else self._agree()
        if number:
            self._receive(number)
            name = signal.Signals(number).name
            logger.info("%s: stopping here; another signal exits at once", name)
            raise Stopped(number)

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
        is_first, now = not self._number, time.monotonic()
        if self._received_at is None:
            # Perhaps after another rank's, of the same action: schedulers are not in step.
            self._received_at = now
            self._receive(number)
        elif now - self._received_at >= SAME_ACTION_S:
            end_now(f"stopped at once by {signal.Signals(number).name}", 128 + number)
        if is_first and not self._is_in_steps:
            raise KeyboardInterrupt(number)

    def _receive(self, number: int) -> None:
        """Begins the stop, unless it has begun."""
        if self._number:
            return
        self._number = number
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
