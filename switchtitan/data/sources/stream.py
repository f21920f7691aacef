"""What every corpus source offers: its documents in a fixed order, from any point that was reached before."""

from collections.abc import Mapping
from typing import Protocol

Position = dict[str, object]
"""How far a stream has been read, as JSON values; only the source that wrote it understands it."""


class DocumentStream(Protocol):
    """The documents of one stream, in an order that never changes."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> str:
        """The next document's text; raises CorpusError where the source is damaged or lost."""
        ...

    def position(self) -> Position:
        """Where the next document begins; opening the source there goes on with it."""
        ...


class Source(Protocol):
    """A place that documents come from."""

    @property
    def description(self) -> str:
        """What the documents are, for people and for a run's metadata."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the source itself has, in the order to prepare them; none where documents are dealt
        by us."""
        ...

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text in all, for the progress bar; None where that is not known before reading."""
        ...

    def identity(self) -> Mapping[str, object]:
        """JSON values that determine the documents and their order."""
        ...

    def open(self, split: str | None, position: Position | None = None) -> DocumentStream:
        """Opens one of `splits`, or everything where there are none, at the start or at a position reached
        before."""
        ...
