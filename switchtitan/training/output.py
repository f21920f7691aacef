"""The folder of a run: of one process at a time, the same on every rank; its log and configuration
files."""

import atexit
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from switchtitan.checkpoint.save import join_writers
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError, OutputError
from switchtitan.files import write_atomically
from switchtitan.observability.log import configure_logging

LOCK_FILE, OWNER_FILE = "run.lock", "run.owner"
"""In a run's folder: what is locked while the run trains, and the name of its process."""
CONFIG_FILE = "config.toml"
"""File in a run's folder with its newest configuration. Each checkpoint has the one it was saved
with."""
_ENDS_WITHIN_S, _WRITER_ENDS_WITHIN_S = 10.0, 1.0
"""After a kill: workers of the process, as a network file system sees it. After a save: its
thread."""
_VISIBLE_WITHIN_S, _POLL_S = 10.0, 0.2
"""Network file systems may show a new file late."""


@contextmanager
def lock_output_dir(output_dir: Path, world: World) -> Iterator[None]:
    """Creates the folder, and keeps every other process from training there; collective. Raises a
    ConfigError on every rank if another process trains there, the folder cannot be written, or some
    ranks see another one.

    The lock ends with the main rank's process. After an error, a background save may continue until
    then, and keeps the lock. A folder that was created is removed if nothing was written there.
    """
    lock = FileLock(output_dir / LOCK_FILE)
    owner_file = output_dir / OWNER_FILE
    created: list[Path] = []
    key = f"[job] output_dir = {str(output_dir)!r}"

    def acquire() -> str:
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}"
        try:
            created.extend(p for p in (output_dir, *output_dir.parents) if not p.exists())
            output_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_ENDS_WITHIN_S)
            owner_file.write_text(owner, encoding="utf-8")
        except Timeout as error:
            raise ConfigError(
                f"{key}: {_read(owner_file) or 'another process'}, trains in this folder; wait "
                "until it ends, or stop it, or choose another output_dir"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{key}: expected a writable folder, but writing there failed ({error}); choose "
                "another, or free space"
            ) from error
        return owner

    try:
        owner = world.on_main(acquire)
        world.together(lambda: _check_shared(owner_file, owner))
        yield
    finally:
        if not lock.is_locked or join_writers(_WRITER_ENDS_WITHIN_S):
            _release(lock, owner_file, created)
        else:
            # The interpreter joins threads before it calls this.
            atexit.register(_release, lock, owner_file, created)


def _release(lock: FileLock, owner_file: Path, created: list[Path]) -> None:
    """Releases the lock if it is held; removes its files, and folders in which nothing else is."""
    if lock.is_locked:
        with suppress(OSError):
            owner_file.unlink()
            Path(lock.lock_file).unlink()  # filelock notices it, and tries again
            for folder in created:
                folder.rmdir()
        lock.release()


def _check_shared(owner_file: Path, owner: str) -> None:
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while _read(owner_file) != owner:
        if time.monotonic() > deadline:
            folder = owner_file.parent
            raise ConfigError(
                f"[job] output_dir = {str(folder)!r}: {folder.absolute()} is not the main rank's "
                "folder; put output_dir on a disk that all nodes share"
            )
        time.sleep(_POLL_S)
        with suppress(OSError):
            os.listdir(owner_file.parent)  # NFS clients then ask the server again


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def start_output(output_dir: Path, resolved: str, world: World, step: int, num_steps: int) -> None:
    """Opens the run's log file; writes its configuration if steps are left after step `step`.
    Raises an OutputError on every rank if that fails."""

    def start() -> None:
        try:
            configure_logging(is_main=True, log_file=output_dir / "train.log")
            if step < num_steps:
                write_atomically(output_dir / CONFIG_FILE, resolved)
        except OSError as error:
            raise OutputError(
                f"[job] output_dir = {str(output_dir)!r}: cannot be written ({error}); free space, "
                "or choose another"
            ) from error

    world.on_main(start)
