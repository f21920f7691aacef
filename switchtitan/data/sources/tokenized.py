"""Documents that are tokenized already, and the interface of their sources."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.sources.dataset import BadRecord, Position
from switchtitan.errors import CorpusError

logger = logging.getLogger(__name__)

MAX_DOCUMENT_TOKENS = 1 << 26
"""A flat file without an end of document for so long was made with another tokenizer."""

_BLOCK_TOKENS = 1 << 20

FIX_TOKENIZER = "set [data] tokenizer to the one that made the tokens"
NO_TOKEN = -1
"""In place of a token that is missing. Documents with it are malformed."""


@dataclass(frozen=True)
class TokenDocument:
    """A document that is tokenized already, without its end token."""

    ids: NDArray[np.integer]
    where: str
    """File and record, for errors."""


class TokenStream(Protocol):
    """The documents of one stream, like `DocumentStream`."""

    def __iter__(self) -> "TokenStream": ...

    def __next__(self) -> TokenDocument | BadRecord: ...

    def position(self) -> Position: ...


class TokenizedSource(ABC):
    """A source of token ids. It needs the tokenizer that made them, and copies them."""

    splits: tuple[str, ...] = ()
    num_bytes: int | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """See `Source`."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """See `Source`."""

    def for_vocabulary(self, vocab_size: int) -> "TokenizedSource":
        """Returns the source as it is read if the tokenizer has `vocab_size` tokens.

        Raises:
            CorpusError: if its files cannot be of such a tokenizer.
        """
        return self

    @abstractmethod
    def open_tokens(
        self, split: str | None, eos_id: int, position: Position | None = None
    ) -> TokenStream:
        """Opens one of `splits`, or all documents if there are none, at the start or at `position`.

        Args:
            eos_id: the token that ends a document.
        """


@dataclass(frozen=True)
class FlatTokens:
    """Tokens one after another, in which an end token follows each document."""

    name: str
    """The file or table, for errors."""
    num_tokens: int
    read: Callable[[int, int], NDArray[np.integer]]
    """Called with first and end; returns the tokens between them."""
    fix: str = FIX_TOKENIZER
    """What to do if there is no end token."""


class FlatStream:
    """The documents of flat tokens; what follows the last end token is a document too.

    Args:
        pieces: read in order; a document does not continue from one to the next.
        position: as of `position()`.
    """

    def __init__(
        self, pieces: Sequence[FlatTokens], eos_id: int, position: Position | None
    ) -> None:
        self._pieces = pieces
        self._eos_id = eos_id
        self._piece, self._token = checked_position(position, "file", "token")
        self._documents = self._read()

    def __iter__(self) -> "FlatStream":
        return self

    def __next__(self) -> TokenDocument:
        piece, end, document = next(self._documents)
        self._piece, self._token = piece, end
        return document

    def position(self) -> Position:
        return {"file": self._piece, "token": self._token}

    def _read(self) -> Iterator[tuple[int, int, TokenDocument]]:
        """Yields documents with their piece and the token after their end."""
        start = self._token
        for number in range(self._piece, len(self._pieces)):
            piece = self._pieces[number]
            held: list[NDArray[np.integer]] = []
            num_held, at = 0, start
            has_end = start > 0  # a position is after an end
            while at < piece.num_tokens:
                block = piece.read(at, min(at + _BLOCK_TOKENS, piece.num_tokens))
                first = 0
                for end in np.flatnonzero(block == self._eos_id).tolist():
                    ids = np.concatenate([*held, block[first:end]])
                    held, num_held, first = [], 0, end + 1
                    has_end = True
                    yield number, at + first, _document(piece, at + end - len(ids), ids)
                held.append(block[first:])
                num_held += len(block) - first
                at += len(block)
                if num_held > MAX_DOCUMENT_TOKENS:
                    raise CorpusError(
                        f"{piece.name}: no end-of-document token {self._eos_id} in "
                        f"{num_held:,} tokens; {piece.fix}"
                    )
            if num_held and not has_end:
                logger.warning(
                    "%s: no end-of-document token %d in %s tokens, so they are one document; %s",
                    piece.name,
                    self._eos_id,
                    f"{num_held:,}",
                    piece.fix,
                )
            if num_held:
                yield number, at, _document(piece, at - num_held, np.concatenate(held))
            start = 0


def _document(piece: FlatTokens, first: int, ids: NDArray[np.integer]) -> TokenDocument:
    return TokenDocument(ids, f"{piece.name}, token {first:,} ff.")


def checked_position(position: Position | None, *keys: str) -> list[int]:
    """Returns the values of a position's keys, or zeros at the start.

    Raises:
        CorpusError: if it is not the position of such a stream.
    """
    if position is None:
        return [0] * len(keys)
    values = [position.get(key) for key in keys]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise CorpusError(
            f"{position}: expected {', '.join(keys)}; prepare the corpus from scratch"
        )
    return [int(value) for value in values]  # type: ignore[call-overload]


def file_identity(root: Path, files: Sequence[Path]) -> list[list[object]]:
    """Name, size and time of files, which change if their contents do."""
    return [
        [file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
    ]
