"""One row of `DATASETS`: what `[data] dataset` selects."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchtitan.data.sources.stream import Source


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
