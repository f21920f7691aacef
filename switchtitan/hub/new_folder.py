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
    missing: list[Path] = []
    try:
        folder = Path(os.path.realpath(folder))
        missing = [parent for parent in folder.parents if not parent.exists()]
        make_folder(folder.parent)
        with _only_writer(folder):
            partial = _empty_partial(folder)
            try:
                yield partial
                sync_tree(partial)
                partial.replace(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync_folder(folder.parent)
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise OutputError(
                f"{folder} cannot be written ({error}); choose another folder, or free space on "
                "its disk"
            ) from error
        raise


def _empty_partial(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not empty; choose another folder or remove it first"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    if os.path.lexists(partial):
        logger.warning("deleting the incomplete folder %s of a stopped process", partial)
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds a lock, whose file is deleted at the end."""
    file = folder.with_name(f".{folder.name}.lock")
    with try_lock(file, key="--folder") as descriptor:
        # A process that ended may have deleted the file that this one has opened.
        is_held = descriptor is not None and os.fstat(descriptor).st_nlink > 0
        if not is_held:
            raise OutputError(
                f"{folder}: another process is writing this folder; wait for it, or choose another"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()
