import io
import logging
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from switchtitan.observability import configure_logging


@pytest.fixture(autouse=True)
def _restore_logging():
    root, package = logging.getLogger(), logging.getLogger("switchtitan")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


def log_everything() -> None:
    logger = logging.getLogger("switchtitan.some.part")
    logger.debug("debug")
    logger.info("info %d", 3)
    logger.warning("careful")
    logging.getLogger("other").info("other info")
    logging.getLogger("other").warning("other warning")


def test_main_rank_prints_info_and_warnings(capsys):
    configure_logging(is_main=True)
    log_everything()
    assert capsys.readouterr().out == "info 3\nwarning: careful\nwarning: other warning\n"


def test_other_ranks_print_warnings_with_their_rank(capsys):
    configure_logging(is_main=False, rank=3)
    log_everything()
    assert capsys.readouterr().out == "[rank 3] warning: careful\n[rank 3] warning: other warning\n"


def test_configuring_twice_prints_once(capsys):
    configure_logging(is_main=True)
    configure_logging(is_main=True)
    logging.getLogger("switchtitan").info("once")
    assert capsys.readouterr().out == "once\n"


def test_log_file_is_appended_with_time_and_logger(tmp_path, capsys):
    path = tmp_path / "new" / "train.log"
    for _ in range(2):
        configure_logging(is_main=True, log_file=path)
        logging.getLogger("switchtitan.part").info("info")
    configure_logging(is_main=False, rank=1, log_file=path)
    logging.getLogger("switchtitan.part").warning("other rank")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO switchtitan.part: info")


def test_lines_do_not_break_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging(is_main=True)
    with tqdm(total=10, file=terminal, ncols=40) as bar:
        bar.update(3)
        logging.getLogger("switchtitan").info("info")
    # A terminal shows the part of a line after the last carriage return.
    shown = [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert "info" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_once_and_the_console_goes_on(capsys):
    configure_logging(is_main=True, log_file=Path("/dev/full"))
    for number in range(3):
        logging.getLogger("switchtitan").info("line %d", number)
    configure_logging(is_main=True)
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    (warning,) = (line for line in lines if "could not write to" in line)
    assert "No space left on device" in warning
    assert [line for line in lines if line != warning] == ["line 0", "line 1", "line 2"]
