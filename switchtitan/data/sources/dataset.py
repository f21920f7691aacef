"""The interface of corpus sources: documents in a fixed order, from any position reached before."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from switchtitan.data.sources.tokenized import TokenizedSource

Position = dict[str, object]
"""A position in a stream as JSON values; opaque to all but the source that wrote it."""


@dataclass(frozen=True)
class SourceKeys:
    """The keys of `[data]` that say which documents to read."""

    path: Path | None = None
    text_column: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None

    def needed_path(self) -> Path:
        """Returns `path` of a dataset that requires it."""
        assert self.path is not None, "DataConfig requires path"
        return self.path


@dataclass(frozen=True)
class BadRecord:
    """A record of a source that holds no text, such as a malformed line."""

    what: str
    """`file, line: what is wrong`."""
    fix: str
    """What to do."""


class DocumentStream(Protocol):
    """The documents of one stream, in an order that never changes."""

    def __iter__(self) -> "DocumentStream": ...

    def __next__(self) -> str | BadRecord:
        """Returns the next document's text; raises CorpusError if the source is damaged or lost."""
        ...

    def position(self) -> Position:
        """Returns the position of the next document, for `Source.open`."""
        ...


class Source(Protocol):
    """A source of documents."""

    @property
    def description(self) -> str:
        """The documents, for people and for a run's metadata."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """The source's own splits, in the order to prepare them; empty if we split the
        documents."""
        ...

    @property
    def num_bytes(self) -> int | None:
        """Total bytes of text, for the progress bar; None if unknown before reading."""
        ...

    def identity(self) -> Mapping[str, object]:
        """Returns JSON values that determine the documents and their order."""
        ...

    def open(self, split: str | None, position: Position | None = None) -> DocumentStream:
        """Opens one of `splits`, or all documents if there are none, at the start or at
        `position`."""
        ...


class HubDataset(ABC):
    """A source on the Hugging Face hub, whose documents may change with a commit."""

    @abstractmethod
    def newest_revision(self) -> str | None:
        """Asks the hub for the newest commit; None for a local copy.

        Raises:
            CorpusError: if the hub does not answer.
        """

    @abstractmethod
    def at_revision(self, revision: str) -> "Source":
        """Returns the source as of a commit."""


@dataclass(frozen=True)
class Dataset:
    """A dataset's source, and the keys of `[data]` that have an effect on it."""

    open: "Callable[[SourceKeys], Source | TokenizedSource]"
    """Reads no document. May raise CorpusError."""
    path: Literal["required", "optional", "unused"] = "unused"
    """Whether `path` must or may be set."""
    has_text_column: bool = False
    """Whether documents are records with columns, so that `text_column` has an effect."""
    has_own_splits: bool = False
    """Whether the source always has its own splits, so that no fraction is held out."""
    can_skip_records: bool = False
    """Whether its streams return malformed records, so that `on_bad_record` has an effect."""
    comes_from_hub: bool = False
    """Whether it is on the Hugging Face hub, unless `path` is set to a folder."""
    has_hub_keys: bool = False
    """Whether `hub_config` and `hub_split` have an effect."""
    holds_tokens: bool = False
    """Whether it always holds token ids, so that `tokenizer` must be the one that made them."""
    max_documents: int | None = None
    """`max_documents` if the key is not set."""
