"""English C4 (Raffel et al. 2020, arXiv 1910.10683), from the Hugging Face hub or a local copy."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from switchtitan.data.sources.dataset import Position
from switchtitan.errors import CorpusError

if TYPE_CHECKING:
    from datasets import IterableDataset

HUB_NAME = "allenai/c4"
DATA_FILES = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}


class C4Stream:
    """One split of C4. Its position is the streaming dataset's state, which skips files already
    read."""

    def __init__(self, dataset: "IterableDataset", where: str) -> None:
        self._dataset = dataset
        self._where = where
        self._rows: Iterator[Mapping[str, object]] = iter(dataset)

    def __iter__(self) -> "C4Stream":
        return self

    def __next__(self) -> str:
        try:
            return str(next(self._rows)["text"])
        except StopIteration:
            raise
        except Exception as error:  # The hub's clients raise the errors of their transports.
            raise CorpusError(
                f"{self._where}: reading C4 failed ({type(error).__name__}: {error}); run the same "
                "command again to resume after the last finished segment"
            ) from error

    def position(self) -> Position:
        return dict(self._dataset.state_dict())


class C4Source:
    """C4's own train and validation splits.

    Args:
        path: a local copy of the hub's folder; None streams from the hub.

    Raises:
        CorpusError: if the local copy lacks files.
    """

    splits: tuple[str, ...] = ("train", "validation")
    num_bytes: int | None = None

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            for pattern in DATA_FILES.values():
                if not any(path.glob(pattern)):
                    raise CorpusError(
                        f"[data] path = {str(path)!r}: no files {pattern}; expected a copy of the "
                        f"files of {HUB_NAME}"
                    )

    @property
    def description(self) -> str:
        return f"C4 English ({self._path or f'hub: {HUB_NAME}'})"

    def identity(self) -> Mapping[str, object]:
        if self._path is None:
            return {"kind": "c4", "hub": HUB_NAME}
        files = sorted(file for pattern in DATA_FILES.values() for file in self._path.glob(pattern))
        return {
            "kind": "c4",
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        }

    def open(self, split: str | None, position: Position | None = None) -> C4Stream:
        assert split is not None
        # The import takes a second or two; only preparation needs it.
        from datasets import load_dataset

        where = str(self._path or HUB_NAME)
        try:
            dataset = load_dataset(where, data_files=DATA_FILES, split=split, streaming=True)
            dataset = dataset.select_columns(["text"])
            if position is not None:
                dataset.load_state_dict(position)
            return C4Stream(dataset, where)
        except Exception as error:  # See __next__.
            raise CorpusError(
                f"{where}: C4 cannot be opened ({type(error).__name__}: {error}); check the "
                "connection, or set [data] path to a local copy"
            ) from error


def c4_source(path: Path | None, text_column: str | None) -> C4Source:
    """C4 from the hub, or from a local copy at `path`."""
    return C4Source(path)
