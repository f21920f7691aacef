"""Folders of text, JSON lines and Parquet files."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from switchtitan.data.sources.dataset import Position
from switchtitan.errors import CorpusError

TEXT_DOCUMENT_BYTES = 64 * 1024
"""A text file up to this size is one document. A longer one is split at line ends into documents of
about this size, so that a corpus in a single file has documents to hold out."""

_PARQUET_ROWS = 256

Reader = Callable[[Path], Iterator[str]]


class FileStream:
    """The documents of files, read in order.

    Args:
        files: in the order to read them.
        read: yields the documents of one file.
        position: the position to start at.
    """

    def __init__(self, files: Sequence[Path], read: Reader, position: Position | None) -> None:
        self._files = files
        self._read = read
        self._file = int(str(position["file"])) if position else 0
        self._document = 0
        self._documents: Iterator[str] | None = None
        for _ in range(int(str(position["document"])) if position else 0):
            next(self)

    def __iter__(self) -> "FileStream":
        return self

    def __next__(self) -> str:
        while self._file < len(self._files):
            if self._documents is None:
                self._documents = self._read(self._files[self._file])
            try:
                text = next(self._documents, None)
            except OSError as error:
                raise CorpusError(
                    f"{self._files[self._file]}: cannot be read ({error.strerror}); fix or remove "
                    "it"
                ) from error
            if text is not None:
                self._document += 1
                return text
            self._file, self._document, self._documents = self._file + 1, 0, None
        raise StopIteration

    def position(self) -> Position:
        return {"file": self._file, "document": self._document}


class FileSource:
    """All files of one kind in a folder, or a single file, without its own splits.

    Args:
        kind: the kind of files, for messages.
        path: a folder, read recursively in the order of names, or one file.
        patterns: names of the files to read in a folder.
        read: yields the documents of one file.
        text_column: the column that `read` reads, if documents are records.

    Raises:
        CorpusError: if the path does not exist or holds no such file.
    """

    splits: tuple[str, ...] = ()

    def __init__(
        self,
        kind: str,
        path: Path,
        patterns: Sequence[str],
        read: Reader,
        text_column: str | None = None,
    ) -> None:
        self._kind = kind
        self._path = path
        self._read = read
        self._text_column = text_column
        self._files = _find_files(kind, path, patterns)

    @property
    def description(self) -> str:
        return f"{len(self._files)} {self._kind} file(s) in {self._path}"

    @property
    def num_bytes(self) -> int | None:
        return sum(file.stat().st_size for file in self._files) if self._kind == "text" else None

    def identity(self) -> Mapping[str, object]:
        root = self._path if self._path.is_dir() else self._path.parent
        return {
            "kind": self._kind,
            "text_column": self._text_column,
            "files": [
                [file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
                for file in self._files
            ],
        }

    def open(self, split: str | None, position: Position | None = None) -> FileStream:
        assert split is None
        return FileStream(self._files, self._read, position)


def text_source(path: Path | None, text_column: str | None) -> FileSource:
    """Text files (`*.txt`, `*.text`, `*.md`)."""
    return FileSource("text", _given(path), ("*.txt", "*.text", "*.md"), read_text)


def jsonl_source(path: Path | None, text_column: str | None) -> FileSource:
    """Files with one JSON object per line (`*.jsonl`, `*.json`)."""
    column = text_column or "text"
    return FileSource(
        "jsonl",
        _given(path),
        ("*.jsonl", "*.json"),
        lambda file: _read_json_lines(file, column),
        column,
    )


def gzipped_json_source(path: Path | None, text_column: str | None) -> FileSource:
    """Gzipped files with one JSON object per line (`*.json.gz`, `*.jsonl.gz`)."""
    column = text_column or "text"
    patterns = ("*.json.gz", "*.jsonl.gz")
    return FileSource(
        "json.gz",
        _given(path),
        patterns,
        lambda file: _read_gzipped_json_lines(file, column),
        column,
    )


def parquet_source(path: Path | None, text_column: str | None) -> FileSource:
    """Parquet files (`*.parquet`)."""
    column = text_column or "text"
    return FileSource(
        "parquet", _given(path), ("*.parquet",), lambda file: _read_parquet(file, column), column
    )


def read_text(file: Path) -> Iterator[str]:
    """Yields a UTF-8 file as one document, or a long one in pieces that end at line ends.

    Raises:
        CorpusError: if it is not UTF-8.
    """
    lines: list[str] = []
    num_bytes = 0
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for line in stream:
                lines.append(line)
                num_bytes += len(line.encode())
                if num_bytes >= TEXT_DOCUMENT_BYTES:
                    yield "".join(lines)
                    lines, num_bytes = [], 0
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file}: expected UTF-8 text ({error.reason}); convert it, e.g. with iconv"
        ) from error
    if lines:
        yield "".join(lines)


def _given(path: Path | None) -> Path:
    assert path is not None, "DataConfig requires path"
    return path


def _find_files(kind: str, path: Path, patterns: Sequence[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise CorpusError(
            f"[data] path = {str(path)!r}: no such file or folder; expected {kind} files"
        )
    files = sorted(
        {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()},
        key=lambda file: file.relative_to(path).as_posix(),
    )
    if not files:
        raise CorpusError(
            f"[data] path = {str(path)!r}: no {kind} files; expected names {', '.join(patterns)}"
        )
    return files


def _read_json_lines(file: Path, column: str) -> Iterator[str]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _text_of_line(line, column, f"{file}, line {number}")


def _read_gzipped_json_lines(file: Path, column: str) -> Iterator[str]:
    try:
        with gzip.open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _text_of_line(line, column, f"{file}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{file}: damaged or truncated gzip file ({error}); replace it"
        ) from error


def _text_of_line(line: bytes, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CorpusError(
            f"{where}: expected one JSON object per line ({error}); fix the file"
        ) from error
    if not isinstance(record, dict):
        raise CorpusError(
            f"{where}: expected a JSON object, got {type(record).__name__}; fix the file"
        )
    if not isinstance(record.get(column), str):
        raise CorpusError(
            f"{where}: expected a string under the key {column!r}, found the keys "
            f"{', '.join(sorted(record))}; set [data] text_column"
        )
    return str(record[column])


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise CorpusError(
                    f"{file}: no column {column!r}, found {', '.join(table.schema_arrow.names)}; "
                    "set [data] text_column"
                )
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise CorpusError(
                            f"{file}: column {column!r} holds {type(text).__name__}, expected "
                            "strings; set [data] text_column"
                        )
                    yield text
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{file}: damaged Parquet file ({error}); replace it") from error
