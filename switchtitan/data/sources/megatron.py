"""Indexed token files in Megatron-LM's layout: NAME.idx and NAME.bin."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.sources.dataset import BadRecord, Position, SourceKeys
from switchtitan.data.sources.files import find_files
from switchtitan.data.sources.tokenized import (
    TokenDocument,
    TokenizedSource,
    checked_position,
    file_identity,
)
from switchtitan.errors import CorpusError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, number of document borders."""
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The integers among the dtypes by code."""


class _Indexed(NamedTuple):
    """A memory-mapped pair of files."""

    file: Path
    tokens: NDArray[np.integer]
    """[tokens] of all documents."""
    lengths: NDArray[np.int32]
    """[sequences], tokens in each."""
    offsets: NDArray[np.int64]
    """[sequences], bytes before each."""
    borders: NDArray[np.int64]
    """[documents + 1], the first sequence of each document, then the number of sequences."""


class MegatronStream:
    """The documents of indexed files, in order."""

    def __init__(self, files: Sequence[Path], eos_id: int, position: Position | None) -> None:
        self._files = files
        self._eos_id = eos_id
        self._file, self._document = checked_position(position, "file", "document")
        self._indexed: _Indexed | None = None

    def __iter__(self) -> "MegatronStream":
        return self

    def __next__(self) -> TokenDocument | BadRecord:
        while self._file < len(self._files):
            if self._indexed is None:
                self._indexed = _open(self._files[self._file])
            if self._document < len(self._indexed.borders) - 1:
                self._document += 1
                return _document(self._indexed, self._document - 1, self._eos_id)
            self._file, self._document, self._indexed = self._file + 1, 0, None
        raise StopIteration

    def position(self) -> Position:
        return {"file": self._file, "document": self._document}


class MegatronSource(TokenizedSource):
    """All pairs of files in a folder, or one pair.

    Args:
        path: a folder, or the `.idx` file, `.bin` file or common prefix of a pair.

    Raises:
        CorpusError: if there is no such file, or it is not an index.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_dir():
            stem = path.with_suffix("") if path.suffix in (".idx", ".bin") else path
            path = Path(f"{stem}.idx")
        self._files = find_files("megatron", path, ("*.idx",))
        self.num_bytes = sum(_open(file).tokens.nbytes for file in self._files)

    @property
    def description(self) -> str:
        return f"{len(self._files)} Megatron file(s) in {self._path}"

    def identity(self) -> Mapping[str, object]:
        root = self._path if self._path.is_dir() else self._path.parent
        files = [both for file in self._files for both in (file, file.with_suffix(".bin"))]
        return {"kind": "megatron", "files": file_identity(root, files)}

    def open_tokens(
        self, split: str | None, eos_id: int, position: Position | None = None
    ) -> MegatronStream:
        assert split is None
        return MegatronStream(self._files, eos_id, position)


def megatron_source(keys: SourceKeys) -> MegatronSource:
    """Indexed token files in Megatron-LM's layout."""
    return MegatronSource(keys.needed_path())


def _open(file: Path) -> _Indexed:
    tokens_file = file.with_suffix(".bin")
    try:
        data = np.memmap(file, dtype=np.uint8, mode="r")
        num_bytes = tokens_file.stat().st_size
    except (OSError, ValueError) as error:
        raise CorpusError(f"{file}: the pair .idx and .bin cannot be read ({error})") from error
    if len(data) < _HEADER.size:
        raise CorpusError(f"{file}: truncated index; replace it")
    magic, version, code, num_sequences, num_borders = _HEADER.unpack(
        data[: _HEADER.size].tobytes()
    )
    if magic != _MAGIC or version != 1:
        raise CorpusError(
            f"{file}: expected an index of Megatron-LM (MMIDIDX, version 1), got {magic!r}, "
            f"version {version}"
        )
    if code not in _DTYPES:
        raise CorpusError(f"{file}: code {code} of the dtype is none of integers")
    if _HEADER.size + 12 * num_sequences + 8 * num_borders > len(data):
        raise CorpusError(
            f"{file}: has {len(data):,} bytes, too few for {num_sequences:,} sequences and "
            f"{num_borders:,} borders of documents; replace it"
        )
    dtype = np.dtype(_DTYPES[code])
    if num_bytes % dtype.itemsize:
        raise CorpusError(
            f"{tokens_file}: has {num_bytes:,} bytes, expected a multiple of {dtype.itemsize}"
        )
    first = _HEADER.size
    lengths = data[first : first + 4 * num_sequences].view("<i4")
    first += 4 * num_sequences
    offsets = data[first : first + 8 * num_sequences].view("<i8")
    first += 8 * num_sequences
    borders = data[first : first + 8 * num_borders].view("<i8")
    tokens = (
        np.memmap(tokens_file, dtype=dtype, mode="r") if num_bytes else np.empty(0, dtype=dtype)
    )
    return _Indexed(file, tokens, lengths, offsets, borders)


def _document(indexed: _Indexed, number: int, eos_id: int) -> TokenDocument | BadRecord:
    where = f"{indexed.file}, document {number + 1}"
    first, end = int(indexed.borders[number]), int(indexed.borders[number + 1])
    if not 0 <= first <= end <= len(indexed.lengths):
        return BadRecord(f"{where}: sequences {first} to {end} do not exist", "replace the file")
    pieces = []
    item_bytes = indexed.tokens.dtype.itemsize
    for length, offset in zip(
        indexed.lengths[first:end].tolist(), indexed.offsets[first:end].tolist(), strict=True
    ):
        at, rest = divmod(offset, item_bytes)
        if rest or length < 0 or at < 0 or at + length > len(indexed.tokens):
            return BadRecord(
                f"{where}: {length} tokens at byte {offset} are not in the .bin file",
                "replace the file",
            )
        pieces.append(indexed.tokens[at : at + length])
    ids = np.concatenate(pieces) if pieces else indexed.tokens[:0]
    return TokenDocument(ids[:-1] if ids.size and ids[-1] == eos_id else ids, where)
