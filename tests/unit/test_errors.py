"""A command whose output nobody reads ends quietly; other broken pipes are errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchtitan.errors import CLOSED_OUTPUT_STATUS

ROOT = Path(__file__).parents[2]

_PRINTS_A_LOT = """
import sys
from switchtitan.cli import main
main.main = lambda argv: [print("a line") for _ in range(100_000)]
main.run(["train"])
"""
_BREAKS_ANOTHER_PIPE = """
import os, sys
from switchtitan.cli import main
def write(argv):
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"x")
main.main = write
main.run(["train"])
"""


def run_without_reader(*arguments: str) -> tuple[int, str]:
    """Runs Python with a standard output that nobody reads; returns status and standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            # As a user's: with a buffer.
            env={key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "switchtitan", "--help"],
        ["-m", "switchtitan", "train", "--help"],
        ["-m", "switchtitan", "export", "--help"],
        [str(ROOT / "scripts" / "prepare_dataset.py"), "--help"],
    ],
)
def test_a_help_that_nobody_reads_ends_quietly(words: list[str]) -> None:
    assert run_without_reader(*words) == (CLOSED_OUTPUT_STATUS, "")


def test_a_reader_that_leaves_early_gets_its_lines() -> None:
    command = f"{sys.executable} -c '{_PRINTS_A_LOT}' | head -3"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "a line\n" * 3
    assert done.stderr == ""
    assert done.returncode == CLOSED_OUTPUT_STATUS


def test_training_goes_on_without_a_reader(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import logging, pathlib
from switchtitan.observability import configure_logging
configure_logging(is_main=True, log_file=pathlib.Path({str(log)!r}))
for number in range(3):
    logging.getLogger("switchtitan").info("line %d", number)
"""
    status, errors = run_without_reader("-c", code)
    assert status == 0
    assert errors == "warning: standard output was closed; the log continues in the log file only\n"
    assert [line[-6:] for line in log.read_text().splitlines()] == ["line 0", "line 1", "line 2"]


def test_another_broken_pipe_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BREAKS_ANOTHER_PIPE], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_a_mistake_keeps_its_status_without_a_reader() -> None:
    status, errors = run_without_reader("-m", "switchtitan", "no-such-command")
    assert status == 2
    assert "unknown command" in errors
