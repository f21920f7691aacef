"""Every damage to a file of a checkpoint is detected, and the checkpoint before it is found."""

import random
import shutil
import subprocess

import pytest
from support.checkpoints import SUMS, refused

from switchtitan.checkpoint import find_latest, verify

FILES = ("metadata.json", SUMS, "__0_0.distcp", ".metadata")
DAMAGES = {
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "grown": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "last page zeroed": lambda data: data[:-64] + bytes(min(64, len(data))),
    "last line lost": lambda data: b"".join(data.splitlines(keepends=True)[:-1]),
    "space added": lambda data: data + b" ",
    "deleted": lambda data: None,
}


@pytest.fixture
def saved(make_checkpointer, tensors, folder):
    """Two checkpoints; the newer one is to be damaged."""
    checkpointer = make_checkpointer(keep_latest=0)
    for step in (1, 2):
        tensors["optimizer.step"] += 1
        checkpointer.save(step, tensors, {"tokens_seen": 100 * step})
    assert {file.name for file in (folder / "step-000000002").iterdir()} == set(FILES)
    return folder


def check_found(newer):
    with refused(str(newer)):
        verify(newer)
    assert find_latest(newer.parent) == newer.with_name("step-000000001")


def test_sha256sum_checks_all_other_files(saved):
    newer = saved / "step-000000002"
    check = ["sha256sum", "--strict", "-c", SUMS]
    said = subprocess.run(check, cwd=newer, capture_output=True, text=True, check=True).stdout
    assert said == "".join(f"{name}: OK\n" for name in sorted({*FILES} - {SUMS}))
    (newer / "metadata.json").write_text("{}")
    assert subprocess.run(check, cwd=newer, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected(saved, name):
    file = saved / "step-000000002" / name
    before = file.read_bytes()
    for damage, change in DAMAGES.items():
        after = change(before)
        assert after != before, damage
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)
        check_found(file.parent)
    file.write_bytes(before)
    assert verify(file.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_single_flipped_bit_is_detected(saved, name):
    """150 bits of each file."""
    file = saved / "step-000000002" / name
    data = file.read_bytes()
    bits = range(8 * len(data))
    for bit in random.Random(0).sample(bits, min(150, len(bits))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with refused():
            verify(file.parent)
    file.write_bytes(data)
    verify(file.parent)


def test_a_file_of_another_checkpoint_is_detected(saved):
    for name in FILES:
        older, newer = (saved / f"step-00000000{step}" / name for step in (1, 2))
        before = newer.read_bytes()
        assert older.read_bytes() != before
        shutil.copy(older, newer)
        check_found(newer.parent)
        newer.write_bytes(before)


def test_a_complete_checkpoint_under_the_name_of_another_step_is_detected(saved):
    newer = saved / "step-000000002"
    shutil.rmtree(newer)
    shutil.copytree(saved / "step-000000001", newer)
    with refused("step 1", "step-000000001"):
        verify(newer)
