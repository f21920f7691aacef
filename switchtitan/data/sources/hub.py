"""Any dataset of text on the Hugging Face hub, or in a local folder with the same layout."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from switchtitan.data.sources.dataset import BadRecord, HubDataset, Position, SourceKeys
from switchtitan.errors import CorpusError, abbreviate

if TYPE_CHECKING:
    from datasets import IterableDataset


class HubStream:
    """One split of a streamed dataset. Its position is the dataset's state, which skips files
    already read.

    Args:
        where: the dataset, for errors.
        column: the column with the text.
    """

    def __init__(self, dataset: "IterableDataset", where: str, column: str) -> None:
        self._dataset = dataset
        self._where = where
        self._column = column
        self._row = 0
        self._rows: Iterator[Mapping[str, object]] = iter(dataset)

    def __iter__(self) -> "HubStream":
        return self

    def __next__(self) -> str | BadRecord:
        try:
            row = next(self._rows)
        except StopIteration:
            raise
        except Exception as error:  # The hub's clients raise the errors of their transports.
            raise CorpusError(
                f"{self._where}: reading failed ({type(error).__name__}: {error}); run the same "
                "command again to resume after the last finished segment"
            ) from error
        self._row += 1
        text = row.get(self._column)
        if not isinstance(text, str):
            found = type(text).__name__ if self._column in row else abbreviate(sorted(row))
            return BadRecord(
                f"{self._where}, record {self._row} of those read: expected a string in the column "
                f"{self._column!r}, found {found}",
                "set [data] text_column",
            )
        return text

    def position(self) -> Position:
        return dict(self._dataset.state_dict())


class HubSource(HubDataset):
    """A dataset by name.

    `hub_split` is the split to read, of which documents are held out. By default, "train" is read,
    and "validation" is the validation split if the dataset has one.

    Args:
        revision: the commit to read; None for the newest one.
    """

    num_bytes: int | None = None

    def __init__(self, keys: SourceKeys, revision: str | None = None) -> None:
        self._keys = keys
        self._revision = revision
        self._name = str(keys.needed_path())
        self._column = keys.text_column or "text"

    @property
    def description(self) -> str:
        config = "" if self._keys.hub_config is None else f", {self._keys.hub_config}"
        return f"{self._name}{config}, split {self._keys.hub_split or 'train'}, {self._column!r}"

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Asks the hub unless `hub_split` is set."""
        if self._keys.hub_split is not None:
            return ()
        from datasets import get_dataset_split_names

        try:
            names = get_dataset_split_names(
                self._name, self._keys.hub_config, revision=self._revision
            )
        except Exception as error:  # see HubStream
            raise self._cannot_open(error) from error
        if "train" not in names:
            raise CorpusError(
                f"[data] path = {self._name!r}: no split 'train', found {', '.join(names)}; set "
                "[data] hub_split"
            )
        return ("train", "validation") if "validation" in names else ()

    def identity(self) -> Mapping[str, object]:
        return {
            "kind": "hub",
            "name": self._name,
            "config": self._keys.hub_config,
            "split": self._keys.hub_split,
            "text_column": self._column,
        }

    def open(self, split: str | None, position: Position | None = None) -> HubStream:
        from datasets import load_dataset  # the import takes a second or two

        split = split or self._keys.hub_split or "train"
        try:
            dataset = load_dataset(
                self._name,
                self._keys.hub_config,
                split=split,
                streaming=True,
                revision=self._revision,
            )
            if position is not None:
                dataset.load_state_dict(position)
            return HubStream(dataset, f"{self._name}, {split}", self._column)
        except Exception as error:  # see HubStream
            raise self._cannot_open(error) from error

    def newest_revision(self) -> str | None:
        if Path(self._name).is_dir():
            return None
        try:
            return newest_commit(self._name)
        except Exception as error:  # see HubStream
            raise self._cannot_open(error) from error

    def at_revision(self, revision: str) -> "HubSource":
        return HubSource(self._keys, revision)

    def _cannot_open(self, error: Exception) -> CorpusError:
        return CorpusError(
            f"[data] path = {self._name!r}: cannot be opened ({type(error).__name__}: {error}); "
            "expected the name of a dataset on the Hugging Face hub, or a folder with its files; "
            "check hub_config, hub_split and the connection"
        )


def newest_commit(name: str) -> str | None:
    """Asks the hub for the newest commit of a dataset. Raises the errors of the hub's client."""
    from huggingface_hub import HfApi

    commit: str | None = HfApi().dataset_info(name).sha
    return commit


def hub_source(keys: SourceKeys) -> HubSource:
    """A dataset on the Hugging Face hub."""
    return HubSource(keys)
