"""A prepared corpus: which folder a configuration means, and what the folder holds."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from switchtitan.data.config import DataConfig
from switchtitan.data.sequences import (
    ONE_SOURCE,
    PERIOD,
    Schedule,
    Sequences,
    TokenFile,
    TokenSequences,
)
from switchtitan.data.sources import DATASETS, FileState, Source, hub_error
from switchtitan.data.tokenizer import DocumentTokenizer, check_vocabulary, read_tokenizer
from switchtitan.errors import CorpusError
from switchtitan.files import checksum_line, file_inside, sha256_of_file, write_atomically
from switchtitan.progress import progress_bar
from switchtitan.registry import explain

logger = logging.getLogger(__name__)

SplitName = Literal["train", "validation", "test"]
FORMAT_VERSION: Final = 1
INDEX_FILE = "index.json"
_INDEX_CHECKSUM_FILE = f"{INDEX_FILE}.sha256"
TOKENIZER_FILE = "tokenizer.json"
VERIFIED_BYTES = 1 << 30
"""Corpora of up to 1 GiB of tokens are verified by checksum on every open (a second or two), larger
ones by size; `switchtitan prepare` verifies all."""
HELD_OUT_DOCUMENT_TOKENS = 8192
"""A longer held-out document is cut at its end, so that few documents do not decide the loss of a
small corpus: of the standard library, one has 0.06 of the split, not 0.21."""


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus to prepare and its folder, planned without reading a document. The folder exists
    if it is complete."""

    config: DataConfig
    source: Source
    identity: dict[str, object]
    folder: Path
    fallback_for: str | None = None
    """See `Corpus`."""


def plan_corpus(config: DataConfig) -> CorpusPlan:
    """Plans the corpus that `config` names, or the offline one if that is not prepared and the hub
    cannot be reached. Raises a CorpusError if a file is missing, or there is no offline one."""
    plan = plan_from_name(config)
    if plan.folder.is_dir() or not config.needs_hub or (reason := hub_error()) is None:
        return plan
    problem = (
        f"dataset = {config.dataset!r} ({plan.source.description}), tokenizer = "
        f"{config.tokenizer!r}: the Hugging Face hub cannot be reached ({reason})"
    )
    if config.offline_dataset is None:
        raise CorpusError(
            f"[data] {problem}; check the connection, prepare the corpus on a connected machine "
            f"(switchtitan prepare) and copy {plan.folder}, set a local path, or train on Python's "
            "standard library with --data.offline_dataset pystdlib"
        )
    fallback = plan_from_name(config.fallback_config(), problem)
    logger.warning(
        "REQUESTED CORPUS UNAVAILABLE, FALLING BACK: training on %s instead of %s",
        fallback.source.description,
        problem,
    )
    return fallback


def plan_from_name(config: DataConfig, fallback_for: str | None = None) -> CorpusPlan:
    """Plans the corpus that `config` names, without checking whether the hub can be reached."""
    assert not config.sources, "each source of a mixture is a corpus"
    row = DATASETS[config.dataset]
    source = row.open(config, None)
    # A hub dataset's splits are known only when the hub has been asked.
    is_split = row.has_own_splits if row.comes_from_hub else source.splits()
    identity: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "source": dict(source.identity),
        "tokenizer": config.tokenizer_identity,
        "validation_fraction": None if is_split else config.held_out_fraction,
        **config.model_dump(include={"max_documents", "max_bytes"}),
        **config.model_dump(include={"bos"}, exclude_none=True),
    }
    if not is_split:
        identity["test_fraction"] = config.test_fraction
        identity["held_out_document_tokens"] = HELD_OUT_DOCUMENT_TOKENS
    folder = config.cache_dir.expanduser() / f"{config.dataset}-{_digest(identity)[:12]}"
    return CorpusPlan(config, source, identity, folder, fallback_for)


class Record(BaseModel):
    """A part of a JSON file of a corpus."""

    model_config = ConfigDict(frozen=True, strict=True)


class ShardRecord(Record):
    """One token file."""

    file: str
    documents: int
    tokens: int
    sha256: str


class TokenizerRecord(Record):
    """The tokenizer whose ids the shards hold; its file is next to them."""

    sha256: str
    vocab_size: int
    eos_token: str
    eos_id: int
    bos: bool = False
    """Whether documents begin with what the tokenizer puts before a text. Those that an earlier
    version prepared do not."""


class CorpusIndex(Record):
    """The contents of `index.json`."""

    format_version: Literal[1]  # FORMAT_VERSION
    name: str
    source: str
    """The documents, for people."""
    identity: dict[str, object]
    """Everything that determines documents and tokens; its hash is in the folder's name."""
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "uint32"]
    """Of the token files, little-endian."""
    splits: dict[str, list[ShardRecord]]
    revision: str | None = None
    """The commit of a dataset on the Hugging Face hub; None for other sources."""
    files: list[FileState] = []
    """A user's own files as they were; see `Source`."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, equal only for equal tokens and tokenizers."""
        splits = {
            split: [[shard.tokens, shard.sha256] for shard in shards]
            for split, shards in self.splits.items()
        }
        keys = {"format_version": FORMAT_VERSION, "tokenizer": self.tokenizer.sha256}
        return _digest({**keys, "dtype": self.dtype, "splits": splits})[:32]

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of the tokenizer and of the token files of all splits, by name."""
        shards = {shard.file: shard.sha256 for shard in chain(*self.splits.values())}
        return {TOKENIZER_FILE: self.tokenizer.sha256, **shards}

    def num_tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def num_documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits[split])


def _digest(contents: object) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, index: CorpusIndex) -> None:
    """Writes the index and its checksum."""
    contents = index.model_dump_json(indent=2)
    write_atomically(folder / _INDEX_CHECKSUM_FILE, checksum_line(contents.encode(), INDEX_FILE))
    write_atomically(folder / INDEX_FILE, contents)


def read_index(folder: Path) -> CorpusIndex:
    """Reads the index of a prepared corpus. Raises a CorpusError if it is missing, corrupted or of
    another format, or names a file outside of `folder`."""
    try:
        contents = file_inside(folder, INDEX_FILE).read_bytes()
        index = CorpusIndex.model_validate_json(contents)
        if not 0 <= index.tokenizer.eos_id < index.tokenizer.vocab_size <= 1 << 32:
            raise ValueError("its end token is outside of the vocabulary")
        checksum = file_inside(folder, _INDEX_CHECKSUM_FILE)
        if checksum.exists() and checksum.read_bytes() != checksum_line(contents, INDEX_FILE):
            raise ValueError(f"it does not match its checksum in {_INDEX_CHECKSUM_FILE}")
        for name in index.checksums:
            file_inside(folder, name)
    except (OSError, ValueError) as error:
        problem = f"the index is missing or damaged ({explain(error)})"
        raise _damage(folder / INDEX_FILE, problem) from error
    return index


def _damage(file: Path, what: str) -> CorpusError:
    return CorpusError(
        f"{file}: {what}; delete the folder {file.parent} and prepare it from scratch "
        "(`switchtitan prepare`)"
    )


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    index: CorpusIndex
    fallback_for: str | None = None
    """The requested corpus and why it is unavailable; None if this is the requested corpus."""
    parts: tuple["Corpus", ...] = ()
    """Of a mixture: all sources. Folder and index are those of the first one, whose tokenizer all
    have."""
    schedule: Schedule = ONE_SOURCE

    @property
    def sources(self) -> "tuple[Corpus, ...]":
        """The corpora that were prepared: all of a mixture, or this one."""
        return self.parts or (self,)

    @property
    def shares(self) -> "list[tuple[Corpus, int]]":
        """The sources and their counts, see `Schedule`."""
        return list(zip(self.sources, self.schedule.counts, strict=True))

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the tokens and the tokenizer on any machine."""
        if not self.parts:
            return self.index.fingerprint
        return _digest([[source.fingerprint, count] for source, count in self.shares])[:32]

    @property
    def description(self) -> str:
        """The documents, for people and for a run's metadata, and the fallback if there was one."""
        if self.parts:
            shares = (f"{count / PERIOD:.2%} {part.description}" for part, count in self.shares)
            return f"mixture of {' + '.join(shares)}"
        fallback = f" (fallback for {self.fallback_for})" if self.fallback_for else ""
        return self.index.source + fallback

    def tokenizer(self) -> DocumentTokenizer:
        """The tokenizer whose ids the corpus holds."""
        record = self.index.tokenizer
        tokenizer = read_tokenizer(self.folder, record.eos_token)
        return tokenizer if record.bos else tokenizer.without_bos()

    def split(self, name: SplitName, seq_len: int) -> Sequences:
        """The sequences of one split, of all sources of a mixture. Raises a CorpusError if there is
        no such split, or it is shorter than one sequence."""
        parts = [source._own_split(name, seq_len) for source in self.sources]
        names = [source.index.name for source in self.sources]
        return Sequences(parts, names, self.schedule)

    def _own_split(self, name: str, seq_len: int) -> TokenSequences:
        if name not in self.index.splits:
            raise CorpusError(
                f"the corpus in {self.folder} has no {name} split, only "
                f"{', '.join(self.index.splits)}; leave --split or [evaluation] test_tokens out, "
                "or set [data] test_fraction if the corpus does not have its own splits"
            )
        if self.index.num_tokens(name) < seq_len + 1:
            more = "" if name == "train" else f" or increase {name}_fraction"
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the {name} split of {self.folder} has "
                f"{self.index.num_tokens(name):,} tokens, fewer than the {seq_len + 1:,} of one "
                f"sequence and its last target; lower seq_len, use a larger corpus{more}"
            )
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        shards = [
            TokenFile(self.folder / shard.file, dtype, "r", shape=shard.tokens)
            for shard in self.index.splits[name]
        ]
        return TokenSequences(shards, seq_len, self.index.tokenizer.eos_id)

    def verify(self, max_bytes: float) -> None:
        """Compares the sizes of all token files, and all files with their checksums if the tokens
        of a source are not more than `max_bytes`. Raises a CorpusError for the first difference."""
        try:
            for source in self.sources:
                source._verify_files(max_bytes)
        except OSError as error:
            problem = f"it cannot be read ({error.strerror})"
            raise _damage(Path(error.filename), problem) from error

    def _verify_files(self, max_bytes: float) -> None:
        index, num_bytes = self.index, 0
        for shard in chain(*index.splits.values()):
            file, expected = self.folder / shard.file, np.dtype(index.dtype).itemsize * shard.tokens
            if (found := file.stat().st_size) != expected:
                raise _damage(file, f"it has {found:,} bytes, expected {expected:,}")
            num_bytes += expected
        if num_bytes > max_bytes:
            return
        with progress_bar(f"verifying {self.folder.name}", total=num_bytes, unit="B") as bar:
            for name, checksum in index.checksums.items():
                if sha256_of_file(self.folder / name, bar.update) != checksum:
                    raise _damage(self.folder / name, "it does not match its checksum")

    def check_vocabulary(self, model_vocab_size: int) -> None:
        check_vocabulary(
            self.index.tokenizer.vocab_size, model_vocab_size, f"the tokenizer of {self.folder}"
        )


def open_prepared(folder: Path) -> Corpus:
    """Opens the prepared corpus in a folder, such as that of `--corpus`. Raises a CorpusError if a
    file is missing or damaged; checksums of more than `VERIFIED_BYTES` are not compared."""
    if not (folder / INDEX_FILE).is_file():
        raise CorpusError(
            f"--corpus {folder}: no file {folder / INDEX_FILE}; expected a folder that "
            "`switchtitan prepare` has written"
        )
    corpus = Corpus(folder, read_index(folder))
    corpus.verify(VERIFIED_BYTES)
    return corpus


def join_sources(parts: Sequence[Corpus], schedule: Schedule) -> Corpus:
    """Returns the mixture of prepared corpora, or the only one."""
    if len(parts) == 1:
        return parts[0]
    return Corpus(parts[0].folder, parts[0].index, None, tuple(parts), schedule)
