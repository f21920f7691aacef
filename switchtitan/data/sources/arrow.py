"""Datasets that Hugging Face's `save_to_disk` wrote, with text or with token ids."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.sources.dataset import BadRecord, Position, Source, SourceKeys
from switchtitan.data.sources.files import text_of_value
from switchtitan.data.sources.tokenized import (
    FIX_TOKENIZER,
    NO_TOKEN,
    FlatStream,
    FlatTokens,
    TokenDocument,
    TokenizedSource,
    TokenStream,
    checked_position,
    file_identity,
)
from switchtitan.errors import CorpusError
from switchtitan.files import is_plain_name

if TYPE_CHECKING:
    from datasets import Dataset

IDS_COLUMN = "input_ids"
MASK_COLUMN = "attention_mask"
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_STATE_FILE = "state.json"
_ROWS = 256
_PEEKED_ROWS = 1000

_Document = TypeVar("_Document", str | BadRecord, TokenDocument | BadRecord)


class _Tables:
    """The splits of a saved dataset, memory-mapped."""

    def __init__(self, path: Path) -> None:
        from datasets import DatasetDict, load_from_disk  # the import takes a second or two

        self.path = path
        _check_names(path)
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:  # the library raises many kinds for a damaged folder
            raise CorpusError(
                f"[data] path = {str(path)!r}: cannot be loaded ({type(error).__name__}: {error}); "
                "expected a folder that datasets' save_to_disk wrote"
            ) from error
        self.by_split: dict[str | None, Dataset] = {None: loaded}
        if isinstance(loaded, DatasetDict):
            if "train" not in loaded:
                raise CorpusError(
                    f"[data] path = {str(path)!r}: no split 'train', found {', '.join(loaded)}; "
                    "set path to the folder of one of them"
                )
            self.by_split = {None: loaded["train"]}
            for name in _VALIDATION_NAMES:
                if name in loaded:
                    self.by_split = {"train": loaded["train"], "validation": loaded[name]}
                    break

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in self.by_split if split is not None)

    @property
    def columns(self) -> list[str]:
        return list(next(iter(self.by_split.values())).column_names)

    def identity(self) -> dict[str, object]:
        files = sorted(self.path.rglob("*.arrow"))
        return {"kind": "arrow", "files": file_identity(self.path, files)}

    def where(self, split: str | None) -> str:
        return str(self.path if split is None else self.path / split)

    def num_rows(self, split: str | None) -> int:
        return len(self.by_split[split])

    def rows(self, split: str | None, first: int, end: int, columns: list[str]) -> Any:
        """Rows as a `pyarrow.Table`."""
        try:
            table = self.by_split[split].select_columns(columns).with_format("arrow")
            return table[first:end]
        except Exception as error:  # see __init__
            raise CorpusError(
                f"{self.where(split)}, rows {first:,} ff.: cannot be read ({error}); replace them"
            ) from error


def _check_names(path: Path) -> None:
    """Checks that the dataset's files are in its own folder.

    Raises:
        CorpusError: names the one that is not.
    """
    for state in sorted(path.rglob(_STATE_FILE)):
        try:
            names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorpusError(
                f"{state}: damaged ({type(error).__name__}: {error}); save the dataset again"
            ) from error
        for name in names:
            if not isinstance(name, str) or not is_plain_name(name):
                raise CorpusError(
                    f"{state}: names the file {name!r}, expected one in its folder; do not use "
                    "this dataset"
                )


class _Rows(Generic[_Document]):
    """The documents of one split, one in each row.

    Args:
        read: yields the documents from a row on.
        position: as of `position()`.
    """

    def __init__(
        self, read: Callable[[int], Iterator[_Document]], position: Position | None
    ) -> None:
        (self._row,) = checked_position(position, "row")
        self._documents: Iterator[_Document] = read(self._row)

    def __iter__(self) -> "_Rows[_Document]":
        return self

    def __next__(self) -> _Document:
        document = next(self._documents)
        self._row += 1
        return document

    def position(self) -> Position:
        return {"row": self._row}


class ArrowTextSource:
    """A saved dataset with a column of text."""

    num_bytes: int | None = None

    def __init__(self, tables: _Tables, column: str) -> None:
        self._tables, self._column = tables, column

    @property
    def splits(self) -> tuple[str, ...]:
        return self._tables.splits

    @property
    def description(self) -> str:
        return f"saved dataset {self._tables.path}, column {self._column!r}"

    def identity(self) -> Mapping[str, object]:
        return {**self._tables.identity(), "text_column": self._column}

    def open(self, split: str | None, position: Position | None = None) -> _Rows[str | BadRecord]:
        return _Rows(partial(self._read, split), position)

    def _read(self, split: str | None, start: int) -> Iterator[str | BadRecord]:
        where = self._tables.where(split)
        for first in range(start, self._tables.num_rows(split), _ROWS):
            rows = self._tables.rows(split, first, first + _ROWS, [self._column])
            for number, value in enumerate(rows.column(0), start=first + 1):
                yield text_of_value(value, f"{where}, row {number}: column {self._column!r}")


class ArrowTokenSource(TokenizedSource):
    """A saved dataset with a column of token ids.

    Rows of one length without an attention mask are packed: they are joined, and documents end at
    end tokens. Other rows are a document each, without what the attention mask leaves out.
    """

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self.splits = tables.splits
        self._packed = {split: self._packed_length(split) for split in tables.by_split}

    @property
    def description(self) -> str:
        length = next(iter(self._packed.values()))
        rows = "documents" if length is None else f"packed rows of {length} tokens"
        return f"saved dataset {self._tables.path}, {rows}"

    def identity(self) -> Mapping[str, object]:
        return self._tables.identity()

    def open_tokens(
        self, split: str | None, eos_id: int, position: Position | None = None
    ) -> TokenStream:
        length = self._packed[split]
        if length is None:
            return _Rows(partial(self._read, split, eos_id), position)
        return FlatStream([self._flat(split, length)], eos_id, position)

    def _read(
        self, split: str | None, eos_id: int, start: int
    ) -> Iterator[TokenDocument | BadRecord]:
        columns = [name for name in (IDS_COLUMN, MASK_COLUMN) if name in self._tables.columns]
        where = self._tables.where(split)
        for first in range(start, self._tables.num_rows(split), _ROWS):
            rows = self._tables.rows(split, first, first + _ROWS, columns)
            for number, row in enumerate(rows.to_pylist(), start=first + 1):
                yield _document(row, f"{where}, row {number}", eos_id)

    def _packed_length(self, split: str | None) -> int | None:
        """The length of the first rows if they are packed, otherwise None."""
        if MASK_COLUMN in self._tables.columns:
            return None
        rows = self._tables.rows(split, 0, _PEEKED_ROWS, [IDS_COLUMN])
        lengths = {len(ids) if ids is not None else 0 for ids in rows.column(0).to_pylist()}
        return lengths.pop() if len(lengths) == 1 and rows.num_rows > 1 and min(lengths) else None

    def _flat(self, split: str | None, length: int) -> FlatTokens:
        where = self._tables.where(split)

        def read(first: int, end: int) -> NDArray[np.integer]:
            first_row = first // length
            rows = self._tables.rows(split, first_row, -(-end // length), [IDS_COLUMN])
            ids = rows.column(0).combine_chunks()
            tokens = ids.flatten()
            if tokens.null_count:
                tokens = tokens.cast("int64").fill_null(NO_TOKEN)
            values = tokens.to_numpy(zero_copy_only=False)
            if len(values) != length * len(ids) or ids.null_count:
                raise CorpusError(
                    f"{where}, rows {first_row + 1:,} ff.: expected {length} tokens in each row, "
                    "as in the first ones; fix the dataset"
                )
            return values[first - first_row * length : end - first_row * length]

        fix = f"{FIX_TOKENIZER}, or add a column {MASK_COLUMN!r} if each row is a document"
        name = f"{where}, joined rows of {length} tokens"
        return FlatTokens(name, self._tables.num_rows(split) * length, read, fix)


def _document(row: dict[str, Any], where: str, eos_id: int) -> TokenDocument | BadRecord:
    ids, mask = row[IDS_COLUMN], row.get(MASK_COLUMN)
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        return BadRecord(f"{where}: {IDS_COLUMN} is no list of integers", "fix the dataset")
    if mask is not None:
        if len(mask) != len(ids):
            return BadRecord(
                f"{where}: {len(ids)} {IDS_COLUMN}, but {len(mask)} of {MASK_COLUMN}",
                "fix the dataset",
            )
        ids = [token for token, is_kept in zip(ids, mask, strict=True) if is_kept]
    if ids and ids[-1] == eos_id:
        del ids[-1]
    return TokenDocument(np.array(ids, dtype=np.int64), where)


def arrow_source(keys: SourceKeys) -> Source | TokenizedSource:
    """A dataset that `save_to_disk` wrote: `text_column`, or `input_ids`, or `text`."""
    tables = _Tables(keys.needed_path())
    if keys.text_column is None and IDS_COLUMN in tables.columns:
        return ArrowTokenSource(tables)
    column = keys.text_column or "text"
    if column not in tables.columns:
        raise CorpusError(
            f"[data] path = {str(keys.path)!r}: no column {column!r}, found "
            f"{', '.join(tables.columns)}; set [data] text_column"
        )
    return ArrowTextSource(tables, column)
