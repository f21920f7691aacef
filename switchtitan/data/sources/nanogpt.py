"""Token files in nanoGPT's layout: little-endian uint16 or uint32, no header."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.sources.dataset import Position, SourceKeys
from switchtitan.data.sources.files import find_files
from switchtitan.data.sources.tokenized import (
    FlatStream,
    FlatTokens,
    TokenizedSource,
    file_identity,
)
from switchtitan.errors import CorpusError

_MAX_UINT16_TOKENS = 1 << 16
_LLM_C_MAGIC = 20240520
"""First number of llm.c's token files, which have a header."""


class NanoGptSource(TokenizedSource):
    """`train.bin` and `val.bin` in a folder, which are its own splits, or other `*.bin` files.

    They hold uint16; with a tokenizer of more than 65 536 tokens, uint32.

    Args:
        path: the folder, or one file.

    Raises:
        CorpusError: if there is no such file, or one is not a sequence of uint16.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dtype: np.dtype[Any] = np.dtype("<u2")
        names = {"train": path / "train.bin", "validation": path / "val.bin"}
        self._files: dict[str | None, list[Path]]
        if all(file.is_file() for file in names.values()):
            self.splits = tuple(names)
            self._files = {split: [file] for split, file in names.items()}
        else:
            self._files = {None: find_files("nanogpt", path, ("*.bin",))}
        self.num_bytes = sum(_checked_size(file) for file in self._all_files())

    @property
    def description(self) -> str:
        return f"{len(self._all_files())} nanoGPT file(s) in {self._path}"

    def identity(self) -> Mapping[str, object]:
        root = self._path if self._path.is_dir() else self._path.parent
        return {"kind": "nanogpt", "files": file_identity(root, self._all_files())}

    def for_vocabulary(self, vocab_size: int) -> "NanoGptSource":
        if vocab_size <= _MAX_UINT16_TOKENS:
            return self
        source = copy.copy(self)
        source._dtype = np.dtype("<u4")
        for file in self._all_files():
            size = file.stat().st_size
            if size % source._dtype.itemsize:
                raise CorpusError(
                    f"{file}: has {size:,} bytes, expected uint32 tokens, since the tokenizer has "
                    f"{vocab_size:,} tokens; set [data] tokenizer to the one that made them"
                )
        return source

    def open_tokens(
        self, split: str | None, eos_id: int, position: Position | None = None
    ) -> FlatStream:
        pieces = [_flat(file, self._dtype) for file in self._files[split]]
        return FlatStream(pieces, eos_id, position)

    def _all_files(self) -> list[Path]:
        return [file for files in self._files.values() for file in files]


def nanogpt_source(keys: SourceKeys) -> NanoGptSource:
    """Token files in nanoGPT's layout."""
    return NanoGptSource(keys.needed_path())


def _checked_size(file: Path) -> int:
    size = file.stat().st_size
    if size % 2:
        raise CorpusError(f"{file}: has {size:,} bytes, expected uint16 tokens; replace it")
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(4), "little") == _LLM_C_MAGIC:
            raise CorpusError(
                f"{file}: has llm.c's header, expected uint16 tokens without one; remove its first "
                "1024 bytes"
            )
    return size


def _flat(file: Path, dtype: np.dtype[Any]) -> FlatTokens:
    size = file.stat().st_size
    tokens: NDArray[np.integer] = (
        np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
    )
    return FlatTokens(str(file), len(tokens), lambda first, end: tokens[first:end])
