"""One process at a time trains in a run's folder."""

import atexit
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from switchtitan.checkpoint.background import join_writers
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
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
_SETTLED_AFTER_S = 1.0
_LEASE_S = 90.0
"""NFS servers keep the lock of a node that crashed until its lease ends: 90 s on Linux."""
_POLL_S = 1.0
_WRITER_ENDS_WITHIN_S = 1.0
"""The thread of a background save ends soon after the save."""
_SHARED_RUN_IDS = {"", "none", "switchtitan"}
"""Ids that unrelated runs have: the defaults of torchrun and of ./run_train.sh."""


class _Owner(BaseModel):
    """The contents of the file."""

    host: str
    pid: int
    since: str
    """Local time of the start."""
    job: str | None = None
    """Id of the launcher's job, which a requeued job keeps. None in files of older versions too."""


@contextmanager
def lock_output_dir(output_dir: Path, world: World) -> Iterator[None]:
    """Keeps every other process from training in the folder, until the context ends.

    After an error, a background save may go on until the process ends. The lock does so too.

    The main rank holds a POSIX lock, which ends with its process and is not inherited by workers.
    On a file system without locks it writes a file that names the process. The file of a process
    that has ended is taken over, as is that of the same job on another host: the job was requeued.

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
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has deleted a folder that it created
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            _close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                deadline = _wait(output_dir, deadline)
                continue
            if error.errno in _WITHOUT_LOCKS:
                _hold_without_locks(output_dir, held)
                return
            raise
        held.callback(_close, descriptor)
        if _is_named(descriptor, file):
            break
    # While locked: afterwards another process may own the file of this name.
    held.callback(try_to_remove, file.unlink)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _this_process().model_dump_json().encode(), 0)
    os.fsync(descriptor)


def _wait(output_dir: Path, deadline: float | None) -> float:
    """Waits for the lock of another host; returns until when, by the monotonic clock.

    Args:
        deadline: None on the first call.

    Raises:
        ConfigError: if the owner is on this host, or unknown at first, or the time is over.
    """
    owner = _read_owner(output_dir / LOCK_FILE)
    is_here = owner is not None and owner.host == socket.gethostname()
    if deadline is None and owner is not None and not is_here:
        logger.info("waiting for the lock of %s", owner.host)
        deadline = time.monotonic() + _LEASE_S
    if deadline is None or is_here or time.monotonic() > deadline:
        raise _taken(output_dir, owner)
    time.sleep(_POLL_S)
    return deadline


def _is_named(descriptor: int, file: Path) -> bool:
    """Whether the open file still has its name: the former owner deletes it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    with suppress(OSError):  # network file systems repeat the error of a write
        os.close(descriptor)


def _hold_without_locks(output_dir: Path, held: ExitStack) -> None:
    """Owns the folder by a file that names this process."""
    file = output_dir / LOCK_FILE
    owner, own = _read_owner(file), _this_process()
    if owner is not None and _may_be_alive(owner, own.job):
        raise _taken(output_dir, owner)
    write_atomically(file, own.model_dump_json())
    time.sleep(_SETTLED_AFTER_S)  # of two processes that start now, the last one to write stays
    if (owner := _read_owner(file)) != own:
        raise _taken(output_dir, owner)
    held.callback(try_to_remove, file.unlink)


def _may_be_alive(owner: _Owner, own_job: str | None) -> bool:
    if owner.host == socket.gethostname():
        return _is_running(owner.pid)
    # Another host may only have lost its connection. A job that was requeued has ended there.
    return own_job is None or owner.job != own_job


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _taken(output_dir: Path, owner: _Owner | None) -> ConfigError:
    who = "another process"
    way_out = "wait until it ends, or stop it"
    if owner is not None:
        who = f"process {owner.pid} on {owner.host}, started {owner.since},"
        if owner.host != socket.gethostname():
            way_out += f", or delete {output_dir / LOCK_FILE} if it is known to have ended"
    return ConfigError(
        f"[job] output_dir = {str(output_dir)!r}: {who} trains in this folder; {way_out}, or "
        "choose another output_dir"
    )


def _cannot_lock(output_dir: Path, error: OSError) -> ConfigError:
    file = output_dir / LOCK_FILE
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


def _this_process() -> _Owner:
    return _Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%F %T %z"),
        job=_job_from_launcher(),
    )


def _job_from_launcher() -> str | None:
    if slurm_job := os.environ.get("SLURM_JOB_ID"):
        return slurm_job
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if run_id in _SHARED_RUN_IDS else run_id


def _read_owner(file: Path) -> _Owner | None:
    try:
        return _Owner.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
