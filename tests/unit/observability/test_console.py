"""Lines on the console and in the log file, of one rank or of several."""

import logging
import os
import sys
from pathlib import Path

import pytest

from switchtitan.observability.log import configure_logging


@pytest.fixture
def log():
    """The log of this package, which is as before at the end."""
    root, package = logging.getLogger(), logging.getLogger("switchtitan")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield logging.getLogger("switchtitan.some.part")
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "info 3\nwarning: careful\nwarning: other warning\n"),
        (3, "[rank 3] warning: careful\n[rank 3] warning: other warning\n"),
    ],
)
def test_one_rank_prints_information_and_all_print_warnings_once(log, capsys, rank, expected):
    for _ in range(2):
        configure_logging(is_main=rank == 0, rank=rank)
    log.debug("debug")
    log.info("info %d", 3)
    log.warning("careful")
    logging.getLogger("other").info("other info")
    logging.getLogger("other").warning("other warning")
    assert capsys.readouterr().out == expected


def test_the_main_rank_appends_to_a_log_file_with_time_and_logger(log, tmp_path):
    path = tmp_path / "new" / "train.log"
    for _ in range(2):
        configure_logging(is_main=True, log_file=path)
        log.info("info")
    configure_logging(is_main=False, rank=1, log_file=path)
    log.warning("other rank")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO switchtitan.some.part: info")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_once_and_the_console_goes_on(log, capsys):
    configure_logging(is_main=True, log_file=Path("/dev/full"))
    for number in range(3):
        log.info("line %d", number)
    configure_logging(is_main=True)
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    (warning,) = (line for line in lines if "No space left on device" in line)
    assert [line for line in lines if line != warning] == ["line 0", "line 1", "line 2"]


def test_the_log_goes_on_where_nobody_reads_the_output(log, tmp_path, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        configure_logging(is_main=True, log_file=tmp_path / "log")
        for number in range(3):
            log.info("line %d", number)
        monkeypatch.undo()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[-6:] for line in lines] == ["line 0", "line 1", "line 2"]
    assert capfd.readouterr().err.count("standard output was closed") == 1
