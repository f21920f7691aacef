"""What ranks tell each other outside of collectives: keys in the store of the rendezvous.

A rank can read and write them in a thread, while its main thread waits for another rank.
"""

import json
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from pydantic import JsonValue
from torch.distributed.distributed_c10d import _get_default_store

_ALERT = "alert"
_STOP = "stop"
_FAILURE = "failure"
_CALLS = "calls"
_KNOWS = "knows-failure"
_POLL_S = 0.02


class Failure(NamedTuple):
    """The first failure of a rank."""

    rank: int
    name: str
    """The rank and its host."""
    reason: str
    exit_status: int | None
    """Of a known error; None for a crash."""


class Board:
    """The keys of the ranks of the default process group.

    A method that finds no key returns at once. Each may raise `RuntimeError` if the process that
    holds the store has ended.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._store = dist.PrefixStore("board", _get_default_store())
        self._num_answered = 0
        self.known_failure: Failure | None = None
        """What `failure` has returned, also when the store is lost."""
        self._store.set(f"host/{rank}", socket.gethostname())

    @property
    def has_news(self) -> bool:
        """Whether any rank has asked for a stop, failed or called the others."""
        return self._store.check([_ALERT])

    def ask_for_stop(self, signal_number: int) -> None:
        self._store.compare_set(_STOP, "", str(signal_number))
        self._store.set(_ALERT, "")

    def stop_asked_for(self) -> int | None:
        """Returns the signal for which a rank has asked for a stop."""
        return int(self._store.get(_STOP)) if self._store.check([_STOP]) else None

    def report_failure(self, reason: str, exit_status: int | None) -> None:
        """Tells the others that this rank fails, unless another one has failed before."""
        name = f"rank {self.rank} on {socket.gethostname()}"
        failure = json.dumps(Failure(self.rank, name, reason, exit_status))
        self._store.compare_set(_FAILURE, "", failure)
        self._store.set(f"{_KNOWS}/{self.rank}", "")
        self._store.set(_ALERT, "")

    def failure(self) -> Failure | None:
        """Returns the first failure of another rank."""
        if self.known_failure is None and self._store.check([_FAILURE]):
            failure = Failure(*json.loads(self._store.get(_FAILURE)))
            if failure.rank != self.rank:
                self.known_failure = failure
                self._store.set(f"{_KNOWS}/{self.rank}", "")
        return self.known_failure

    def share_failure(self, timeout_s: float) -> None:
        """Waits on the first rank until the others know of a failure.

        That rank's process may hold the store, which ends with it.
        """
        deadline = time.monotonic() + timeout_s
        while self.rank == 0 and time.monotonic() < deadline:
            if self.have_all_posted(_KNOWS):
                return
            time.sleep(_POLL_S)

    def post(self, kind: str, value: JsonValue) -> None:
        """Publishes this rank's value."""
        self._store.set(f"{kind}/{self.rank}", json.dumps(value))

    def have_all_posted(self, kind: str) -> bool:
        """Whether every rank has published a value; one request."""
        return self._store.check([f"{kind}/{rank}" for rank in range(self.num_ranks)])

    def posts(self, kind: str) -> list[Any]:
        """Returns the values of all ranks, which must `have_all_posted`."""
        keys = [f"{kind}/{rank}" for rank in range(self.num_ranks)]
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def missing(self, kind: str) -> list[int]:
        """Returns the ranks that have not published a value."""
        return [rank for rank in range(self.num_ranks) if not self._store.check([f"{kind}/{rank}"])]

    def call(self) -> str:
        """Asks every rank to `answer`; returns the kind of the answers."""
        number = self._store.add(_CALLS, 1)
        self._store.set(_ALERT, "")
        return f"answer-{number}"

    def answer(self, state: JsonValue) -> None:
        """Answers the calls since the last answer with what this rank does."""
        newest = self._store.add(_CALLS, 0)
        for number in range(self._num_answered + 1, newest + 1):
            self.post(f"answer-{number}", state)
        self._num_answered = newest

    def names(self, ranks: Sequence[int]) -> str:
        """Returns ranks with their hosts: "rank 3 on node-1"."""
        named = []
        for rank in ranks[:4]:
            key = f"host/{rank}"
            host = self._store.get(key).decode() if self._store.check([key]) else "an unknown host"
            named.append(f"rank {rank} on {host}")
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(named) + more
