"""The sequences of a split, from memory-mapped token files."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from switchtitan.data.corpus_files import damage, state_of
from switchtitan.data.order import sequence_index
from switchtitan.errors import CorpusError
from switchtitan.files import sha256_of_file


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
        vocab_size: all tokens must be below it; by default they are not checked.
        checksums: SHA-256 of each file, for files that change while they are in use; by default
            such a change is an error.

    Raises:
        CorpusError: if the shards are shorter than one sequence and its last target, or a file has
            the wrong size.
    """

    names = ("the training split",)

    def __init__(
        self,
        files: Sequence[Path],
        token_counts: Sequence[int],
        *,
        dtype: str,
        seq_len: int,
        eos_id: int,
        vocab_size: int | None = None,
        checksums: Sequence[str] | None = None,
    ) -> None:
        self.files = tuple(files)
        self.token_counts = tuple(token_counts)
        self.dtype = dtype
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.vocab_size = vocab_size
        self.checksums = None if checksums is None else tuple(checksums)
        self.num_tokens = sum(token_counts)
        if self.num_tokens < seq_len + 1:
            where = self.files[0].parent if self.files else "an empty split"
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the corpus in {where} has {self.num_tokens:,} "
                f"tokens, but one sequence needs {seq_len + 1:,}; lower seq_len or prepare a "
                "larger corpus"
            )
        self._states = [state_of(file) for file in files]
        self._shards = [
            _map_tokens(file, count, dtype) for file, count in zip(files, token_counts, strict=True)
        ]
        self._ends = np.cumsum(np.asarray(token_counts, dtype=np.int64))

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a memory map copies all tokens; a worker process maps the files again instead.
        settings: dict[str, Any] = {
            "dtype": self.dtype,
            "seq_len": self.seq_len,
            "eos_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "checksums": self.checksums,
        }
        return (partial(TokenSequences, **settings), (self.files, self.token_counts))

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> TokenSequence:
        """Returns sequence `index`.

        Raises:
            IndexError: if it is not in [0, len).
            CorpusError: if a file was edited or replaced since it was opened, or holds a token
                outside of the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        first = index * self.seq_len
        tokens = torch.from_numpy(self.read(first, first + self.seq_len + 1))
        return TokenSequence(tokens, document_ids(tokens[:-1], self.eos_id))

    def ordered(self, seed: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the indices of the sequences at positions [...] of the endless global order."""
        return sequence_index(seed, positions, len(self))

    def epochs(self, position: int) -> list[int]:
        """Returns how often each source was read to its end before a position of that order."""
        return [position // len(self)]

    def stretches(self, num_sequences: int) -> Iterator[NDArray[np.int64]]:
        """Yields the tokens of the first sequences, joined where they follow one another.

        The first token of each stretch is only the context of the others.
        """
        if num_sequences:
            yield self.read(0, num_sequences * self.seq_len + 1)

    def read(self, first: int, end: int) -> NDArray[np.int64]:
        """Returns the tokens [first, end) of the joined shards.

        Raises:
            CorpusError: see `__getitem__`.
        """
        pieces = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            self._check_shard(shard)
            shard_start = int(self._ends[shard]) - self.token_counts[shard]
            stop = min(end, int(self._ends[shard]))
            piece = self._shards[shard][first - shard_start : stop - shard_start]
            if self.vocab_size is not None and piece.size and piece.max() >= self.vocab_size:
                raise damage(
                    self.files[shard],
                    f"the shard holds the token {piece.max()}, but the vocabulary has "
                    f"{self.vocab_size}",
                )
            pieces.append(piece)
            first, shard = stop, shard + 1
        return np.concatenate(pieces).astype(np.int64)

    def check_unchanged(self) -> None:
        """Checks that no file was edited or replaced by another since it was opened.

        Raises:
            CorpusError: names the file that was.
        """
        for shard in range(len(self.files)):
            self._check_shard(shard)

    def _check_shard(self, shard: int) -> None:
        file = self.files[shard]
        state = state_of(file)
        if state == self._states[shard]:
            return
        expected = None if self.checksums is None else self.checksums[shard]
        if sha256_of_file(file) != expected:
            raise damage(
                file,
                "the token shard was changed while it was in use, and does not match its checksum; "
                "restore it and resume, or start a new run",
            )
        # A copy of the same contents, or another time.
        self._shards[shard] = _map_tokens(file, self.token_counts[shard], self.dtype)
        self._states[shard] = state


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Document ids [seq] int32 of tokens [seq]: the number of `eos_id` before each token.

    An EOS belongs to the document that it ends."""
    ends = (tokens == eos_id).to(torch.int32)
    return torch.cumsum(ends, dim=0, dtype=torch.int32) - ends


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
    if num_tokens == 0:
        return np.empty(0, dtype=stored)  # cannot be mapped
    return np.memmap(file, dtype=stored, mode="r")
