"""Text files that are whole whenever they are there."""

import os
from pathlib import Path


def write_atomically(file: Path, contents: str) -> None:
    """Writes a text file so that readers see the old one or the new one, whole."""
    partial = file.with_name(file.name + ".new")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(contents)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
