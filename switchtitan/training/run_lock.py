"""One process at a time trains in a run's folder."""

import atexit
import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from switchtitan.checkpoint.background import join_writers
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.files import create_atomically
from switchtitan.training.lock_owner import Owner, is_here, may_be_alive, parse_owner, this_process
from switchtitan.training.output_folder import (
    cannot_write,
    check_writable,
    create_folder,
    try_to_remove,
)

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
"""In a run's folder while the run trains; names the process."""
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without locks."""
_LEASE_S = 90.0
"""NFS servers keep the lock of a node that crashed until its lease ends: 90 s on Linux."""
_POLL_S = 1.0
_CHANGES_WITHIN_S = 5.0
"""Time in which a process that has just created a file writes it, or that deletes one does so."""
_CHANGE_POLL_S = 0.02
_WRITER_ENDS_WITHIN_S = 1.0
"""The thread of a background save ends soon after the save."""
_MAX_BYTES = 1 << 16


@contextmanager
def lock_output_dir(output_dir: Path, world: World) -> Iterator[None]:
    """Keeps every other process from training in the folder, until the context ends.

    After an error, a background save may continue until the process ends. The lock does so too.

    The main rank holds a POSIX lock, which ends with its process and is not inherited by workers.
    On a file system without locks it creates a file that names the process. The file of a process
    that has ended is deleted, and one that names nobody for some seconds. Only a process of this
    host and this boot can be looked up: of others, which may be of another machine with the same
    host name, only one that Slurm has requeued has ended.

    Raises:
        ConfigError: on every rank, if another process trains there, or the folder cannot be
            written. If its lock is held from another host, which may have crashed, after waiting.
    """
    with ExitStack() as acquired:

        def acquire() -> None:
            if world.is_main:
                check_writable(output_dir)
                try:
                    _acquire(output_dir, acquired)
                except OSError as error:
                    raise _cannot_lock(output_dir, error) from error

        world.together(acquire)
        held = acquired.pop_all()
    try:
        yield
    finally:
        _release_after_writes(held)


def _release_after_writes(held: ExitStack) -> None:
    has_written = False
    try:
        has_written = join_writers(_WRITER_ENDS_WITHIN_S)
    finally:  # after Ctrl-C too
        if has_written:
            held.close()
        else:
            # The interpreter joins threads before it calls this.
            atexit.register(_release_at_exit, held)


def _release_at_exit(held: ExitStack) -> None:
    # Ctrl-C ends the interpreter's wait. The kernel then releases the lock, after the last write.
    if join_writers(timeout_s=0.0):
        held.close()


def _acquire(output_dir: Path, held: ExitStack) -> None:
    file = output_dir / LOCK_FILE
    deadline = None
    while True:
        create_folder(output_dir, held)
        try:
            is_new = not os.path.lexists(file)
            if is_new and not _has_locks(output_dir):
                if _own_new_file(file, held):
                    return
                continue
            descriptor = _open(file, may_create=is_new)
        except FileNotFoundError:
            continue  # another process has deleted the file, or a folder that it created
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            _close(descriptor)
            if error.errno in _WITHOUT_LOCKS:
                deadline = _delete_if_ended(output_dir, deadline)
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                deadline = _wait(output_dir, deadline)
            else:
                raise
            continue
        held.callback(_close, descriptor)
        if _is_named(descriptor, file):
            break
    own = this_process(has_kernel_lock=True)
    # Not by name: closing a second descriptor would release the lock.
    owner = parse_owner(os.pread(descriptor, _MAX_BYTES, 0))
    if owner is not None and not owner.has_kernel_lock and may_be_alive(owner, own):
        raise _taken(output_dir, owner)
    # While locked: afterwards another process may own the file of this name.
    held.callback(_remove_if_named, descriptor, file)
    _write(descriptor, own)


def _has_locks(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return False
            raise
    return True


def _open(file: Path, may_create: bool) -> int:
    """Returns a descriptor.

    Raises:
        FileNotFoundError: if the folder does not exist, or the file has been deleted meanwhile.
        OSError: if the file is a link: its target is not written.
    """
    if may_create:
        with suppress(FileExistsError):
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    return os.open(file, os.O_RDWR | os.O_NOFOLLOW)


def _write(descriptor: int, owner: Owner) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
    os.fsync(descriptor)


def _wait(output_dir: Path, deadline: float | None) -> float:
    """Waits for the lock of another host; returns until when, by the monotonic clock.

    Args:
        deadline: None on the first call.

    Raises:
        ConfigError: if the owner is of this host and boot, or the time is over, which is short as
            long as the file does not name one: its owner is just writing or deleting it.
    """
    owner = _named_owner(output_dir / LOCK_FILE)
    is_of_host = owner is not None and is_here(owner, this_process(has_kernel_lock=True))
    if deadline is None and owner is None:
        deadline = time.monotonic() + _CHANGES_WITHIN_S
    elif deadline is None and owner is not None and not is_of_host:
        logger.info("waiting for the lock of %s", owner.host)
        deadline = time.monotonic() + _LEASE_S
    if deadline is None or is_of_host or time.monotonic() > deadline:
        raise _taken(output_dir, owner, may_delete=owner is not None and not is_of_host)
    time.sleep(_CHANGE_POLL_S if owner is None else _POLL_S)
    return deadline


def _named_owner(file: Path) -> Owner | None:
    """Returns the owner of a locked file; None while the file still names a killed one."""
    owner, own = parse_owner(_read(file)), this_process(has_kernel_lock=True)
    if owner is not None and is_here(owner, own) and not may_be_alive(owner, own):
        return None
    return owner


def _is_named(descriptor: int, file: Path) -> bool:
    """Whether the open file still has its name: the former owner deletes it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _remove_if_named(descriptor: int, file: Path) -> None:
    with suppress(OSError):
        if _is_named(descriptor, file):
            file.unlink()


def _close(descriptor: int) -> None:
    with suppress(OSError):  # network file systems repeat the error of a write
        os.close(descriptor)


def _own_new_file(file: Path, held: ExitStack) -> bool:
    """Without kernel locks: creates the file and owns it; returns whether that succeeded.

    The file appears with its contents, so a process that is killed leaves none that names nobody.
    """
    contents = this_process(has_kernel_lock=False).model_dump_json().encode()
    try:
        create_atomically(file, contents)
    except FileExistsError:
        return False
    except BaseException:
        _remove_contents(file, contents)
        raise
    held.callback(_remove_contents, file, contents)
    return True


def _delete_if_ended(output_dir: Path, deadline: float | None) -> float:
    """Without kernel locks: deletes the file of a process that has ended.

    An empty file stays of a process that was killed while it created the file, on another node,
    whose file system has locks, or by an older version. It is deleted if it stays empty.

    Returns until when to try again, by the monotonic clock. Another process may create the file
    next, even before this one.

    Args:
        deadline: None on the first call.

    Raises:
        ConfigError: if the owner may run, or is unknown for some time.
    """
    if deadline is None:
        deadline = time.monotonic() + _CHANGES_WITHIN_S
    file = output_dir / LOCK_FILE
    contents = _read(file)
    owner = parse_owner(contents)
    if owner is not None and may_be_alive(owner, this_process(has_kernel_lock=False)):
        raise _taken(output_dir, owner)
    is_over = time.monotonic() > deadline
    if owner is not None or (is_over and contents == b""):
        _remove_contents(file, contents)
    if file.exists():
        if is_over:
            raise _taken(output_dir, owner)
        time.sleep(_CHANGE_POLL_S)
    return deadline


def _remove_contents(file: Path, contents: bytes) -> None:
    """Deletes a lock file unless it has other contents, or another process is deleting it.

    Of several processes that have read the same contents, one at a time continues: it holds a
    second file. So none can delete what a new owner has created since.
    """
    claim = file.with_name(f"{file.name}.{hashlib.sha256(contents).hexdigest()[:16]}")
    try:
        _close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except OSError:
        return
    try:
        with suppress(OSError):  # of a network file system; the file then names an ended process
            if _read(file) == contents:
                try_to_remove(file.unlink)
    finally:
        try_to_remove(claim.unlink)


def _read(file: Path) -> bytes:
    """Returns the contents; nothing if the file is missing."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _taken(output_dir: Path, owner: Owner | None, *, may_delete: bool = True) -> ConfigError:
    """Returns the error for a folder of another process.

    Args:
        may_delete: whether the file may be left of a process that has ended.
    """
    who = "another process"
    if owner is not None:
        who = f"process {owner.pid} on {owner.host}, started {owner.since},"
    way_out = "wait until it ends, or stop it"
    if may_delete:
        way_out += f", or delete {output_dir / LOCK_FILE} if it is known to have ended"
    return ConfigError(
        f"[job] output_dir = {str(output_dir)!r}: {who} trains in this folder; {way_out}, or "
        "choose another output_dir"
    )


def _cannot_lock(output_dir: Path, error: OSError) -> ConfigError:
    file = output_dir / LOCK_FILE
    if error.errno == errno.ELOOP and file.is_symlink():
        return ConfigError(
            f"[job] output_dir = {str(output_dir)!r}: {file} is a link; delete it, or choose "
            "another output_dir"
        )
    if not isinstance(error, PermissionError) or not os.path.lexists(file):
        return cannot_write(output_dir, error)
    try:
        user = file.owner()
    except (KeyError, OSError):
        user = f"with ID {file.lstat().st_uid}"
    return ConfigError(
        f"[job] output_dir = {str(output_dir)!r}: {file} belongs to the user {user} and cannot be "
        f"locked ({error.strerror}); choose another output_dir, or delete the file if no run of "
        "that user trains there"
    )
