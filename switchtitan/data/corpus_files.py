"""The files of a prepared corpus: `index.json`, and the checksums of all others."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from switchtitan.errors import CorpusError
from switchtitan.files import checksum_line, file_inside, sha256_of_file, write_atomically
from switchtitan.progress import progress_bar

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
INDEX_CHECKSUM_FILE = f"{INDEX_FILE}.sha256"
"""The checksum of `index.json`, as `sha256sum` writes it. Corpora of version 0.2.0 have none."""
TOKENIZER_FILE = "tokenizer.json"

TokenDtype = Literal["uint16", "uint32"]
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]


class Record(BaseModel):
    """A part of a JSON file of a corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardRecord(Record):
    """One token file."""

    file: str
    documents: _Count
    tokens: _Count
    bytes_of_text: _Count
    sha256: str


class TokenizerRecord(Record):
    """The tokenizer whose ids the shards hold; its file is next to them."""

    sha256: str
    vocab_size: int = Field(ge=1, le=1 << 32)
    eos_token: str
    eos_id: int = Field(ge=0)


class CorpusIndex(Record):
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


def write_index(folder: Path, index: CorpusIndex) -> None:
    """Writes the index and its checksum."""
    # Earlier versions read an index without these keys.
    unused = {key for key in ("document_caps", "revision") if not getattr(index, key)}
    contents = index.model_dump_json(indent=2, exclude=unused)
    write_atomically(folder / INDEX_CHECKSUM_FILE, checksum_line(contents.encode(), INDEX_FILE))
    write_atomically(folder / INDEX_FILE, contents)


def read_index(folder: Path) -> CorpusIndex:
    """Reads the index of a prepared corpus.

    Raises:
        CorpusError: if it is missing, corrupted or of another format, or names a file outside of
            `folder`.
    """
    try:
        contents = file_inside(folder, INDEX_FILE).read_bytes()
        index = CorpusIndex.model_validate_json(contents)
        if index.format_version != FORMAT_VERSION:
            raise ValueError(f"it has format {index.format_version}, expected {FORMAT_VERSION}")
        if index.tokenizer.eos_id >= index.tokenizer.vocab_size:
            raise ValueError("its end token is outside of the vocabulary")
        if fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits) != index.fingerprint:
            raise ValueError("it does not match its own fingerprint")
        checksum_file = file_inside(folder, INDEX_CHECKSUM_FILE)
        if checksum_file.exists() and checksum_file.read_bytes() != checksum_line(
            contents, INDEX_FILE
        ):
            raise ValueError(f"it does not match its checksum in {INDEX_CHECKSUM_FILE}")
        for name in index.checksums:
            file_inside(folder, name)
    except (OSError, ValueError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
        raise _damage(folder / INDEX_FILE, f"the index is damaged ({problem})") from error
    return index


def check_sizes(folder: Path, index: CorpusIndex) -> None:
    """Compares the sizes of all token files with their numbers of tokens. Cheap.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    item_bytes = 2 if index.dtype == "uint16" else 4
    for shard in (shard for split in index.splits.values() for shard in split):
        file, expected = folder / shard.file, shard.tokens * item_bytes
        num_bytes = file.stat().st_size if file.is_file() else 0
        if num_bytes != expected:
            raise _damage(file, f"the token shard has {num_bytes:,} bytes, expected {expected:,}")


def verify_files(folder: Path, index: CorpusIndex) -> None:
    """Compares all files of a corpus with their checksums.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    with progress_bar(f"verifying {folder.name}", total=num_bytes, unit="B") as bar:
        for name, expected in index.checksums.items():
            try:
                found = sha256_of_file(folder / name, bar.update)
            except OSError as error:
                problem = f"the file cannot be read ({error.strerror})"
                raise _damage(folder / name, problem) from error
            if found != expected:
                raise _damage(folder / name, "the file does not match its checksum")


def _damage(file: Path, what: str) -> CorpusError:
    return CorpusError(
        f"{file}: {what}; delete the folder {file.parent} and run again to prepare it from scratch"
    )
