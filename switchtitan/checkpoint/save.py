"""Write one checkpoint: to a partial folder, verified, then renamed.

The order survives a power failure at any time: every file is flushed to disk, then the partial
folder, which holds their names, then it is renamed, then the folder above is flushed.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from switchtitan.checkpoint.agreement import run_together
from switchtitan.checkpoint.layout import (
    list_deleted_folders,
    list_partial_folders,
    partial_folder_name,
    remove_folder,
    step_folder_name,
)
from switchtitan.checkpoint.metadata import (
    CheckpointMetadata,
    FileRecord,
    file_record,
    read_tensors_index,
    write_metadata,
)
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents, check_files
from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import format_bytes, make_folder, sync_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Save:
    """A checkpoint to write."""

    folder: Path
    """The run's folder of checkpoints."""
    metadata: CheckpointMetadata
    """All of it but `files`."""
    names: frozenset[str]
    """The names of all tensors."""
    num_bytes: int
    """An estimate of its size."""
    started_at: float
    """By the monotonic clock."""

    @property
    def step(self) -> int:
        return self.metadata.step

    @property
    def final(self) -> Path:
        return self.folder / step_folder_name(self.step)

    @property
    def partial(self) -> Path:
        return self.folder / partial_folder_name(self.step)


def prepare_save(save: Save, is_main: bool, group: dist.ProcessGroup | None) -> None:
    """Makes the partial folder.

    Raises:
        CheckpointError: on every rank, if that fails, there is too little space, or the folder
            holds a complete checkpoint of this step.
    """
    with _cleaned_up_after_failure(save, is_main, group):
        run_together(lambda: _make_partial_folder(save) if is_main else None, group)


def complete_save(
    save: Save, tensors: Mapping[str, Tensor], is_main: bool, group: dist.ProcessGroup | None
) -> int:
    """Writes, verifies and renames; returns the checkpoint's bytes on disk.

    Args:
        tensors: this rank's share.

    Raises:
        CheckpointError: on every rank, if it failed on any. What was written is deleted.
    """
    with _cleaned_up_after_failure(save, is_main, group):
        written = run_together(lambda: _write_and_read_back(save, tensors, group), group)
        files = {name: record for files in written for name, record in files.items()}
        run_together(lambda: _seal(save, files) if is_main else None, group)
    return sum(record.num_bytes for record in files.values())


def _make_partial_folder(save: Save) -> None:
    make_folder(save.folder)
    remove_leftovers(save.folder)
    if save.partial.exists():
        raise CheckpointError(f"{save.partial} is not empty; move its files away")
    if save.final.exists():
        _set_aside(save.final)
    if save.num_bytes > shutil.disk_usage(save.folder).free:
        raise CheckpointError("there is too little space")
    save.partial.mkdir()


def _write_and_read_back(
    save: Save, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, FileRecord]:
    writer = ChecksummingWriter(save.partial)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    for name, record in writer.written.items():
        # `sync_file` dropped the file from the page cache, so this reads what the disk holds.
        if file_record(save.partial / name) != record:
            raise CheckpointError(
                f"{save.partial / name} differs from what was written when read back"
            )
    return writer.written


def _seal(save: Save, files: dict[str, FileRecord]) -> None:
    saved_names = read_tensors_index(save.partial).tensors.keys()
    if saved_names != save.names:
        raise CheckpointError(
            f"the index and the saved tensors differ in {sorted(saved_names ^ save.names)[:4]}"
        )
    write_metadata(save.partial, save.metadata.model_copy(update={"files": files}))
    check_files(save.partial)
    sync_folder(save.partial)
    save.partial.rename(save.final)
    try:
        sync_folder(save.folder)
    except OSError as error:
        raise CheckpointError(
            f"{save.final} is complete, but may not survive a power failure: its name could not be "
            f"flushed to disk ({error})"
        ) from error
    logger.info(
        "saved %s (%s in %.1f s)",
        save.final,
        format_bytes(sum(record.num_bytes for record in files.values())),
        time.monotonic() - save.started_at,
    )


@contextmanager
def _cleaned_up_after_failure(
    save: Save, is_main: bool, group: dist.ProcessGroup | None
) -> Iterator[None]:
    """Deletes the partial folder after an error of all ranks, and adds sizes to its message."""
    try:
        yield
    except CheckpointError as error:
        (consequence, *_) = run_together(lambda: _clean_up(save) if is_main else "", group)
        raise CheckpointError(
            f"cannot save step {save.step} to {save.folder}: {error}. {consequence}"
        ) from error


def _clean_up(save: Save) -> str:
    """Deletes the partial folder; returns what to know about the failed save."""
    sizes = f"A checkpoint takes about {format_bytes(save.num_bytes)}"
    with suppress(OSError):
        free = shutil.disk_usage(save.folder).free
        sizes += f", {format_bytes(free)} are free"
        if free < save.num_bytes:
            sizes += "; free space, or lower [checkpoint] keep_latest"
    try:
        if save.partial.exists():
            remove_folder(save.partial)
    except OSError as error:
        sizes += f". The next save deletes {save.partial.name}, which cannot be deleted ({error})"
    return f"{sizes}. Older checkpoints are untouched"


def remove_leftovers(folder: Path) -> None:
    """Deletes partial folders of failed saves, and finishes interrupted deletions.

    Logs a warning for what cannot be deleted.
    """
    for leftover in (*list_partial_folders(folder), *list_deleted_folders(folder)):
        try:
            remove_folder(leftover)
        except OSError as error:
            logger.warning("could not delete what is left of a checkpoint: %s", error)


def _set_aside(path: Path) -> None:
    """Renames an incomplete folder that has the name of a new checkpoint.

    Raises:
        CheckpointError: if it is complete, or has a format that this version does not read.
    """
    try:
        # As thorough as the search on resume: a checkpoint skipped there must not block a save
        # here.
        check_contents(path)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        logger.warning("renaming %s to %s, since it is not complete: %s", path, aside.name, error)
        path.rename(aside)
        return
    raise CheckpointError(f"{path} already exists and is complete; it is not overwritten")
