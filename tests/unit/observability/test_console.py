"""Lines on the console and in the log file, of one rank or of several."""

import io
import logging
import math
import sys
from pathlib import Path

import pytest

from switchtitan.observability.log import configure_logging, format_duration


def test_durations_have_two_units():
    durations = (0.4, 59.6, 187, 7500, 4 * 86400 + 11 * 3600, math.inf)
    texts = ["0s", "1m00s", "3m07s", "2h05m", "4d11h", "?"]
    assert [format_duration(of) for of in durations] == texts


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


def test_lines_do_not_break_a_progress_bar(log, monkeypatch):
    from tqdm import tqdm

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging(is_main=True)
    with tqdm(total=10, file=terminal, ncols=40) as bar:
        bar.update(3)
        log.info("info")
    # A terminal shows the part of a line after the last carriage return.
    assert "info" in [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]


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
