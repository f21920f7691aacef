"""English C4 (Raffel et al. 2020, arXiv 1910.10683), from the Hugging Face hub or a local copy."""

from collections.abc import Mapping
from pathlib import Path

from switchtitan.data.sources.arrow import arrow_source
from switchtitan.data.sources.dataset import HubDataset, Position, Source, SourceKeys
from switchtitan.data.sources.hub import HubStream, newest_commit
from switchtitan.data.sources.tokenized import TokenizedSource
from switchtitan.errors import CorpusError
from switchtitan.files import exists

HUB_NAME = "allenai/c4"
DATA_FILES = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}


class C4Source(HubDataset):
    """C4's own train and validation splits.

    Args:
        path: a local copy of the hub's folder; None streams from the hub.
        revision: the commit to read from the hub; None for the newest one.

    Raises:
        CorpusError: if the local copy lacks files.
    """

    splits: tuple[str, ...] = ("train", "validation")
    num_bytes: int | None = None

    def __init__(self, path: Path | None, revision: str | None = None) -> None:
        self._path = path
        self._revision = revision
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

    def open(self, split: str | None, position: Position | None = None) -> HubStream:
        assert split is not None
        # The import takes a second or two; only preparation needs it.
        from datasets import load_dataset

        where = str(self._path or HUB_NAME)
        try:
            dataset = load_dataset(
                where,
                data_files=DATA_FILES,
                split=split,
                streaming=True,
                revision=self._revision,
            )
            dataset = dataset.select_columns(["text"])
            if position is not None:
                dataset.load_state_dict(position)
            return HubStream(dataset, where, "text")
        except Exception as error:  # See HubStream.
            raise _cannot_open(where, error) from error

    def newest_revision(self) -> str | None:
        if self._path is not None:
            return None
        try:
            return newest_commit(HUB_NAME)
        except Exception as error:  # See HubStream.
            raise _cannot_open(HUB_NAME, error) from error

    def at_revision(self, revision: str) -> "C4Source":
        return C4Source(self._path, revision)


def _cannot_open(where: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{where}: C4 cannot be opened ({type(error).__name__}: {error}); check the connection, or "
        "set [data] path to a local copy"
    )


def c4_source(keys: SourceKeys) -> C4Source:
    """C4 from the hub, or from a local copy at `path`."""
    return C4Source(keys.path)


def published_c4_source(keys: SourceKeys) -> Source | TokenizedSource:
    """The first documents of C4, as the published runs used them.

    `path` is what their script saved (packed rows of token ids), or a copy of the hub's files.
    """
    if keys.path is not None and exists(keys.path / "dataset_dict.json"):
        return arrow_source(keys)
    return C4Source(keys.path)
