"""A checkpoint's folder and the names of its files.

    <output_dir>/checkpoints/step-000001000/
        metadata.json           format, step, run, versions; size and checksum of the files below
        metadata.json.sha256    the checksum of metadata.json, as `sha256sum` writes it
        tensors.json            every tensor: dtype, shape, and the location of its pieces
        __<rank>_0.distcp       the pieces written by a rank (torch.distributed.checkpoint)
        .metadata               tensors.json for torch's tools; a pickle, so never read here

The folder is named `.step-000001000.partial` until it is complete.
"""

import re
from pathlib import Path

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of checkpoints in a run's output folder."""
METADATA_FILE = "metadata.json"
METADATA_CHECKSUM_FILE = f"{METADATA_FILE}.sha256"
TENSORS_FILE = "tensors.json"
DCP_METADATA_FILE = ".metadata"

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_OWN_FILE = re.compile(
    rf"__\d+_\d+\.distcp|{re.escape(DCP_METADATA_FILE)}(\.tmp)?|{TENSORS_FILE}|{METADATA_FILE}(\.sha256)?"
)


def step_folder_name(step: int) -> str:
    return f"step-{step:09d}"


def partial_folder_name(step: int) -> str:
    return f".{step_folder_name(step)}.partial"


def list_partial_folders(folder: Path) -> list[Path]:
    """The folders in `folder` of saves that did not complete."""
    return sorted(folder.glob(".step-*.partial"))


def deleted_folder(path: Path) -> Path:
    """The name of a checkpoint's folder during deletion."""
    return path.with_name(f".{path.name}.deleting")


def list_deleted_folders(folder: Path) -> list[Path]:
    """The folders in `folder` whose deletion was interrupted."""
    return sorted(folder.glob(".step-*.deleting"))


def step_of(path: Path) -> int | None:
    """The step in the name of a finished checkpoint's folder; None if `path` is not named like
    one."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    finished = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(finished, key=lambda path: step_of(path) or 0, reverse=True)


def foreign_files(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that `Checkpointer` does not write."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not _OWN_FILE.fullmatch(path.name) or not path.is_file()
    )


def remove_folder(folder: Path) -> None:
    """Deletes a folder that holds nothing but a checkpoint's own files.

    Raises:
        OSError: if it holds other files, which are not deleted.
    """
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()
    folder.rmdir()
