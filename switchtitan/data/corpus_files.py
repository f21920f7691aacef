"""The files of a prepared corpus: `index.json`, and the checksums of all others."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from switchtitan.errors import CorpusError
from switchtitan.files import checksum_line, exists, file_inside, sha256_of_file, write_atomically
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
INDEX_CHECKSUM_FILE = f"{INDEX_FILE}.sha256"
"""The checksum of `index.json`, as `sha256sum` writes it. Corpora of version 0.2.0 have none."""
TOKENIZER_FILE = "tokenizer.json"
VERIFIED_FILE = "verified.json"
"""Sizes and times of the files of a large corpus when their checksums were last compared."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


TokenDtype = Literal["uint16", "uint32"]
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]


class ShardRecord(_Record):
    """One token file."""

    file: str
    documents: _Count
    tokens: _Count
    bytes_of_text: _Count
    sha256: str


class TokenizerRecord(_Record):
    """The tokenizer whose ids the shards hold; its file is next to them."""

    sha256: str
    vocab_size: int = Field(ge=1, le=1 << 32)
    eos_token: str
    eos_id: int = Field(ge=0)

    @model_validator(mode="after")
    def _end_token_is_in_the_vocabulary(self) -> "TokenizerRecord":
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id = {self.eos_id}: expected less than {self.vocab_size}")
        return self


class CorpusIndex(_Record):
    """The contents of `index.json`."""

    format_version: int
    name: str
    source: str
    """The documents, for people."""
    identity: dict[str, object]
    """Everything that determines documents and tokens; its hash is in the folder's name."""
    tokenizer: TokenizerRecord
    dtype: TokenDtype
    """Of the token files, little-endian."""
    splits: dict[str, list[ShardRecord]]
    document_caps: dict[str, _Count] = Field(default_factory=dict)
    """Held-out splits with documents that were cut: the most tokens of one document, its end
    included."""
    revision: str | None = None
    """The commit of a dataset on the Hugging Face hub; None for other sources."""
    fingerprint: str
    versions: dict[str, str]

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of every other file by name."""
        shards = [shard for split in self.splits.values() for shard in split]
        return {TOKENIZER_FILE: self.tokenizer.sha256} | {
            shard.file: shard.sha256 for shard in shards
        }

    def expected_fingerprint(self) -> str:
        return fingerprint_of(self.tokenizer.sha256, self.dtype, self.splits)

    def num_tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def num_documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits[split])


def fingerprint_of(tokenizer_sha256: str, dtype: str, splits: dict[str, list[ShardRecord]]) -> str:
    """32 hexadecimal digits, equal for two corpora only if tokens and tokenizer are the same."""
    contents = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_sha256,
        "dtype": dtype,
        "splits": {
            split: [[shard.tokens, shard.sha256] for shard in splits[split]] for split in splits
        },
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:32]


def read_index(folder: Path) -> CorpusIndex:
    """Reads the index of a prepared corpus.

    Raises:
        CorpusError: if it is missing, corrupted or of another format, or names a file outside of
            `folder`.
    """
    file = folder / INDEX_FILE
    try:
        contents = file_inside(folder, INDEX_FILE).read_bytes()
        index = CorpusIndex.model_validate_json(contents)
        checksum = _read_index_checksum(folder)
    except (OSError, ValueError) as error:
        raise damage(file, f"the index cannot be read ({_first_line(error)})") from error
    if index.format_version != FORMAT_VERSION:
        raise damage(
            file, f"the index has format {index.format_version}, expected {FORMAT_VERSION}"
        )
    if checksum not in (None, checksum_line(contents, INDEX_FILE)):
        raise damage(file, f"the index or its checksum in {INDEX_CHECKSUM_FILE} is damaged")
    if index.fingerprint != index.expected_fingerprint():
        raise damage(file, "the index does not match its own fingerprint")
    for name in index.checksums:
        try:
            file_inside(folder, name)
        except ValueError as error:
            raise damage(file, f"the index names a file, but {error}") from error
    return index


def _read_index_checksum(folder: Path) -> bytes | None:
    try:
        return file_inside(folder, INDEX_CHECKSUM_FILE).read_bytes()
    except FileNotFoundError:
        return None


def write_index(folder: Path, contents: str) -> None:
    """Writes the index and its checksum."""
    line = checksum_line(contents.encode(), INDEX_FILE)
    write_atomically(folder / INDEX_CHECKSUM_FILE, line)
    write_atomically(folder / INDEX_FILE, contents)


def check_sizes(folder: Path, index: CorpusIndex) -> None:
    """Compares the sizes of all token files with their numbers of tokens. Cheap.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    item_bytes = 2 if index.dtype == "uint16" else 4
    for shard in (shard for split in index.splits.values() for shard in split):
        num_bytes = state_of(folder / shard.file).num_bytes
        if num_bytes != shard.tokens * item_bytes:
            raise damage(
                folder / shard.file,
                f"the token shard has {num_bytes:,} bytes, expected {shard.tokens * item_bytes:,}",
            )


def verify_files(folder: Path, index: CorpusIndex, names: Iterable[str] | None = None) -> None:
    """Compares files of a corpus, by default all, with their checksums.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    chosen = list(index.checksums if names is None else names)
    with progress_bar(
        f"verifying {folder.name}", total=_num_bytes(folder, chosen), unit="B"
    ) as bar:
        for name in chosen:
            try:
                found = sha256_of_file(folder / name, bar.update)
            except OSError as error:
                problem = f"the file cannot be read ({error.strerror})"
                raise damage(folder / name, problem) from error
            if found != index.checksums[name]:
                raise damage(folder / name, "the file does not match its checksum")


def _num_bytes(folder: Path, names: Iterable[str]) -> int:
    files = [folder / name for name in names]
    return sum(file.stat().st_size for file in files if exists(file))


def verify_changed_files(folder: Path, index: CorpusIndex) -> None:
    """Compares the files that are new or changed since the last call with their checksums.

    Their sizes and times are stored in the folder, if it can be written.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    file = folder / VERIFIED_FILE
    try:
        known = _Verified.model_validate_json(file_inside(folder, VERIFIED_FILE).read_bytes()).files
    except (OSError, ValueError):
        known = {}
    # Before reading, so that a later change is noticed.
    states = {name: state_of(folder / name) for name in index.checksums}
    changed = [name for name, state in states.items() if known.get(name) != state]
    if not changed:
        return
    num_bytes = sum(states[name].num_bytes for name in changed)
    logger.info(
        "verifying %d new or changed files of %s, %.1f GiB", len(changed), folder, num_bytes / 2**30
    )
    verify_files(folder, index, changed)
    try:
        write_atomically(file, _Verified(files=states).model_dump_json())
    except OSError as error:
        logger.info("%s cannot be written (%s): the next start verifies again", file, error)


def damage(file: Path, what: str) -> CorpusError:
    """The error for a damaged file of a prepared corpus."""
    return CorpusError(
        f"{file}: {what}; delete the folder {file.parent} and run again to prepare it from scratch"
    )


class FileState(NamedTuple):
    """What changes if a file's contents change."""

    num_bytes: int
    mtime_ns: int
    ctime_ns: int


class _Verified(_Record):
    """The contents of `verified.json`."""

    # Not strict: JSON has no tuples.
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, FileState]


def state_of(file: Path) -> FileState:
    """Returns the state of a file of a corpus.

    Raises:
        CorpusError: if it is missing or cannot be read.
    """
    try:
        found = os.stat(file)
    except OSError as error:
        raise damage(file, f"the file cannot be read ({error.strerror})") from error
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
    return str(error)
