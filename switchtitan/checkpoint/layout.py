"""Names and files of a checkpoint folder.

    <output_dir>/checkpoints/step-000001000/
        metadata.json       format, step, run, versions, and every other file with its size and checksum
        tensors.json        every tensor: dtype, shape, and where its pieces lie
        __<rank>_0.distcp   the pieces that a rank wrote (torch.distributed.checkpoint)
        .metadata           tensors.json for torch's own tools; never read by us, since it is a pickle

While it is being written the folder is called `.step-000001000.partial`.
"""

import os
import re
from pathlib import Path

CHECKPOINTS_FOLDER = "checkpoints"
"""In a run's output folder."""
METADATA_FILE = "metadata.json"
TENSORS_FILE = "tensors.json"
DCP_METADATA_FILE = ".metadata"

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_OWN_FILE = re.compile(
    rf"__\d+_\d+\.distcp|{re.escape(DCP_METADATA_FILE)}(\.tmp)?|{TENSORS_FILE}|{METADATA_FILE}"
)


def step_folder_name(step: int) -> str:
    return f"step-{step:09d}"


def partial_folder_name(step: int) -> str:
    return f".{step_folder_name(step)}.partial"


def deleted_folder(path: Path) -> Path:
    """What a checkpoint's folder is called while it is being deleted."""
    return path.with_name(f".{path.name}.deleting")


def list_deleted_folders(folder: Path) -> list[Path]:
    """The folders in `folder` whose deletion was interrupted."""
    return sorted(folder.glob(".step-*.deleting"))


def step_of(path: Path) -> int | None:
    """The step in the name of a finished checkpoint's folder; None if `path` is not named like one."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    finished = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(finished, key=lambda path: step_of(path) or 0, reverse=True)


def foreign_files(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that saving does not write."""
    return sorted(
        path.name for path in folder.iterdir() if not _OWN_FILE.fullmatch(path.name) or not path.is_file()
    )


def remove_folder(folder: Path) -> None:
    """Deletes a folder that holds nothing but a checkpoint's own files.

    Raises:
        OSError: if it holds anything else; that stays.
    """
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable; a file's own fsync does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
