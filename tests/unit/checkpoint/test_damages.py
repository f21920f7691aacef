"""Every damage to a file of a checkpoint is detected, and the checkpoint before it is found."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from switchtitan.checkpoint.find import find_latest
from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError

FILES = ("metadata.json", "metadata.json.sha256", "tensors.json", "__0_0.distcp", ".metadata")
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "grown": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "last page zeroed": lambda data: data[:-64] + bytes(min(64, len(data))),
    "space added": lambda data: data + b" ",
    "deleted": lambda data: None,
}


@pytest.fixture
def saved(make_checkpointer, tensors, folder) -> Path:
    """Two checkpoints; the newer one is to be damaged."""
    checkpointer = make_checkpointer(async_save=False, keep_latest=0)
    for step in (1, 2):
        tensors["optimizer.step"] += 1
        checkpointer.save(step, tensors, {"tokens_seen": 100 * step})
    return folder


def check_found(newer: Path) -> None:
    with pytest.raises(CheckpointError):
        check_contents(newer)
    assert find_latest(newer.parent) == newer.with_name("step-000000001")


def test_all_files_are_damaged_below(saved):
    assert {file.name for file in (saved / "step-000000002").iterdir()} == set(FILES)
    assert check_contents(saved / "step-000000002").step == 2


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected(saved, name, damage):
    file = saved / "step-000000002" / name
    before = file.read_bytes()
    after = DAMAGES[damage](before)
    assert after != before
    if after is None:
        file.unlink()
    else:
        file.write_bytes(after)
    check_found(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_single_flipped_bit_is_detected(saved, name):
    """Each bit of small files, and 200 of others."""
    file = saved / "step-000000002" / name
    data = file.read_bytes()
    bits = range(8 * len(data))
    if len(bits) > 8000:
        bits = random.Random(0).sample(bits, 200)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(CheckpointError):
            check_contents(file.parent)
    file.write_bytes(data)
    check_contents(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_detected(saved, name):
    older, newer = (saved / f"step-00000000{step}" / name for step in (1, 2))
    if older.read_bytes() == newer.read_bytes():
        # Same shapes, same locations: harmless.
        assert name in ("tensors.json", ".metadata")
        return
    shutil.copy(older, newer)
    check_found(newer.parent)


def test_a_whole_checkpoint_under_the_name_of_another_step_is_detected(saved):
    newer = saved / "step-000000002"
    shutil.rmtree(newer)
    shutil.copytree(saved / "step-000000001", newer)
    with pytest.raises(CheckpointError, match=r"is of step 1; .* rename it to step-000000001"):
        check_contents(newer)
