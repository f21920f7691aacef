"""Event files and traces on a disk that is full or fails: points are lost, and nothing else."""

import logging
import sys

import torch
from support.failing_disk import Fault, Filler, build, call_preloaded, set_faults, small_disk

from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.config import ProfilerConfig
from switchtitan.observability.curves import read_curves
from switchtitan.observability.profiler import Profiler
from switchtitan.observability.tensorboard import TensorBoardWriter

DISK_ERRORS = [("write", "EIO"), ("write", "EDQUOT")]
MANY = {f"metric/{number}": 1.0 for number in range(4000)}
"""More than what is left of a page of the event file."""


def test_a_full_disk_loses_points_with_one_warning(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        writer, filler = TensorBoardWriter(disk / TENSORBOARD_FOLDER, start_step=0), Filler(disk)
        writer.write(1, {"loss/train": 1.0})
        filler.fill()
        for step in (2, 3):
            writer.write(step, MANY | {"loss/train": 1.0})
        filler.free()
        writer.write(4, {"loss/train": 1.0})
        writer.close()
        assert read_curves(disk)["loss/train"][0] == [1, 4]
    assert caplog.text.count("lacks points until that succeeds") == 1


def write_on_failing_disk(folder):
    """Runs in a process with the library; its second and third points meet errors."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
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
        assert {1, 4} <= set(read_curves(home)["loss"][0])


def test_an_error_of_the_disk_is_one_warning_without_a_traceback(tmp_path, capfd):
    call_preloaded(build(tmp_path), write_on_failing_disk, tmp_path)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    for operation, error in DISK_ERRORS:
        warning = said.split(f"{operation}-{error}\n")[1].split("\n")[0]
        assert "TensorBoard lacks points until that succeeds" in warning, said


def test_a_trace_that_does_not_fit_the_disk_is_a_warning_and_leaves_nothing(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        Filler(disk).fill()
        config = ProfilerConfig(enabled=True, start_step=2, num_steps=1)
        with caplog.at_level(logging.WARNING), Profiler(config, disk) as profiler:
            for _ in range(5):
                torch.ones(5, 7).sum()
                profiler.step()
        assert profiler.trace is None
        assert f"no trace was written to {disk}" in caplog.text
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["filler"]
