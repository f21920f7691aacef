"""Checkpoints with other metadata, as another version, another run or an attacker would write;
reading all of one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from switchtitan.checkpoint import SavedTensors
from switchtitan.checkpoint.metadata import file_record


def rewrite_metadata(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the contents of `metadata.json`, and updates its checksum.

    Formats before 3 have no checksum.
    """
    file = checkpoint / "metadata.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    if metadata["format_version"] < 3:
        (checkpoint / "metadata.json.sha256").unlink(missing_ok=True)
    else:
        update_checksum(checkpoint)


def update_checksum(checkpoint: Path) -> None:
    """Updates the checksum of `metadata.json`, whatever this file holds."""
    digest = hashlib.sha256((checkpoint / "metadata.json").read_bytes()).hexdigest()
    (checkpoint / "metadata.json.sha256").write_text(f"{digest}  metadata.json\n")


def update_file_records(checkpoint: Path) -> None:
    """Updates sizes and checksums of all files."""

    def update(metadata: dict[str, Any]) -> None:
        for name in metadata["files"]:
            metadata["files"][name] = file_record(checkpoint / name).model_dump()

    rewrite_metadata(checkpoint, update)


def read_tensors(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names start with `prefix`, see `SavedTensors`."""
    saved = SavedTensors(checkpoint, prefix)
    return saved.read(saved.on_meta)
