"""Checks the run's folder before any work: writable, and the same one on every rank."""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError

_VISIBLE_WITHIN_S = 10.0
"""Network file systems may show a new file late."""
_TRIES = 20
"""How often to look at a folder, or create it, before a failure is an error: another process may
delete a folder that it created between our look and our use."""
_TRY_AGAIN_S = 0.01


def check_output_dir(output_dir: Path, world: World) -> None:
    """Checks that every rank can write to the folder, and that it is the same one.

    The main rank writes an empty file, and deletes it and the folders that it has created.

    Raises:
        ConfigError: on every rank, if it cannot be created or written, or some ranks see another
            one.
    """
    name = world.broadcast(f".shared-{secrets.token_hex(8)}")
    with ExitStack() as created:

        def create() -> None:
            if world.is_main:
                check_writable(output_dir)
                _create(output_dir / name, created)

        # The other ranks do not look yet: network file systems remember what was missing.
        world.together(create)
        world.together(lambda: None if world.is_main else _check_shared(output_dir, name))


def check_writable(output_dir: Path) -> None:
    """Checks that the folder exists and can be written, or can be created.

    Raises:
        ConfigError: if not.
    """
    try:
        for _ in range(_TRIES):
            nearest, problem = _nearest_and_problem(output_dir)
            if problem is None:
                return
            time.sleep(_TRY_AGAIN_S)
    except OSError as error:  # a folder above it cannot be entered
        raise cannot_write(output_dir, error) from error
    raise ConfigError(
        f"[job] output_dir = {str(output_dir)!r}: expected a writable folder, but {nearest} is "
        f"{problem}; choose another"
    )


def _nearest_and_problem(folder: Path) -> tuple[Path, str | None]:
    """Returns the folder, or the nearest above it that exists, and why it cannot be written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return nearest, "a file"
    return nearest, None if os.access(nearest, os.W_OK) else "read-only"


def _check_shared(output_dir: Path, name: str) -> None:
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not (output_dir / name).exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"[job] output_dir = {str(output_dir)!r}: {output_dir.absolute()} is not the main "
                "rank's folder; put output_dir on a disk that all nodes share"
            )
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(output_dir)  # NFS clients then ask the server again
    check_writable(output_dir)


def _create(file: Path, created: ExitStack) -> None:
    """Creates an empty file and its folders; `created` deletes what was created.

    Raises:
        ConfigError: if that fails: permissions may allow what a disk or a server does not.
    """
    _retry_without_folder(file.parent, lambda: _create_file(file, created))


def _create_file(file: Path, created: ExitStack) -> None:
    _create_missing(file.parent, created)
    file.touch()
    created.callback(try_to_remove, file.unlink)


def create_folder(folder: Path, created: ExitStack) -> None:
    """Creates a folder and those above it; `created` deletes what was created, if it is empty.

    Raises:
        ConfigError: if that fails.
    """
    _retry_without_folder(folder, lambda: _create_missing(folder, created))


def _create_missing(folder: Path, created: ExitStack) -> None:
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(exist_ok=True)
            created.callback(try_to_remove, path.rmdir)


def _retry_without_folder(folder: Path, create: Callable[[], None]) -> None:
    """Calls `create`, again if another process deleted a folder meanwhile.

    Raises:
        ConfigError: if it fails otherwise, or that often.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            return create()
        except OSError as error:
            # mkdir: the folder existed, and no longer does when it asks whether it is one.
            may_be_deleted = isinstance(error, FileNotFoundError | FileExistsError)
            if not may_be_deleted or tries_left == 0:
                raise cannot_write(folder, error) from error
            time.sleep(_TRY_AGAIN_S)


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    """Returns what to raise if a file of the folder cannot be written."""
    return ConfigError(
        f"[job] output_dir = {str(folder)!r}: expected a writable folder, but writing there failed "
        f"({error}); choose another, or free space"
    )


def try_to_remove(remove: Callable[[], None]) -> None:
    """Calls `remove`, a path's `unlink` or `rmdir`; ignores every OSError."""
    with suppress(OSError):  # a folder that another process uses is not empty
        remove()
