"""Checkpoints with other contents, as another version, another run or an attacker would write;
writers that fail."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from torch import Tensor

from switchtitan.checkpoint import SavedTensors
from switchtitan.checkpoint.metadata import file_record
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.errors import CheckpointError, UserError


@contextmanager
def refused(*parts: str, error: type[UserError] = CheckpointError) -> Iterator[None]:
    """The block raises an error whose message has all `parts`."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert all(part in message for part in parts), (parts, message)


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


def change_index(checkpoint: Path, index: dict[str, Any]) -> None:
    """Replaces `tensors.json`, and updates sizes and checksums."""
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    update_file_records(checkpoint)


def read_tensors(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names start with `prefix`, see `SavedTensors`."""
    saved = SavedTensors(checkpoint, prefix)
    return saved.read(saved.on_meta)


def writes_fail(number: int, monkeypatch: pytest.MonkeyPatch, saves: tuple = ()) -> None:
    """The writes of some saves fail with an errno.

    Args:
        saves: counted from 1; all without any.
    """
    write_data, num_saves = ChecksummingWriter.write_data, 0

    def write(*arguments: Any) -> Any:
        nonlocal num_saves
        num_saves += 1
        if not saves or num_saves in saves:
            raise OSError(number, os.strerror(number))
        return write_data(*arguments)

    monkeypatch.setattr(ChecksummingWriter, "write_data", write)


def write_when(allowed: Event, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Saves write only once allowed; each adds its tensors' addresses to the returned list."""
    write_data, places = ChecksummingWriter.write_data, []

    def write(writer: Any, plan: Any, planner: Any) -> Any:
        places.append({name: tensor.data_ptr() for name, tensor in planner.state_dict.items()})
        assert allowed.wait(60)
        return write_data(writer, plan, planner)

    monkeypatch.setattr(ChecksummingWriter, "write_data", write)
    return places


def finish_when(allowed: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves write their indices only once allowed."""
    finish = ChecksummingWriter.finish

    def finish_late(*args: Any, **keys: Any) -> None:
        assert allowed.wait(60)
        finish(*args, **keys)

    monkeypatch.setattr(ChecksummingWriter, "finish", finish_late)


def damage_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the tensors changes after they were written."""
    write_data = ChecksummingWriter.write_data

    def damage(writer: Any, plan: Any, planner: Any) -> Any:
        results = write_data(writer, plan, planner)
        path = Path(writer.path) / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return results

    monkeypatch.setattr(ChecksummingWriter, "write_data", damage)
