"""Checks the run's folder before any work: writable, and the same one on every rank."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError

_VISIBLE_WITHIN_S = 10.0
"""Network file systems may show a new file late."""


def check_output_dir(output_dir: Path, world: World) -> None:
    """Checks that every rank can write to the folder, and that it is the same one. Creates nothing.

    Raises:
        ConfigError: on every rank, if it cannot be created or written, or some ranks see another
            one.
    """
    # The other ranks do not look yet: network file systems remember what was missing.
    world.together(lambda: check_writable(output_dir) if world.is_main else None)
    if world.size == 1:
        return
    name = world.broadcast(f".shared-{secrets.token_hex(8)}")
    with _created(output_dir / name) if world.is_main else nullcontext():
        world.together(lambda: None if world.is_main else _check_shared(output_dir, name))


def check_writable(output_dir: Path) -> None:
    """Checks that the folder exists and can be written, or can be created.

    Raises:
        ConfigError: if not.
    """
    nearest = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"[job] output_dir = {str(output_dir)!r}: expected a writable folder, but {nearest} is "
            f"{'read-only' if nearest.is_dir() else 'a file'}; choose another"
        )


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


@contextmanager
def _created(file: Path) -> Iterator[None]:
    """Creates an empty file and its folders; deletes what it has created at the end."""
    created = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        yield
    finally:
        file.unlink()
        for folder in created:
            with suppress(OSError):  # another process uses it now
                folder.rmdir()
