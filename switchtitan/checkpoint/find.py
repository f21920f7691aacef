"""Find the checkpoint to resume from, check that it fits the run and its folder, prune old ones."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from switchtitan.checkpoint.config import RESUME_AUTO, RESUME_NEVER, CheckpointConfig
from switchtitan.checkpoint.layout import (
    CHECKPOINTS_FOLDER,
    METADATA_FILE,
    deleted_folder,
    foreign_files,
    list_step_folders,
    remove_folder,
    step_of,
)
from switchtitan.checkpoint.verify import check_contents, check_files
from switchtitan.config.toml_text import flatten
from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import exists, sync_folder

logger = logging.getLogger(__name__)


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None. Verifies checksums.

    Logs its path, and why newer checkpoints were skipped.

    Raises:
        CheckpointFormatError: if this version does not read the newest checkpoint's format.
    """
    for path in list_step_folders(folder):
        if _is_complete(path):
            logger.info("the newest complete checkpoint is %s", path)
            return path
    return None


def _is_complete(path: Path) -> bool:
    try:
        check_contents(path)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        logger.warning("skipping an incomplete checkpoint: %s", error)
        return False
    return True


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Returns the checkpoint for `resume` (see `CheckpointConfig.resume`); None means a new run.

    Args:
        folder: the run's own checkpoints.

    Raises:
        CheckpointError: if `resume` is a path without a complete checkpoint, or "auto" and all
            checkpoints are damaged.
    """
    if resume == RESUME_NEVER:
        return None
    if resume == RESUME_AUTO:
        latest = find_latest(folder)
        if latest is None and (damaged := list_step_folders(folder)):
            raise CheckpointError(
                f"[checkpoint] resume = {resume!r}: none of the {len(damaged)} checkpoints in "
                f"{folder} is complete (see the warnings above); move that folder away to start "
                "from scratch"
            )
        return latest
    return find_given(Path(resume))


def find_given(path: Path) -> Path:
    """Returns the complete checkpoint at `path`, or the newest one of the run or folder at `path`.

    Raises:
        CheckpointFormatError: if this version does not read its format.
        CheckpointError: if there is none.
    """
    if (path / METADATA_FILE).is_file():
        check_contents(path)
        return path
    for folder in (path, path / CHECKPOINTS_FOLDER):
        if latest := find_latest(folder):
            return latest
    raise CheckpointError(
        f"no complete checkpoint at {path}: expected a folder step-000001000 with {METADATA_FILE}, "
        "a folder of such folders, or a run's output folder"
    )


def find_all(path: Path) -> list[Path]:
    """Returns all complete checkpoints of the run or folder at `path`, oldest first, or the one at
    `path`. Verifies checksums; logs which incomplete ones were skipped.

    Raises:
        CheckpointFormatError: if this version does not read the format of one.
        CheckpointError: if there is none.
    """
    if not (path / METADATA_FILE).is_file():
        for folder in (path, path / CHECKPOINTS_FOLDER):
            complete = [found for found in list_step_folders(folder) if _is_complete(found)]
            if complete:
                return complete[::-1]
    return [find_given(path)]


def check_given_paths(folder: Path, config: CheckpointConfig) -> None:
    """Checks that the given paths exist; cheap enough to call before any work.

    Args:
        folder: the run's own checkpoints; if there are any, initial weights are not read.

    Raises:
        CheckpointError: if `config.resume` or `config.initial_weights` will be read and does not
            exist.
    """
    resume, weights = config.resume, config.initial_weights
    if resume not in (RESUME_AUTO, RESUME_NEVER) and not exists(Path(resume)):
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: no such folder; expected a checkpoint, or the "
            "output folder of a run"
        )
    if weights is not None and not exists(Path(weights)) and not list_step_folders(folder):
        raise CheckpointError(
            f"[checkpoint] initial_weights = {weights!r}: no such file or folder; expected a "
            "safetensors file, a folder in Hugging Face's layout, an adapter's folder or a "
            "checkpoint"
        )


def check_output_folder(folder: Path, resume: str) -> None:
    """Checks that the run would not mix its checkpoints with those of another.

    Args:
        folder: the run's own checkpoints; need not exist.
        resume: see `CheckpointConfig.resume`.

    Raises:
        CheckpointError: names the conflicting checkpoints and the fix.
    """
    present = list_step_folders(folder)
    if not present or resume == RESUME_AUTO:
        return
    newest = present[0]
    fix = f"use another [job] output_dir, or move {folder} away"
    if resume == RESUME_NEVER:
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} already holds {len(present)} checkpoints, "
            f"the newest is {newest.name}; {fix}, or set resume = 'auto' to resume from it"
        )
    given = Path(resume).resolve()
    if given in (folder.resolve(), folder.resolve().parent):
        return
    if given.parent != folder.resolve():
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: is outside {folder}, which already holds "
            f"{len(present)} checkpoints; set resume = 'auto' to resume from the newest of them, "
            f"or {fix}"
        )
    step, newest_step = step_of(given), step_of(newest)
    if step is not None and newest_step is not None and newest_step > step:
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} holds the newer {newest.name}, which "
            f"would mix with the new run's checkpoints; {fix}, or move the newer ones away"
        )


def prune(
    folder: Path,
    newest: Path,
    keep_latest: int,
    is_own_identity: Callable[[Mapping[str, object]], bool],
) -> list[Path]:
    """Deletes all but the newest `keep_latest` of this run's complete checkpoints; returns the
    deleted ones.

    Only checkpoints older than `newest` are deleted. Damaged ones, those of other runs, and those
    with foreign files are neither deleted nor counted.

    Args:
        newest: a complete checkpoint in `folder`; it is kept and counted.
        keep_latest: 0 keeps all.
        is_own_identity: whether a checkpoint's identity is this run's.
    """
    if keep_latest == 0:
        return []
    newest_step = step_of(newest)
    assert newest_step is not None
    older = [path for path in list_step_folders(folder) if (step_of(path) or 0) < newest_step]
    removable = [path for path in older if _is_own(path, is_own_identity)]
    pruned = removable[keep_latest - 1 :]
    for path in pruned:
        # Renamed first, so that an interrupted deletion leaves nothing that looks like a
        # checkpoint.
        remove_folder(path.rename(deleted_folder(path)))
        logger.debug("deleted the older checkpoint %s", path)
    sync_folder(folder)
    return pruned


def _is_own(path: Path, is_own_identity: Callable[[Mapping[str, object]], bool]) -> bool:
    try:
        metadata = check_files(path)
    except CheckpointFormatError as error:
        logger.warning("not deleting a checkpoint of another format: %s", error)
        return False
    except CheckpointError as error:
        logger.warning("not deleting an incomplete checkpoint: %s", error)
        return False
    if foreign := foreign_files(path):
        logger.warning(
            "not deleting %s, since it holds foreign files: %s",
            path,
            ", ".join(foreign),
        )
        return False
    return is_own_identity(metadata.identity)


_ABSENT = "(absent)"


def check_same_run(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Compares two identities, nested mappings of plain values.

    Raises:
        CheckpointError: names every differing key by its dotted path, with both values and the fix.
    """
    before, now = flatten(saved), flatten(current)
    keys = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if not keys:
        return
    differences = "\n".join(
        f"  {key}: saved with {before.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in keys
    )
    raise CheckpointError(
        f"the checkpoint belongs to another run:\n{differences}\n"
        "set these back to resume that run, or start a new one in another [job] output_dir"
    )
