"""Which checkpoint a run resumes from, whether it may write to its folder, and which checkpoints newer ones replace."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from switchtitan.checkpoint.config import RESUME_AUTO, RESUME_NEVER, CheckpointConfig
from switchtitan.checkpoint.layout import (
    CHECKPOINTS_FOLDER,
    METADATA_FILE,
    check_contents,
    check_files,
    deleted_folder,
    foreign_files,
    list_deleted_folders,
    list_step_folders,
    remove_folder,
    step_of,
    sync_folder,
)
from switchtitan.errors import CheckpointError

logger = logging.getLogger(__name__)


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None; logs which it is and why newer ones were
    skipped.

    Reads the candidates' files to compare checksums.
    """
    for path in list_step_folders(folder):
        try:
            check_contents(path)
        except CheckpointError as error:
            logger.warning("skipping a checkpoint that is not complete: %s", error)
            continue
        logger.info("the newest complete checkpoint is %s", path)
        return path
    return None


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Returns the checkpoint that `resume` (see `CheckpointConfig.resume`) stands for; None means a new run.

    Args:
        folder: where the run keeps its own checkpoints.

    Raises:
        CheckpointError: if `resume` is a path without a complete checkpoint, or "auto" and there are only
            corrupted ones.
    """
    if resume == RESUME_NEVER:
        return None
    if resume == RESUME_AUTO:
        latest = find_latest(folder)
        if latest is None and (damaged := list_step_folders(folder)):
            raise CheckpointError(
                f"[checkpoint] resume = {resume!r}: none of the {len(damaged)} checkpoints in {folder} "
                "is complete (the warnings above say why); move that folder away to start from scratch"
            )
        return latest
    return find_given(Path(resume))


def find_given(path: Path) -> Path:
    """Returns the complete checkpoint that a user's path means: itself, or the newest of the run or folder at
    `path`.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / METADATA_FILE).is_file():
        check_contents(path)
        return path
    for folder in (path, path / CHECKPOINTS_FOLDER):
        if latest := find_latest(folder):
            return latest
    raise CheckpointError(
        f"no complete checkpoint at {path}: expected a folder step-000001000 with {METADATA_FILE} in it, "
        "a folder of such folders, or a run's output folder"
    )


def check_given_paths(folder: Path, config: CheckpointConfig) -> None:
    """Refuses a path that leads nowhere, at no cost: for a run to call before it does any work.

    Args:
        folder: where the run keeps its own checkpoints; if there are some, initial weights are not read.

    Raises:
        CheckpointError: if there is nothing at `config.resume` or `config.initial_weights` where one of them will be read.
    """
    resume, weights = config.resume, config.initial_weights
    if resume not in (RESUME_AUTO, RESUME_NEVER) and not Path(resume).exists():
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: no such folder; expected a checkpoint, or the output folder of a run"
        )
    if weights is not None and not Path(weights).exists() and not list_step_folders(folder):
        raise CheckpointError(
            f"[checkpoint] initial_weights = {weights!r}: no such file or folder; expected a safetensors file, a folder in "
            "Hugging Face's layout or a checkpoint"
        )


def check_output_folder(folder: Path, resume: str) -> None:
    """Refuses a folder of checkpoints that the run would mix its own into.

    Args:
        folder: where the run keeps its own checkpoints; need not exist.
        resume: see `CheckpointConfig.resume`.

    Raises:
        CheckpointError: says which checkpoints are in the way and what to do.
    """
    present = list_step_folders(folder)
    if not present or resume == RESUME_AUTO:
        return
    newest = present[0]
    fix = f"use another [job] output_dir, or move {folder} away"
    if resume == RESUME_NEVER:
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} already holds {len(present)} checkpoints, "
            f'the newest is {newest.name}; {fix}, or set resume = "auto" to resume from there'
        )
    given = Path(resume).resolve()
    if given in (folder.resolve(), folder.resolve().parent):
        return
    if given.parent != folder.resolve():
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r} lies elsewhere, but {folder} already holds "
            f'{len(present)} checkpoints; set resume = "auto" to resume from the newest of them, {fix}'
        )
    step, newest_step = step_of(given), step_of(newest)
    if step is not None and newest_step is not None and newest_step > step:
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} holds {newest.name}, which is newer and would "
            f"be mixed up with the new run's; {fix}, or move the newer ones away"
        )


def prune(
    folder: Path,
    newest: Path,
    keep_latest: int,
    is_own_identity: Callable[[Mapping[str, object]], bool],
) -> list[Path]:
    """Deletes this run's complete checkpoints older than `newest` but the last `keep_latest`; returns them.

    Damaged ones, other runs', and those that hold files which saving does not write stay where they are and
    do not count.

    Args:
        newest: a complete checkpoint in `folder`; it counts as kept.
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
        logger.warning("not deleting a checkpoint that is not complete: %s", error)
        return False
    if foreign := foreign_files(path):
        logger.warning(
            "Not deleting %s: it holds files that saving does not write: %s",
            path,
            ", ".join(foreign),
        )
        return False
    return is_own_identity(metadata.identity)
