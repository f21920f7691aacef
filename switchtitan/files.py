"""Atomic writes, locks and checksums of files."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switchtitan.errors import EnvironmentMismatchError

_READ_BYTES = 1 << 22


def write_atomically(file: Path, contents: str | bytes) -> None:
    """Write a file durably. Readers see either the old or the new contents, never a part of them.

    Args:
        contents: a string is encoded as UTF-8.
    """
    partial = file.with_name(file.name + ".new")
    with partial.open("wb") as stream:
        stream.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def sha256_of_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def try_lock(file: Path, key: str) -> Iterator[int | None]:
    """Hold an exclusive lock on `file`, which is created if missing.

    Yields the file's descriptor, or None if another process holds the lock. The system releases the
    lock when this process and every process that inherited the descriptor have closed the file or
    exited. The file is not deleted.

    Args:
        key: the configuration key of the folder, for the error.

    Raises:
        EnvironmentMismatchError: if the file system has no locks.
    """
    with _opened(file) as descriptor:
        yield descriptor if _lock(descriptor, file, key, fcntl.LOCK_EX | fcntl.LOCK_NB) else None


@contextmanager
def lock(file: Path, on_wait: Callable[[], object], key: str) -> Iterator[None]:
    """Hold an exclusive lock on `file`, as `try_lock` does.

    If another process holds it, calls `on_wait` and waits.

    Raises:
        EnvironmentMismatchError: if the file system has no locks.
    """
    with _opened(file) as descriptor:
        if not _lock(descriptor, file, key, fcntl.LOCK_EX | fcntl.LOCK_NB):
            on_wait()
            _lock(descriptor, file, key, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, file: Path, key: str, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EnvironmentMismatchError(
            f"{key}: the file system of {file} has no file locks (flock: {error.strerror}); set "
            f"{key} to a folder on another disk, or mount this one with locks (Lustre: -o flock)"
        ) from error
    return True
