"""Locks of a run's folder as other processes hold or leave them, and shorter waits for them."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from switchtitan.training import lock_owner, run_lock
from switchtitan.training.lock_owner import this_process
from switchtitan.training.run_lock import LOCK_FILE

LEASE_S = 0.3


def shorten_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for another host, and for a file that is just written, end after `LEASE_S`."""
    monkeypatch.setattr(run_lock, "_POLL_S", 0.02)
    monkeypatch.setattr(run_lock, "_LEASE_S", LEASE_S)
    monkeypatch.setattr(run_lock, "_CHANGES_WITHIN_S", LEASE_S)


def hold_kernel_lock(
    monkeypatch: pytest.MonkeyPatch,
    num_tries: float = float("inf"),
    at_try: Callable[[int], object] = lambda number: None,
) -> None:
    """Another process holds the kernel lock of the folder.

    Args:
        num_tries: after so many tries it ends.
        at_try: called with the number of each try, from 1.
    """
    lockf, tries = fcntl.lockf, []

    def refuse(descriptor: int, operation: int) -> None:
        if len(tries) >= num_tries:
            return lockf(descriptor, operation)
        tries.append(descriptor)
        at_try(len(tries))
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "lockf", refuse)


def refuse_kernel_locks(*args: object) -> None:
    """Takes the place of `fcntl.lockf` on a file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def write_owner(output_dir: Path, **values: object) -> bytes:
    """Writes the file of this process without a kernel lock, with other values."""
    output_dir.mkdir(parents=True, exist_ok=True)
    owner = this_process(has_kernel_lock=False).model_copy(update=values)
    contents = owner.model_dump_json().encode()
    (output_dir / LOCK_FILE).write_bytes(contents)
    return contents


def hide_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems without /proc."""
    monkeypatch.setattr(lock_owner, "_stat", lambda pid: None)
    monkeypatch.setattr(lock_owner, "_boot_id", lambda: None)
    monkeypatch.setattr(lock_owner, "_pid_namespace", lambda: None)
