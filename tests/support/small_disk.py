"""A real file system that is small, and others that fill it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BLOCK = bytes(4096)


@contextmanager
def small_disk(folder: Path, num_bytes: int, num_files: int = 1000) -> Iterator[Path]:
    """A file system of this size at `folder`, which is created. Skips if this user cannot mount."""
    folder.mkdir()
    options = f"size={num_bytes},nr_inodes={num_files}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filler:
    """A file of another program that takes the free space of a disk.

    Args:
        disk: its file system.
    """

    def __init__(self, disk: Path) -> None:
        self._file = disk / "filler"

    def fill(self, num_bytes_left: int = 0) -> None:
        """Takes all free space but `num_bytes_left`, a multiple of 4096."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while True:
                os.write(descriptor, _BLOCK)
        except OSError:
            os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - num_bytes_left))
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Deletes the file."""
        self._file.unlink(missing_ok=True)
