"""The files of a prepared corpus: `index.json`, and the checksums of all others."""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from switchtitan.errors import CorpusError
from switchtitan.files import sha256_of_file

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardRecord(_Record):
    """One token file."""

    file: str
    documents: int
    tokens: int
    bytes_of_text: int
    sha256: str


class TokenizerRecord(_Record):
    """The tokenizer whose ids the shards hold; its file is next to them."""

    sha256: str
    vocab_size: int
    eos_token: str
    eos_id: int


class CorpusIndex(_Record):
    """The contents of `index.json`."""

    format_version: int
    name: str
    source: str
    """The documents, for people."""
    identity: dict[str, object]
    """Everything that determines documents and tokens; its hash is in the folder's name."""
    tokenizer: TokenizerRecord
    dtype: str
    """"uint16" or "uint32", little-endian."""
    splits: dict[str, list[ShardRecord]]
    fingerprint: str
    versions: dict[str, str]

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
        CorpusError: if it is missing, corrupted or of another format.
    """
    file = folder / INDEX_FILE
    try:
        index = CorpusIndex.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise damage(file, f"the index cannot be read ({_first_line(error)})") from error
    if index.format_version != FORMAT_VERSION:
        raise damage(
            file, f"the index has format {index.format_version}, expected {FORMAT_VERSION}"
        )
    if index.fingerprint != index.expected_fingerprint():
        raise damage(file, "the index does not match its own fingerprint")
    return index


def verify_files(folder: Path, index: CorpusIndex) -> None:
    """Compares every file of a corpus with its checksum.

    Raises:
        CorpusError: for the first file that is missing or differs.
    """
    expected = {TOKENIZER_FILE: index.tokenizer.sha256}
    expected |= {shard.file: shard.sha256 for shards in index.splits.values() for shard in shards}
    for name, sha256 in expected.items():
        try:
            found = sha256_of_file(folder / name)
        except OSError as error:
            raise damage(folder / name, f"the file cannot be read ({error.strerror})") from error
        if found != sha256:
            raise damage(folder / name, "the file does not match its checksum")


def damage(file: Path, what: str) -> CorpusError:
    """The error for a damaged file of a prepared corpus."""
    return CorpusError(
        f"{file}: {what}; delete the folder {file.parent} and run again to prepare it from scratch"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
    return str(error)
