"""Files: replaced atomically, locked by one process at a time, identified by a checksum."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switchtitan.errors import EnvironmentMismatchError

_READ_BYTES = 1 << 22


def write_atomically(file: Path, contents: str | bytes) -> None:
    """Writes a file durably, so that readers see either the old or the new contents, and never a part of them.

    Args:
        contents: text is encoded as UTF-8.
    """
    partial = file.with_name(file.name + ".new")
    with partial.open("wb") as stream:
        stream.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def sha256_of_file(file: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def try_lock(file: Path) -> Iterator[int | None]:
    """Holds an exclusive lock on `file`, which is created; yields None, without a lock, if another process holds it.

    The lock belongs to the open file. The system releases it when this process, and every process that inherited the
    yielded descriptor, has closed the file or died; the file itself stays.

    Raises:
        EnvironmentMismatchError: if the file system has no locks.
    """
    with _opened(file) as descriptor:
        yield descriptor if _lock(descriptor, file, fcntl.LOCK_EX | fcntl.LOCK_NB) else None


@contextmanager
def lock(file: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Holds an exclusive lock on `file`, as `try_lock` does; calls `on_wait` and waits if another process holds it.

    Raises:
        EnvironmentMismatchError: if the file system has no locks.
    """
    with _opened(file) as descriptor:
        if not _lock(descriptor, file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            on_wait()
            _lock(descriptor, file, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, file: Path, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EnvironmentMismatchError(
            f"{file}: the file system has no file locks (flock: {error.strerror}); use a folder on a local disk, or "
            "mount the file system with locks (Lustre: -o flock)"
        ) from error
    return True
