"""A disk that fails on purpose: calls of the C library fail for some paths, at their n-th call.

`failing_disk.c` is compiled once and preloaded into a process, which then sets its faults:

    with preloaded(library):
        run_on_ranks(2, function, start_method="spawn")

    def function(rank):
        set_faults(Fault("fsync", "*/metadata.json", "EIO", at=2))
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Fault:
    """Calls that fail."""

    operation: str
    """"create", "open", "read", "write", "fsync", "rename", "unlink" (also rmdir) or "mkdir"."""
    path: str
    """A pattern of the path, in which * also matches slashes. Of a rename: of either path."""
    outcome: str
    """The name of an errno; "short": half of a write; "lost": success is reported, but nothing is
    done; "flip": one bit of a write changes; "kill": SIGKILL before the call."""
    at: int = 1
    """The first matching call that fails, from 1."""
    times: int = 1
    """How many calls fail; 0 for all later ones."""

    def __str__(self) -> str:
        return f"{self.operation}|{self.path}|{self.at}|{self.times}|{self.outcome}"


class Call(NamedTuple):
    """A logged call."""

    operation: str
    path: Path
    new_path: Path | None
    """Of a rename."""
    outcome: str
    """Empty if the call was left alone."""


def build(folder: Path) -> Path:
    """Compiles the library in `folder`; skips the test without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc) for the disk that fails on purpose")
    library = folder / "failing_disk.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", SOURCE, "-o", library, "-ldl", "-lpthread"],
        check=True,
    )
    return library


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Yields a folder for many saves: a flush to a disk takes longer than the rest of a small one.

    On the system's disk if there is no file system in memory.
    """
    memory = Path("/dev/shm")
    is_usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if is_usable else None) as folder:
        yield Path(folder)


@contextmanager
def preloaded(library: Path) -> Iterator[None]:
    """Processes that are started in this context, not forked, have the library loaded."""
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = str(library)
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def call_preloaded(library: Path, function: Callable[..., None], *args: object) -> None:
    """Calls `function(*args)` in a new process with the library; fails if that fails.

    Args:
        function: importable from its module.
    """
    with preloaded(library):
        process = multiprocessing.get_context("spawn").Process(target=function, args=args)
        process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}; see its traceback above"


def set_faults(*faults: Fault) -> None:
    """Replaces all faults of this process, in which the library is preloaded."""
    ctypes.CDLL(None).failing_disk_set("\n".join(map(str, faults)).encode())


@contextmanager
def logged_calls(file: Path, pattern: str = "*") -> Iterator[list[Call]]:
    """Yields a list that holds this process's calls for matching paths after the context."""
    calls: list[Call] = []
    log = ctypes.CDLL(None).failing_disk_log
    log(str(file).encode(), pattern.encode())
    try:
        yield calls
    finally:
        log(b"", b"")
        for line in file.read_text().splitlines():
            operation, path, other, outcome = line.split("\t")
            calls.append(Call(operation, Path(path), Path(other) if other else None, outcome))
