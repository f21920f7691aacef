"""Progress is drawn on a terminal, for work that takes long, by one rank."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from switchtitan import progress
from switchtitan.progress import progress_bar, slow_note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is written on standard error, a terminal; work is slow after 0.01 seconds.

    Not a fixture: pytest replaces standard error again after the fixtures.
    """
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    monkeypatch.delenv("RANK", raising=False)
    return stream


def work(num_items: int) -> list[int]:
    done = []
    for item in progress_bar("working", range(num_items), total=num_items, unit="items"):
        time.sleep(0.06)
        done.append(item)
    return done


def test_slow_work_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    assert work(4) == [0, 1, 2, 3]
    assert re.search(r"working: +\d+%.*/4 ", terminal.getvalue())


def test_quick_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY_S", 60.0)
    assert work(4) == [0, 1, 2, 3]
    with progress_bar("counting", total=10, unit="B") as bar:
        bar.update(10)
    assert terminal.getvalue().strip() == ""


def test_other_ranks_and_files_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    work(2)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    work(2)
    with slow_note("still working", delay_s=0.01):
        time.sleep(0.2)
    assert terminal.getvalue() == file.getvalue() == ""


def test_a_note_says_that_work_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with slow_note("quick", delay_s=60):
        pass
    with slow_note("still working", delay_s=0.01):
        time.sleep(0.3)
    assert terminal.getvalue() == "still working\n"


_COLOR = re.compile(rb"\x1b\[[\d;]*m")


@pytest.mark.parametrize("command", ["train", "export", "launch"])
def test_no_color_is_respected_on_a_terminal(command: str) -> None:
    host, terminal = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    environment.pop("FORCE_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "switchtitan", command, "--helps"],
        stdout=terminal,
        stderr=terminal,
        env=environment,
    )
    os.close(terminal)
    printed = b""
    with suppress(OSError):  # at the end: nobody writes to the terminal any more
        while block := os.read(host, 1 << 16):  # a terminal holds a few KiB
            printed += block
    os.close(host)
    assert process.wait(timeout=60) == 2
    assert b"error: " in printed
    assert not _COLOR.search(printed)
    assert _COLOR.search(b"\x1b[31merror\x1b[0m")
