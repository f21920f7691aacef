"""Foretell whether the disk has room for the next checkpoints."""

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from switchtitan.checkpoint.config import STOP, CheckpointConfig
from switchtitan.checkpoint.layout import list_step_folders
from switchtitan.errors import CheckpointError
from switchtitan.files import format_bytes

logger = logging.getLogger(__name__)

_BYTES_PER_PIECE = 2048
"""What `torch.save` adds to each piece of a tensor, and the piece's line in the two indices."""


def estimate_bytes(tensors: Iterable[Tensor], num_ranks: int) -> int:
    """Returns the size of a checkpoint of `tensors`, of which each rank may save a piece."""
    return sum(
        math.prod(tensor.shape) * tensor.itemsize + num_ranks * _BYTES_PER_PIECE
        for tensor in tensors
    )


def num_additional_checkpoints(num_present: int, num_saves: int, keep_latest: int) -> int:
    """Returns how many checkpoints need room in addition to those present, at the time of the most.

    Args:
        num_present: checkpoints in the folder that pruning counts.
        num_saves: saves to come, at least one.
        keep_latest: 0 keeps all.
    """
    if keep_latest == 0:
        return num_saves
    # The oldest is deleted after the new one is complete.
    return max(1, min(num_present + num_saves, keep_latest + 1) - num_present)


def check_room(folder: Path, config: CheckpointConfig, num_bytes: int, num_saves: int) -> None:
    """Compares the checkpoints to come with the free space; logs a warning if some will not fit.

    Args:
        folder: the run's checkpoints; need not exist.
        num_bytes: the size of a checkpoint.
        num_saves: saves to come.

    Raises:
        CheckpointError: if no checkpoint fits and `config.on_failure` is "stop".
    """
    if num_saves == 0:
        return
    free = free_bytes(folder)
    num_more = num_additional_checkpoints(
        len(list_step_folders(folder)), num_saves, config.keep_latest
    )
    if num_bytes > free:
        problem = (
            f"a checkpoint takes about {format_bytes(num_bytes)}, but {format_bytes(free)} are "
            f"free for {folder}; free space, or choose another [job] output_dir"
        )
        if config.on_failure == STOP:
            raise CheckpointError(problem)
        logger.warning("%s", problem)
    elif num_more * num_bytes > free:
        kept = "all checkpoints" if config.keep_latest == 0 else f"{config.keep_latest} checkpoints"
        logger.warning(
            "keeping %s ([checkpoint] keep_latest = %d) needs about %s more while the last one is "
            "written, but %s are free for %s: saves will fail; free space, or change keep_latest "
            "or interval",
            kept,
            config.keep_latest,
            format_bytes(num_more * num_bytes),
            format_bytes(free),
            folder,
        )


def warn_if_next_does_not_fit(folder: Path, num_bytes: int) -> None:
    """Logs a warning if there is no room for another checkpoint of `num_bytes`."""
    free = free_bytes(folder)
    if num_bytes > free:
        logger.warning(
            "the next checkpoint will not fit: it takes about %s, but %s are free for %s; free "
            "space, or lower [checkpoint] keep_latest",
            format_bytes(num_bytes),
            format_bytes(free),
            folder,
        )


def free_bytes(folder: Path) -> int:
    """Returns the free space of the disk of `folder`, which need not exist."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free
