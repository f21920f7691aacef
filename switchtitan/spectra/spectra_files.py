"""Measured spectra on disk: one file per measurement, with the singular values by layer."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from switchtitan.errors import CheckpointError
from switchtitan.files import make_folder, write_atomically

SPECTRA_FOLDER = "spectra"

_FILE = re.compile(r"step-(\d{9,})\.safetensors")


def write_spectra(folder: Path, step: int, spectra: Mapping[str, Tensor]) -> Path:
    """Writes one measurement atomically; replaces an earlier one of the same step."""
    make_folder(folder)
    file = folder / f"step-{step:09d}.safetensors"
    write_atomically(file, save(dict(spectra), metadata={"step": str(step)}))
    return file


def read_spectra(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Returns all measurements in `folder` by step, in order; none if there is no such folder.

    Raises:
        CheckpointError: if a file is damaged.
    """
    return {step: _read(file) for step, file in _measurements(folder)}


def drop_spectra_after(folder: Path, step: int) -> None:
    """Deletes the measurements after `step`, left by a run that now resumes from `step`."""
    for measured, file in _measurements(folder):
        if measured > step:
            file.unlink()


def _measurements(folder: Path) -> list[tuple[int, Path]]:
    files = folder.iterdir() if folder.is_dir() else []
    return sorted(
        (int(match.group(1)), file) for file in files if (match := _FILE.fullmatch(file.name))
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete it") from error
