"""One process at a time trains in a run's folder."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.training.output_folder import check_writable, create_folder

LOCK_FILE = "run.lock"
"""In a run's folder while the run trains; names the process."""
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without locks."""
_SETTLED_AFTER_S = 1.0


class _Owner(BaseModel):
    """The contents of the file."""

    host: str
    pid: int
    since: str
    """Local time of the start."""


@contextmanager
def lock_output_dir(output_dir: Path, world: World) -> Iterator[None]:
    """Keeps every other process from training in the folder, until the context ends.

    The main rank holds a POSIX lock, which ends with its process and is not inherited by workers.
    On a file system without locks it writes a file that names the process.

    Raises:
        ConfigError: on every rank, if another process trains there, or the folder cannot be
            written.
    """
    with ExitStack() as held:

        def hold() -> None:
            if world.is_main:
                check_writable(output_dir)
                _hold(output_dir, held)

        world.together(hold)
        yield


def _hold(output_dir: Path, held: ExitStack) -> None:
    file = output_dir / LOCK_FILE
    while True:
        create_folder(output_dir, held)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has deleted a folder that it created
        held.callback(os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _taken(output_dir, _read_owner(file)) from error
            if error.errno in _WITHOUT_LOCKS:
                _hold_without_locks(output_dir, held)
                return
            raise
        if _is_named(descriptor, file):
            break
    # While locked: afterwards another process may own the file of this name.
    held.callback(_remove, file)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _this_process().model_dump_json().encode(), 0)
    os.fsync(descriptor)


def _is_named(descriptor: int, file: Path) -> bool:
    """Whether the open file still has its name: the former owner deletes it at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _hold_without_locks(output_dir: Path, held: ExitStack) -> None:
    """Owns the folder by a file that names this process."""
    file = output_dir / LOCK_FILE
    owner = _read_owner(file)
    if owner is not None and _may_be_alive(owner):
        raise _taken(output_dir, owner)
    own = _this_process()
    write_atomically(file, own.model_dump_json())
    time.sleep(_SETTLED_AFTER_S)  # of two processes that start now, the last one to write stays
    if (owner := _read_owner(file)) != own:
        raise _taken(output_dir, owner)
    held.callback(_remove, file)


def _may_be_alive(owner: _Owner) -> bool:
    # Another host may only have lost its connection: its lock is never taken over.
    return owner.host != socket.gethostname() or _is_running(owner.pid)


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


def _this_process() -> _Owner:
    return _Owner(host=socket.gethostname(), pid=os.getpid(), since=time.strftime("%F %T %z"))


def _read_owner(file: Path) -> _Owner | None:
    try:
        return _Owner.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
