"""Write a folder that gets its name when it is complete."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from switchtitan.errors import CheckpointError, OutputError
from switchtitan.files import make_folder, sync_folder, sync_tree, try_lock

logger = logging.getLogger(__name__)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder `.NAME.partial`, which is renamed to `folder` if the block succeeds.

    All files are flushed to disk before. If the block fails, or is interrupted, nothing is left.
    What a killed process left is deleted by the next one that writes the same folder.

    Args:
        folder: absent or empty. Folders above it are created.

    Raises:
        CheckpointError: if the folder is not empty.
        OutputError: if it cannot be written, or another process is writing it.
    """
    with _explained_errors(folder):
        folder = Path(os.path.realpath(folder))
        with _parents(folder), _only_writer(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(
                    f"{folder} exists and is not empty; choose another folder or remove it first"
                )
            partial = folder.with_name(f".{folder.name}.partial")
            if os.path.lexists(partial):
                logger.warning("deleting the incomplete folder %s of a stopped process", partial)
                shutil.rmtree(partial)
            partial.mkdir()
            try:
                yield partial
                sync_tree(partial)
                partial.replace(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync_folder(folder.parent)


@contextmanager
def _explained_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} cannot be written ({error}); choose another folder, or free space on its "
            "disk"
        ) from error


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Creates the folders above `folder`, and removes them again if the block fails."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        make_folder(folder.parent)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds a lock, whose file is deleted at the end."""
    file = folder.with_name(f".{folder.name}.lock")
    with try_lock(file, key="--folder") as descriptor:
        if descriptor is None or not _is_at(file, descriptor):
            raise OutputError(
                f"{folder}: another process is writing this folder; wait for it, or choose another"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether the opened file still has its name: another process may have deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
