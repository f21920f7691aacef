import io
import logging
import sys

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
    logger.debug("a detail")
    logger.info("a fact of %d", 3)
    logger.warning("a doubt")
    logging.getLogger("other").info("a stranger's fact")
    logging.getLogger("other").warning("a stranger's doubt")


def test_main_rank_prints_facts_and_warnings(capsys):
    configure_logging(is_main=True)
    log_everything()
    assert capsys.readouterr().out == "a fact of 3\nwarning: a doubt\nwarning: a stranger's doubt\n"


def test_other_ranks_print_warnings_with_their_rank(capsys):
    configure_logging(is_main=False, rank=3)
    log_everything()
    assert (
        capsys.readouterr().out
        == "[rank 3] warning: a doubt\n[rank 3] warning: a stranger's doubt\n"
    )


def test_configuring_twice_prints_once(capsys):
    configure_logging(is_main=True)
    configure_logging(is_main=True)
    logging.getLogger("switchtitan").info("once")
    assert capsys.readouterr().out == "once\n"


def test_log_file_is_appended_to_with_time_and_origin(tmp_path, capsys):
    path = tmp_path / "new" / "train.log"
    for _ in range(2):
        configure_logging(is_main=True, log_file=path)
        logging.getLogger("switchtitan.part").info("a fact")
    configure_logging(is_main=False, rank=1, log_file=path)
    logging.getLogger("switchtitan.part").warning("of another rank")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO switchtitan.part: a fact")


def test_lines_do_not_break_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging(is_main=True)
    with tqdm(total=10, file=terminal, ncols=40) as bar:
        bar.update(3)
        logging.getLogger("switchtitan").info("a fact")
    # What a terminal shows of a line is what follows the last carriage return.
    shown = [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert "a fact" in shown
