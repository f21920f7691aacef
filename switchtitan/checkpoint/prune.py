"""Deleting checkpoints that newer ones replace."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from switchtitan.checkpoint.layout import (
    deleted_folder,
    foreign_files,
    list_deleted_folders,
    list_step_folders,
    remove_folder,
    step_of,
    sync_folder,
)
from switchtitan.checkpoint.verify import check_files
from switchtitan.errors import CheckpointError

logger = logging.getLogger(__name__)


def prune(
    folder: Path, newest: Path, keep_latest: int, is_own_identity: Callable[[Mapping[str, object]], bool]
) -> list[Path]:
    """Deletes this run's whole checkpoints older than `newest` but the last `keep_latest`; returns them.

    Damaged ones, other runs', and those that hold files which saving does not write stay where they are and
    do not count.

    Args:
        newest: a whole checkpoint in `folder`; it counts as kept.
        keep_latest: 0 keeps all.
        is_own_identity: whether a checkpoint with such an identity is this run's.
    """
    if keep_latest == 0:
        return []
    newest_step = step_of(newest)
    assert newest_step is not None
    older = [path for path in list_step_folders(folder) if (step_of(path) or 0) < newest_step]
    removable = [path for path in older if _is_own(path, is_own_identity)]
    pruned = removable[keep_latest - 1 :]
    for path in pruned:
        # Renamed first, so that an interrupted deletion leaves nothing that looks like a checkpoint.
        remove_folder(path.rename(deleted_folder(path)))
        logger.debug("Deleted the older checkpoint %s", path)
    sync_folder(folder)
    return pruned


def complete_deletions(folder: Path) -> None:
    """Deletes what is left of checkpoints whose deletion was interrupted; what cannot be deleted stays, with a warning."""
    for half_deleted in list_deleted_folders(folder):
        try:
            remove_folder(half_deleted)
        except OSError as error:
            logger.warning("Could not delete what is left of an older checkpoint: %s", error)


def _is_own(path: Path, is_own_identity: Callable[[Mapping[str, object]], bool]) -> bool:
    try:
        metadata = check_files(path)
    except CheckpointError as error:
        logger.warning("Not deleting a checkpoint that is not whole: %s", error)
        return False
    if foreign := foreign_files(path):
        logger.warning(
            "Not deleting %s: it holds files that saving does not write: %s", path, ", ".join(foreign)
        )
        return False
    return is_own_identity(metadata.identity)
