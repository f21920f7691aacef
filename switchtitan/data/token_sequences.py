"""The sequences of a split, from memory-mapped token files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from switchtitan.errors import CorpusError


class TokenSequence(NamedTuple):
    """One sequence of a split."""

    tokens: Tensor
    """[seq + 1] int64: the inputs and, shifted by one, the targets."""
    document_ids: Tensor
    """[seq] int32: 0 at the start, one more after each end of a document."""


class TokenSequences(Dataset[TokenSequence]):
    """The sequences of one split: sequence i holds tokens [i * seq_len, (i + 1) * seq_len] of the
    joined shards.

    Consecutive sequences share one token, the last target of one and the first input of the next,
    so each token is a target once.

    Args:
        files: token files in order.
        token_counts: tokens in each file.
        dtype: "uint16" or "uint32", stored little-endian.
        seq_len: tokens per sequence.
        eos_id: the token that ends a document.

    Raises:
        CorpusError: if the shards are shorter than one sequence and its last target, or a file has
            the wrong size.
    """

    def __init__(
        self,
        files: Sequence[Path],
        token_counts: Sequence[int],
        *,
        dtype: str,
        seq_len: int,
        eos_id: int,
    ) -> None:
        self.files = tuple(files)
        self.token_counts = tuple(token_counts)
        self.dtype = dtype
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.num_tokens = sum(token_counts)
        if self.num_tokens < seq_len + 1:
            where = self.files[0].parent if self.files else "an empty split"
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the corpus in {where} has {self.num_tokens:,} "
                f"tokens, but one sequence needs {seq_len + 1:,}; lower seq_len or prepare a "
                "larger corpus"
            )
        self._ends = np.cumsum(np.asarray(token_counts, dtype=np.int64))
        self._shards = [
            _map_tokens(file, count, dtype) for file, count in zip(files, token_counts, strict=True)
        ]

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a memory map copies all tokens; a worker process maps the files again instead.
        return (_reopen, (self.files, self.token_counts, self.dtype, self.seq_len, self.eos_id))

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> TokenSequence:
        """Returns sequence `index`.

        Raises:
            IndexError: if it is not in [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first = index * self.seq_len
        tokens = torch.from_numpy(self._read(first, first + self.seq_len + 1))
        return TokenSequence(tokens, document_ids(tokens[:-1], self.eos_id))

    def _read(self, first: int, end: int) -> NDArray[np.int64]:
        """Tokens [first, end) of the joined shards, as int64."""
        pieces = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            shard_start = int(self._ends[shard]) - self.token_counts[shard]
            stop = min(end, int(self._ends[shard]))
            pieces.append(self._shards[shard][first - shard_start : stop - shard_start])
            first, shard = stop, shard + 1
        return np.concatenate(pieces).astype(np.int64)


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Document ids [seq] int32 of tokens [seq]: the number of `eos_id` before each token.

    An EOS belongs to the document that it ends."""
    ends = (tokens == eos_id).to(torch.int32)
    return torch.cumsum(ends, dim=0, dtype=torch.int32) - ends


def _reopen(
    files: Sequence[Path], token_counts: Sequence[int], dtype: str, seq_len: int, eos_id: int
) -> TokenSequences:
    return TokenSequences(files, token_counts, dtype=dtype, seq_len=seq_len, eos_id=eos_id)


def _map_tokens(file: Path, num_tokens: int, dtype: str) -> NDArray[np.unsignedinteger]:
    stored = np.dtype(dtype).newbyteorder("<")
    try:
        size = file.stat().st_size
    except OSError as error:
        raise CorpusError(
            f"{file}: the token shard cannot be read ({error.strerror}); "
            f"delete the folder {file.parent} and run again to prepare it from scratch"
        ) from error
    if size != num_tokens * stored.itemsize:
        raise CorpusError(
            f"{file}: the token shard has {size:,} bytes, expected "
            f"{num_tokens * stored.itemsize:,}; delete the folder {file.parent} and run again to "
            "prepare it from scratch"
        )
    return np.memmap(file, dtype=stored, mode="r")
