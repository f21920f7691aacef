"""A folder is complete or absent, whatever stops the process that writes it."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.small_disk import small_disk

from switchtitan.errors import CheckpointError, OutputError
from switchtitan.files import try_lock
from switchtitan.hub.new_folder import new_folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as partial:
        (partial / "file").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert names_in(tmp_path / "a") == ["out"]
    assert names_in(tmp_path / "a" / "out") == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, ZeroDivisionError])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def write_and_fail(folder: Path) -> None:
        with new_folder(folder) as partial:
            (partial / "file").write_text("1")
            raise error

    with pytest.raises(error):
        write_and_fail(tmp_path / "a" / "b" / "out")
    assert names_in(tmp_path) == []


_WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from switchtitan.hub.new_folder import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "large").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", _WRITE_AND_DIE, str(folder)])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.partial" / "large").is_file()
    with new_folder(folder) as partial:
        assert names_in(partial) == []
        (partial / "file").write_text("2")
    assert names_in(tmp_path) == ["out"]
    assert names_in(folder) == ["file"]
    assert "deleting the incomplete folder" in caplog.text


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("1")
        refused = pytest.raises(OutputError, match="another process is writing this folder")
        with refused, new_folder(tmp_path / "out"):
            pass
    assert names_in(tmp_path / "out") == ["file"]
    # The control: the lock is only as long as the block.
    with try_lock(tmp_path / ".out.lock", key="--folder") as descriptor:
        assert descriptor is not None


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_exists_is_kept(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out"
    if content == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"), new_folder(folder):
        pass
    assert names_in(tmp_path) == ["out"]
    assert (folder if content == "file" else folder / "mine").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("1")
    assert names_in(tmp_path / "out") == ["file"]


def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=r"out cannot be written"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_all_files_and_names_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with new_folder(tmp_path / "out") as partial:
        (partial / "base").mkdir()
        files = [partial / "a", partial / "base" / "b"]
        for file in files:
            file.write_text("1")
        before = len(flushed)
    assert set(flushed[before:-1]) == {*files, partial, partial / "base"}
    assert flushed[-1] == tmp_path


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_weights(folder: Path, num_values: int) -> None:
    with new_folder(folder) as partial:
        save_file({"weight": torch.zeros(num_values)}, partial / "model.safetensors")


def test_a_limit_of_file_sizes_is_an_error_by_name(tmp_path: Path) -> None:
    words = re.escape(f"{tmp_path / 'out'} cannot be written (")
    with largest_file(1000), pytest.raises(OutputError, match=words):
        write_weights(tmp_path / "out", 1000)
    assert names_in(tmp_path) == []
    # The control: with a larger limit it is written.
    with largest_file(1 << 20):
        write_weights(tmp_path / "out", 1000)
    assert names_in(tmp_path) == ["out"]


def test_a_full_disk_is_an_error_by_name(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(OutputError, match=r"out cannot be written .*free space"):
            write_weights(disk / "out", 1 << 19)
        assert names_in(disk) == []
        write_weights(disk / "out", 1 << 10)
        assert names_in(disk) == ["out"]


@pytest.mark.parametrize("place", ["file/x", "file/x/y", "loop/x", "a" * 300])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names_in(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / place):
        pass
    assert names_in(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_of_the_system_is_refused() -> None:
    with pytest.raises(OutputError, match="/proc/x cannot be"), new_folder(Path("/proc/x")):
        pass
