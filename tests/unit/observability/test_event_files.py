"""Event files: incomplete records and failing disks lose the points concerned, and no others."""

import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from support.failing_disk import Fault, build, call_preloaded, set_faults
from support.small_disk import Filler, small_disk

from switchtitan.observability import TENSORBOARD_FOLDER, event_files
from switchtitan.observability.curves import read_curves
from switchtitan.observability.event_files import TensorBoardWriter

DAMAGES = {
    "within the header": lambda data: data[: len(data) - record_size(data) + 10],
    "within the data": lambda data: data[:-9],
    "within the checksum": lambda data: data[:-1],
    "one byte": lambda data: data[: len(data) - record_size(data) + 1],
    "zeros after a power failure": lambda data: data + bytes(4096),
    "last record zeroed": lambda data: data[: -record_size(data)] + bytes(record_size(data)),
    "last record corrupted": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "garbage": lambda data: data + os.urandom(100),
}


def record_size(data: bytes) -> int:
    """Size of the last record of an event file."""
    start = 0
    while start < len(data):
        size = 16 + int.from_bytes(data[start : start + 8], "little")
        start += size
    return size


@pytest.mark.parametrize("damage", DAMAGES)
def test_points_before_and_after_a_crash_in_the_middle_of_a_record_are_read(tmp_path, damage):
    folder = tmp_path / TENSORBOARD_FOLDER
    writer = TensorBoardWriter(folder, start_step=0)
    for step in range(1, 6):
        writer.write(step, {"loss/train": 1 / step})
    writer.close()
    (file,) = folder.iterdir()
    data = DAMAGES[damage](file.read_bytes())
    file.unlink()
    # Files are read in the order of their names, which begin with the second of their start.
    (folder / "events.out.tfevents.0000000001.host").write_bytes(data)
    steps, _ = read_curves(tmp_path)["loss/train"]
    complete = 5 if damage in ("zeros after a power failure", "garbage") else 4
    assert steps == list(range(1, complete + 1))
    # The run resumes from step 3.
    resumed = TensorBoardWriter(folder, start_step=3)
    for step in range(4, 8):
        resumed.write(step, {"loss/train": 1 / step})
    resumed.close()
    steps, values = read_curves(tmp_path)["loss/train"]
    assert steps == list(range(1, 8))
    assert values == pytest.approx([1 / step for step in steps])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_points_are_dropped_with_one_warning_until_the_disk_recovers(tmp_path, caplog):
    folder = tmp_path / TENSORBOARD_FOLDER
    writer = TensorBoardWriter(folder, start_step=0)
    writer.write(1, {"loss": 1.0})
    away = folder.rename(tmp_path / "away")
    folder.write_text("a file instead of a folder")
    for step in (2, 3, 4):
        writer.write(step, {"loss": 0.5})
    assert caplog.text.count("TensorBoard lacks points until that succeeds") == 1
    folder.unlink()
    away.rename(folder)
    writer.write(5, {"loss": 0.25})
    writer.close()
    assert "are written again" in caplog.text
    assert read_curves(tmp_path)["loss"] == ([1, 5], [1.0, 0.25])
    assert not list(folder.glob(".writable"))


def test_an_unwritable_folder_does_not_stop_a_run(tmp_path: Path, caplog):
    (tmp_path / TENSORBOARD_FOLDER).write_text("a file instead of a folder")
    writer = TensorBoardWriter(tmp_path / TENSORBOARD_FOLDER, start_step=0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "TensorBoard lacks points" in caplog.text


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_no_thread_with_a_traceback(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        writer, filler = TensorBoardWriter(disk / TENSORBOARD_FOLDER, start_step=0), Filler(disk)
        writer.write(1, {"loss/train": 1.0})
        filler.fill()
        for step in (2, 3):
            writer.write(step, {"loss/train": 1.0})
        filler.free()
        writer.write(4, {"loss/train": 1.0})
        writer.close()
        assert read_curves(disk)["loss/train"][0] == [1, 4]
    assert caplog.text.count("lacks points until that succeeds") == 1


DISK_ERRORS = [("write", "EIO"), ("write", "EDQUOT"), ("create", "EROFS")]


def write_on_failing_disk(folder: Path, has_hook: bool) -> None:
    """Runs in a process with the library; its second and third points meet errors."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    if not has_hook:  # a planted fault
        event_files._WithoutWriteErrors.__call__ = lambda self, error: self._hook(error)
    for operation, error in DISK_ERRORS:
        home = folder / f"{operation}-{error}"
        print(home.name, file=sys.stderr)
        writer = TensorBoardWriter(home / TENSORBOARD_FOLDER, start_step=0)
        writer.write(1, {"loss": 1.0})
        set_faults(Fault(operation, f"{home}*", error, times=0))
        for step in (2, 3):
            writer.write(step, {"loss": 0.5})
        set_faults()
        writer.write(4, {"loss": 0.25})
        writer.close()
        steps, _ = read_curves(home)["loss"]
        assert {1, 4} <= set(steps), steps


def said_on_failing_disk(folder: Path, capfd: pytest.CaptureFixture[str], has_hook: bool) -> str:
    call_preloaded(build(folder), write_on_failing_disk, folder, has_hook)
    return capfd.readouterr().err


def test_an_error_of_the_disk_is_one_warning_without_a_traceback(tmp_path, capfd):
    said = said_on_failing_disk(tmp_path, capfd, has_hook=True)
    assert "Traceback" not in said
    for operation, error in DISK_ERRORS:
        warnings = said.split(f"{operation}-{error}\n")[1].split("\n")[:2]
        assert "TensorBoard lacks points until that succeeds" in warnings[0], said
        assert "are written again" in warnings[1], said


def test_a_traceback_of_the_writing_thread_is_found(tmp_path, capfd):
    """The check above can fail."""
    assert "Traceback" in said_on_failing_disk(tmp_path, capfd, has_hook=False)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_deleted_is_created_again(tmp_path, caplog):
    folder = tmp_path / TENSORBOARD_FOLDER
    writer = TensorBoardWriter(folder, start_step=0)
    writer.write(1, {"loss": 1.0})
    shutil.rmtree(folder)
    for step in (2, 3, 4):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    assert caplog.text.count("lacks points until that succeeds") == 1
    assert read_curves(tmp_path)["loss"][0][-1] == 4


def test_errors_of_other_threads_are_printed(tmp_path, monkeypatch):
    found: list[object] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    TensorBoardWriter(tmp_path, start_step=0).close()

    def fail() -> None:
        raise OSError("of another thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert len(found) == 1
