"""What every corpus source offers: its documents in a fixed order, from any point that was reached before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Position = dict[str, object]
"""How far a stream has been read, as JSON values; only the source that wrote it understands it."""


class DocumentStream(Protocol):
    """The documents of one stream, in an order that never changes."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> str:
        """The next document's text; raises CorpusError where the source is damaged or lost."""
        ...

    def position(self) -> Position:
        """Where the next document begins; opening the source there continues with it."""
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


@dataclass(frozen=True)
class Dataset:
    """How a dataset is opened, and which keys of `[data]` have an effect on it."""

    open: Callable[[Path | None, str | None], Source]
    """Called with `path` and `text_column`; reads no document. May raise CorpusError."""
    path: Literal["required", "optional", "unused"] = "unused"
    """Whether `path` must or may be set."""
    has_text_column: bool = False
    """Whether documents are records, so that `text_column` names the one with the text."""
    has_own_splits: bool = False
    """Whether the source has train and validation splits, so that no fraction is held out."""
    comes_from_hub: bool = False
    """Whether it is read from the Hugging Face hub unless `path` is set."""
