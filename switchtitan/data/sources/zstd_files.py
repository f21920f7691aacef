"""JSON lines compressed with Zstandard."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchtitan.data.sources.dataset import BadRecord, SourceKeys
from switchtitan.data.sources.files import FileSource, text_of_line
from switchtitan.errors import CorpusError

_READ_BYTES = 1 << 12
"""Compressed bytes at a time: Zstandard turns them into 128 MiB at most."""


def zstd_json_source(keys: SourceKeys) -> FileSource:
    """Files with one JSON object per line (`*.jsonl.zst`, `*.json.zst`).

    Raises:
        CorpusError: if no package for Zstandard is installed.
    """
    _zstd_library()
    column = keys.text_column or "text"
    return FileSource(
        "jsonl.zst",
        keys.needed_path(),
        ("*.jsonl.zst", "*.json.zst"),
        lambda file: _read_lines(file, column),
        column,
    )


def _zstd_library() -> Any:
    for name in ("compression.zstd", "zstandard"):  # Python's own since 3.14
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise CorpusError(
        "[data] dataset = 'jsonl.zst': no package for Zstandard is installed; run "
        "pip install 'switchtitan[zstd]'"
    )


def _read_lines(file: Path, column: str) -> Iterator[str | BadRecord]:
    rest, number = b"", 0
    for block in _blocks(file):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield text_of_line(line, column, f"{file}, line {number}")
    if rest.strip():
        yield text_of_line(rest, column, f"{file}, line {number + 1}")


def _blocks(file: Path) -> Iterator[bytes]:
    """Yields the contents of a file of one or more frames.

    Raises:
        CorpusError: if it is damaged or truncated.
    """
    library = _zstd_library()
    is_own = library.__name__ == "compression.zstd"

    def new_frame() -> Any:
        return library.ZstdDecompressor() if is_own else library.ZstdDecompressor().decompressobj()

    frame, is_within = new_frame(), False
    with file.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            while data:
                try:
                    yield frame.decompress(data)
                except (library.ZstdError, MemoryError) as error:
                    raise CorpusError(f"{file}: damaged zstd file ({error}); replace it") from error
                is_within, data = not frame.eof, b""
                if frame.eof:
                    data, frame = frame.unused_data, new_frame()
    if is_within:
        raise CorpusError(f"{file}: truncated zstd file; replace it")
