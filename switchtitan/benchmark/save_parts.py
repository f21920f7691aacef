"""What the parts of a save take: checksums, writes, the flush to disk and the read-back."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from switchtitan.files import sync_file

_BLOCK = 1 << 22


def time_parts(file: Path, num_bytes: int) -> dict[str, float]:
    """Does one after the other, by themselves, what a save does with each byte of its files.

    Args:
        file: written on the file system to measure, and deleted.

    Returns:
        seconds by part. A save computes the checksum of each byte twice, when it writes the byte
        and when it reads it back.
    """
    block = os.urandom(_BLOCK)
    sizes = [_BLOCK] * (num_bytes // _BLOCK) + [num_bytes % _BLOCK]

    def compute_checksum() -> None:
        digest = hashlib.sha256()
        for size in sizes:
            digest.update(block[:size])

    def write(descriptor: int) -> None:
        for size in sizes:
            os.write(descriptor, block[:size])

    def read_back() -> None:
        with file.open("rb") as stream:
            while stream.read(_BLOCK):
                pass

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        return {
            "checksum": _seconds(compute_checksum),
            "write": _seconds(lambda: write(descriptor)),
            "flush to disk": _seconds(lambda: sync_file(descriptor)),
            "read back": _seconds(read_back),
        }
    finally:
        os.close(descriptor)
        file.unlink()


def _seconds(function: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    function()
    return time.perf_counter() - began_at
