"""What the next checkpoints need is foretold, and a full disk is reported with sizes."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.small_disk import small_disk as mounted

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.disk_space import (
    check_room,
    estimate_bytes,
    num_additional_checkpoints,
)
from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError

MIB = 1 << 20


def most_at_once(num_present: int, num_saves: int, keep_latest: int) -> int:
    """Saves and prunes one by one."""
    present = most = num_present
    for _ in range(num_saves):
        present += 1
        most = max(most, present)
        if keep_latest:
            present = min(present, keep_latest)
    return most


@pytest.mark.parametrize("keep_latest", [0, 1, 2, 5])
@pytest.mark.parametrize("num_saves", [1, 2, 3, 10])
@pytest.mark.parametrize("num_present", [0, 1, 2, 7])
def test_the_number_of_checkpoints_at_once_is_that_of_saving_and_pruning(
    num_present, num_saves, keep_latest
):
    most = most_at_once(num_present, num_saves, keep_latest)
    assert num_additional_checkpoints(num_present, num_saves, keep_latest) == most - num_present


def test_the_estimate_is_a_little_more_than_a_checkpoint_takes(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=False)
    tensors |= {f"more.{i}.weight": torch.ones(100, 1 + i) for i in range(100)}
    checkpointer.save(1, tensors, {})
    on_disk = sum(file.stat().st_size for file in checkpointer.latest.iterdir())
    assert on_disk < estimate_bytes(tensors.values(), num_ranks=1) < 1.5 * on_disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB and 16 files."""
    with mounted(tmp_path / "disk", 4 * MIB, num_files=16) as disk:
        yield disk


def test_no_room_for_one_checkpoint_is_an_error_or_a_warning(small_disk, caplog):
    sizes = r"a checkpoint takes about 5 MiB, but 4 MiB are free for .*free space"
    with pytest.raises(CheckpointError, match=sizes):
        check_room(small_disk / "run" / "checkpoints", CheckpointConfig(), 5 * MIB, 3)
    check_room(small_disk / "run", CheckpointConfig(on_failure="continue"), 5 * MIB, 3)
    assert "a checkpoint takes about 5 MiB" in caplog.text
    check_room(small_disk / "run", CheckpointConfig(), 5 * MIB, 0)


def test_no_room_for_all_checkpoints_at_once_is_a_warning(small_disk, caplog):
    check_room(small_disk, CheckpointConfig(keep_latest=2), int(1.3 * MIB), 10)
    assert not caplog.records
    check_room(small_disk, CheckpointConfig(keep_latest=2), int(1.4 * MIB), 10)
    assert "needs about 4.2 MiB more while the last one is written, but 4 MiB are" in caplog.text
    caplog.clear()
    check_room(small_disk, CheckpointConfig(keep_latest=0), int(0.5 * MIB), 10)
    assert "keeping all checkpoints" in caplog.text
    assert "5 MiB more" in caplog.text


@pytest.mark.parametrize("num_saves", [1, 2])
def test_a_warning_says_that_the_next_checkpoint_will_not_fit(
    make_checkpointer, tensors, folder, small_disk, caplog, num_saves
):
    folder.parent.mkdir()
    folder.symlink_to(small_disk)
    caplog.set_level(logging.WARNING)
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    tensors["model.large"] = torch.zeros(MIB // 4 * 5 // 2)  # 2.5 MiB
    checkpointer.check_room(tensors, num_saves)
    assert ("while the last one is written" in caplog.text) == (num_saves == 2)
    caplog.clear()
    checkpointer.save(1, tensors, {})
    # Not after the last save.
    message = r"the next checkpoint will not fit: it takes about 2.51 MiB, but 1.4\d? MiB are"
    assert bool(re.search(message, caplog.text)) == (num_saves == 2)
    with pytest.raises(
        CheckpointError,
        match=r"cannot save step 2 .*: there is too little space. A checkpoint takes about "
        r"2.51 MiB, 1.4\d? MiB are free; free space, or lower \[checkpoint\] keep_latest",
    ):
        checkpointer.save(2, tensors, {})
    check_contents(checkpointer.latest)


def test_a_disk_that_is_full_while_writing_leaves_the_earlier_checkpoint(
    make_checkpointer, tensors, folder, small_disk
):
    """No file can be created any more, which free bytes do not tell."""
    folder.parent.mkdir()
    folder.symlink_to(small_disk)
    checkpointer = make_checkpointer(async_save=False, on_failure="continue")
    checkpointer.save(1, tensors, {})
    names = [path.name for path in small_disk.iterdir()]
    fillers = [small_disk / f"filler-{i}" for i in range(5)]
    for filler in fillers:
        filler.touch()
    checkpointer.save(2, tensors, {})
    assert checkpointer.num_failed_saves == 1
    assert sorted(path.name for path in small_disk.iterdir()) == sorted(
        [*names, *(filler.name for filler in fillers)]
    )
    check_contents(checkpointer.latest)
    for filler in fillers:
        filler.unlink()
    checkpointer.save(2, tensors, {})
    assert checkpointer.latest.name == "step-000000002"
    check_contents(checkpointer.latest)
