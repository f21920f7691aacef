"""Folders of text, JSON lines and Parquet files."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from switchtitan.data.sources.dataset import BadRecord, Position, SourceKeys
from switchtitan.errors import CorpusError, abbreviate
from switchtitan.files import exists

logger = logging.getLogger(__name__)

TEXT_DOCUMENT_BYTES = 64 * 1024
"""A text file up to this size is one document. A longer one is split at line ends into documents of
about this size, so that a corpus in a single file has documents to hold out."""

_PARQUET_ROWS = 256

Reader = Callable[[Path], Iterator[str | BadRecord]]


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
        self._file = 0
        self._document = 0  # bad records are counted too
        self._documents: Iterator[str | BadRecord] | None = None
        if position:
            self._seek(position)

    def __iter__(self) -> "FileStream":
        return self

    def _seek(self, position: Position) -> None:
        file, document = position.get("file"), position.get("document")
        if not isinstance(file, int) or not isinstance(document, int) or min(file, document) < 0:
            raise CorpusError(f"{position}: no position in files; prepare the corpus from scratch")
        self._file = file
        for _ in range(document):
            next(self, None)

    def __next__(self) -> str | BadRecord:
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
        self._files = find_files(kind, path, patterns)
        self._has_named_links = False

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
        if position is None and not self._has_named_links:
            self._has_named_links = True
            _warn_of_links(self._path, self._files)
        return FileStream(self._files, self._read, position)


def text_source(keys: SourceKeys) -> FileSource:
    """Text files (`*.txt`, `*.text`, `*.md`)."""
    return FileSource("text", keys.needed_path(), ("*.txt", "*.text", "*.md"), read_text)


def jsonl_source(keys: SourceKeys) -> FileSource:
    """Files with one JSON object per line (`*.jsonl`, `*.json`)."""
    column = keys.text_column or "text"
    return FileSource(
        "jsonl",
        keys.needed_path(),
        ("*.jsonl", "*.json"),
        lambda file: _read_json_lines(file, column),
        column,
    )


def gzipped_json_source(keys: SourceKeys) -> FileSource:
    """Gzipped files with one JSON object per line (`*.json.gz`, `*.jsonl.gz`)."""
    column = keys.text_column or "text"
    patterns = ("*.json.gz", "*.jsonl.gz")
    return FileSource(
        "json.gz",
        keys.needed_path(),
        patterns,
        lambda file: _read_gzipped_json_lines(file, column),
        column,
    )


def parquet_source(keys: SourceKeys) -> FileSource:
    """Parquet files (`*.parquet`)."""
    column = keys.text_column or "text"
    return FileSource(
        "parquet",
        keys.needed_path(),
        ("*.parquet",),
        lambda file: _read_parquet(file, column),
        column,
    )


def read_text(file: Path) -> Iterator[str | BadRecord]:
    """Yields a UTF-8 file as one document, or a long one in pieces that end at line ends.

    A line that is not UTF-8 is a bad record. The document continues after it.
    """
    lines: list[str] = []
    num_bytes = 0
    with file.open(encoding="utf-8", newline="", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                num_bytes += len(line.encode())
            except UnicodeEncodeError:
                yield BadRecord(
                    f"{file}, line {number}: expected UTF-8 text", "convert it, e.g. with iconv"
                )
                continue
            lines.append(line)
            if num_bytes >= TEXT_DOCUMENT_BYTES:
                yield "".join(lines)
                lines, num_bytes = [], 0
    if lines:
        yield "".join(lines)


def find_files(kind: str, path: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the files of a folder, or the one file that `path` is.

    Raises:
        CorpusError: if there is none.
    """
    if not exists(path):
        raise CorpusError(
            f"[data] path = {str(path)!r}: no such file or folder; expected {kind} files"
        )
    if path.is_file():
        return [path]
    found = {file for pattern in patterns for file in path.rglob(pattern) if not file.is_dir()}
    files = sorted(found, key=lambda file: file.relative_to(path).as_posix())
    for file in files:
        if not file.is_file():
            raise CorpusError(f"{file}: is not a file, or a link to a missing one; remove it")
    if not files:
        raise CorpusError(
            f"[data] path = {str(path)!r}: no {kind} files; expected names {', '.join(patterns)}"
        )
    return files


def _warn_of_links(path: Path, files: Sequence[Path]) -> None:
    """Logs that files of a folder are links out of it: their targets become training text."""
    if not path.is_dir():
        return
    root = path.resolve()
    outside = [file for file in files if not file.resolve().is_relative_to(root)]
    if outside:
        logger.warning(
            "%d of %d files in %s are links out of it, such as %s -> %s",
            len(outside),
            len(files),
            path,
            outside[0].name,
            outside[0].resolve(),
        )


def _read_json_lines(file: Path, column: str) -> Iterator[str | BadRecord]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield text_of_line(line, column, f"{file}, line {number}")


def _read_gzipped_json_lines(file: Path, column: str) -> Iterator[str | BadRecord]:
    try:
        with gzip.open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield text_of_line(line, column, f"{file}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{file}: damaged or truncated gzip file ({error}); replace it"
        ) from error


def text_of_line(line: bytes, column: str, where: str) -> str | BadRecord:
    """Returns the text of a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord(f"{where}: expected one JSON object per line ({error})", "fix the file")
    if not isinstance(record, dict):
        kind = type(record).__name__
        return BadRecord(f"{where}: expected a JSON object, got {kind}", "fix the file")
    if not isinstance(record.get(column), str):
        return BadRecord(
            f"{where}: expected a string under the key {column!r}, found the keys "
            f"{abbreviate(sorted(record))}",
            "set [data] text_column",
        )
    return str(record[column])


def _read_parquet(file: Path, column: str) -> Iterator[str | BadRecord]:
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise CorpusError(
                    f"{file}: no column {column!r}, found {', '.join(table.schema_arrow.names)}; "
                    "set [data] text_column"
                )
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield text_of_value(value, f"{file}, row {row}: column {column!r}")
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise CorpusError(f"{file}: damaged Parquet file ({error}); replace it") from error


def text_of_value(value: pyarrow.Scalar, where: str) -> str | BadRecord:
    """Returns the text of a cell of a table."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f"{where}: expected UTF-8 text ({error.reason})", "fix the file")
    if not isinstance(text, str):
        return BadRecord(
            f"{where} holds {type(text).__name__}, expected strings", "set [data] text_column"
        )
    return text
