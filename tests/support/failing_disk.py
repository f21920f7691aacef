"""Disks that fail on purpose, or are small: calls of the C library fail for some paths, at their
n-th call.

`failing_disk.c` is compiled once and preloaded into a process, which then sets its faults.
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

SOURCE = Path(__file__).with_suffix(".c")
FILLER = "filler"
"""What another program writes."""


@dataclass(frozen=True)
class Fault:
    """Calls that fail."""

    operation: str
    """"create", "open", "write", "fsync", "rename", "unlink" (also rmdir) or "mkdir"."""
    path: str
    """A pattern of the path, in which * also matches slashes. Of a rename: of either path."""
    outcome: str
    """The name of an errno; "short": half of a write; "lost": success is reported, but nothing is
    done; "flip": one bit of a write changes; "kill": SIGKILL before the call."""
    at: int = 1
    """The first matching call that fails, from 1."""
    times: int = 1
    """How many calls fail; 0 for all later ones."""

    def __str__(self):
        return f"{self.operation}|{self.path}|{self.at}|{self.times}|{self.outcome}"


class Call(NamedTuple):
    """A logged call."""

    operation: str
    path: Path
    new_path: Path | None
    """Of a rename."""


def build(folder):
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


def call_preloaded(library, function, *args):
    """Calls an importable `function(*args)` in a new process with the library; fails with it."""
    with patch.dict(os.environ, LD_PRELOAD=str(library)):
        process = multiprocessing.get_context("spawn").Process(target=function, args=args)
        process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}; see its traceback above"


def set_faults(*faults):
    """Replaces all faults of this process, in which the library is preloaded."""
    ctypes.CDLL(None).failing_disk_set("\n".join(map(str, faults)).encode())


@contextmanager
def logged_calls(file, pattern):
    """Yields a list that holds this process's calls for matching paths after the context."""
    calls = []
    log = ctypes.CDLL(None).failing_disk_log
    log(str(file).encode(), pattern.encode())
    try:
        yield calls
    finally:
        log(b"", b"")
        for line in file.read_text().splitlines():
            operation, path, other, _ = line.split("\t")
            calls.append(Call(operation, Path(path), Path(other) if other else None))


@contextmanager
def small_disk(folder, num_bytes):
    """A file system of this size at `folder`, which is created. Skips if this user cannot mount."""
    folder.mkdir()
    options = f"size={num_bytes},nr_inodes=1000"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk, num_bytes_left=0):
    """Takes the free space of a disk but `num_bytes_left`, a multiple of 4096, with a file."""
    with (disk / FILLER).open("ab") as file:
        file.write(bytes(shutil.disk_usage(disk).free - num_bytes_left))


FILES = {
    "tensor file": "*.partial/__0_0.distcp",
    "torch's index": "*.partial/.metadata.tmp",
    "metadata": "*.partial/metadata.json",
    "checksums": "*.partial/SHA256SUMS",
}
SILENT = ("lost", "flip")
"""Outcomes of a write that a save does not notice."""
TEXTS = {
    "EIO": "Input/output error",
    "ENOSPC": "No space left on device",
    "EROFS": "Read-only file system",
}


def _cases():
    for name, path in FILES.items():
        for error in ("EIO", "ENOSPC"):
            for operation in ("create", "write", "fsync"):
                yield f"{operation} of the {name}: {error}", Fault(operation, path, error)
        for outcome in ("short", *SILENT):
            yield f"write of the {name}: {outcome}", Fault("write", path, outcome)
    for error in TEXTS:
        folder, older = "*.partial", "*/.step-000000001.partial"
        yield f"partial folder: {error}", Fault("mkdir", folder, error)
        yield f"rename of torch's index: {error}", Fault("rename", FILES["torch's index"], error)
        yield f"fsync of the partial folder: {error}", Fault("fsync", folder, error)
        yield f"rename: {error}", Fault("rename", folder, error)
        yield f"fsync of the folder: {error}", Fault("fsync", "*/checkpoints", error)
        yield f"rename before pruning: {error}", Fault("rename", older, error)
        yield f"pruning: {error}", Fault("unlink", "*.partial/*", error, at=2)
        operations = ("write", "rename", "unlink", *["mkdir"] * (error == "EROFS"))
        faults = (Fault(each, "*/checkpoints*", error, times=0) for each in operations)
        yield f"everything from the tensor file on: {error}", *faults


CASES = {name: faults for name, *faults in _cases()}
"""Every phase of a save, with every way in which its calls can fail -> faults."""
