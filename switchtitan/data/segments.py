"""Write a stream of documents as token shards in segments, the units of resuming."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from switchtitan.data.corpus_files import ShardRecord
from switchtitan.data.sources import Documents
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError
from switchtitan.files import format_bytes

SEGMENT_TOKENS = 1 << 26
"""Tokens in a segment, which is one file for each split."""
SAVE_TOKENS = 1 << 22
"""Tokens after which an unfinished segment is flushed: the most that is tokenized again after a
stop, a few seconds on 2 cores."""

_BATCH_BYTES = 1 << 21
_READ_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096


class Progress(BaseModel):
    """The progress of a preparation: all that resuming needs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    eos_token: str | None = None
    """The end-of-document token of the saved tokenizer; None before it is saved."""
    stream: int = 0
    """The stream being read, in the order of the source's splits."""
    position: dict[str, object] | None = None
    """The position at which to open that stream; None at its start."""
    documents: int = 0
    """Non-empty documents read from that stream."""
    bytes_of_text: int = 0
    """Bytes of those documents."""
    revision: str | None = None
    """The commit of a dataset on the hub; None for other sources."""
    segments: int = 0
    """Finished segments of all streams."""
    splits: dict[str, list[ShardRecord]] = Field(default_factory=dict)
    """Finished shards by split."""
    unfinished: dict[str, ShardRecord] = Field(default_factory=dict)
    """What was flushed of the segment after those, by split."""


TokenIds = NDArray[Any]
"""The integer token ids of a document, without its end token."""


@dataclass(frozen=True)
class TextBatch:
    """Documents to tokenize together, and the stream's position after them."""

    documents: list[str]
    """Empty if the documents are tokenized already."""
    num_bytes: list[int]
    """Bytes of each document's text, or of its tokens if it is tokenized already."""
    position: dict[str, object]
    tokens: list[TokenIds] = field(default_factory=list)
    """Documents that are tokenized already."""


@dataclass(frozen=True)
class TokenBatch:
    """Tokenized documents."""

    tokens: list[TokenIds]
    bytes_of_text: list[int]
    """Of each document; 0 if it was tokenized already."""
    read: TextBatch
    """What was read."""


@dataclass(frozen=True)
class Limits:
    """Caps per stream; None means no cap."""

    max_documents: int | None
    max_bytes: int | None

    def allow(self, documents: int, num_bytes: int) -> bool:
        """Whether another document may follow `documents` documents of `num_bytes` bytes in all."""
        return (self.max_documents is None or documents < self.max_documents) and (
            self.max_bytes is None or num_bytes < self.max_bytes
        )


def text_batches(
    stream: Documents, limits: Limits, documents: int = 0, num_bytes: int = 0
) -> Iterator[TextBatch]:
    """Yields the non-empty documents of a stream in batches, up to the limits.

    Args:
        stream: positioned after `documents` documents of `num_bytes` bytes in all.
    """
    batch, position = TextBatch([], [], {}), dict[str, object]()
    batch_bytes = 0
    while limits.allow(documents, num_bytes):
        document, position = next(stream, (None, position))
        if document is None:
            break
        if not len(document):
            continue
        if isinstance(document, str):
            # JSON can hold lone surrogates, which UTF-8 cannot encode: the tokenizer rejects them.
            data = document.encode("utf-8", "replace")
            batch.documents.append(data.decode("utf-8"))
            size = len(data)
        else:
            batch.tokens.append(document)
            size = document.nbytes
        batch.num_bytes.append(size)
        documents, num_bytes, batch_bytes = documents + 1, num_bytes + size, batch_bytes + size
        if batch_bytes >= _BATCH_BYTES or len(batch.num_bytes) >= _BATCH_DOCUMENTS:
            yield replace(batch, position=position)
            batch, batch_bytes = TextBatch([], [], {}), 0
    if batch.num_bytes:
        yield replace(batch, position=position)


def token_batches(
    batches: Iterator[TextBatch], tokenizer: DocumentTokenizer
) -> Iterator[TokenBatch]:
    """Tokenizes batches."""
    for batch in batches:
        if batch.tokens:
            yield TokenBatch(batch.tokens, [0] * len(batch.tokens), batch)
        else:
            encoded = tokenizer.encode_documents(batch.documents)
            # Arrays take 4 bytes per token, Python's numbers up to 40.
            ids = [np.array(token_ids, dtype=np.uint32) for token_ids in encoded]
            yield TokenBatch(ids, batch.num_bytes, batch)


T = TypeVar("T")


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yields the same batches and makes the next one in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch


class ShardWriter:
    """Writes the token file of one split in one segment and computes its checksum.

    Args:
        flushed: what an earlier process flushed of the file, to continue after it.
    """

    def __init__(self, file: Path, dtype: str, flushed: ShardRecord | None = None) -> None:
        self._file = file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._digest = hashlib.sha256()
        self._documents = flushed.documents if flushed else 0
        self._tokens = flushed.tokens if flushed else 0
        self._bytes_of_text = flushed.bytes_of_text if flushed else 0
        if flushed:
            self._stream = self._open_again(flushed)
        else:
            file.unlink(missing_ok=True)  # a link would lead the writes elsewhere
            self._stream = file.open("xb")

    def _open_again(self, flushed: ShardRecord) -> BinaryIO:
        stream = self._file.open("r+b")
        left = flushed.tokens * self._dtype.itemsize
        if os.fstat(stream.fileno()).st_size < left:
            stream.close()
            raise CorpusError(
                f"{self._file}: is truncated; delete the folder {self._file.parent} and run again "
                "to prepare the corpus from scratch"
            )
        stream.truncate(left)  # what was written after the flush
        while block := stream.read(min(left, _READ_BYTES)):
            self._digest.update(block)
            left -= len(block)
        return stream

    def write(self, token_ids: TokenIds, eos_id: int, bytes_of_text: int) -> int:
        """Appends one document and its end token; returns the number of tokens written."""
        tokens = np.empty(len(token_ids) + 1, dtype=self._dtype)
        tokens[:-1] = token_ids
        tokens[-1] = eos_id
        data = tokens.data
        self._stream.write(data)
        self._digest.update(data)
        self._documents += 1
        self._tokens += len(tokens)
        self._bytes_of_text += bytes_of_text
        return len(tokens)

    def finish(self) -> ShardRecord:
        """Flushes the file to disk, closes it and returns its record."""
        record = self.flush()
        self._stream.close()
        return record

    def flush(self) -> ShardRecord:
        """Flushes the file to disk and returns the record of what was written so far."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return ShardRecord(
            file=self._file.name,
            documents=self._documents,
            tokens=self._tokens,
            bytes_of_text=self._bytes_of_text,
            sha256=self._digest.hexdigest(),
        )

    def close(self) -> None:
        """Closes the file without finishing it."""
        with suppress(OSError):  # a full disk also fails to take what is still buffered
            self._stream.close()


@contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turns errors of writing into errors that say what to do.

    Raises:
        CorpusError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "the disk is full" if is_full else "the corpus cannot be written"
        free = format_bytes(shutil.disk_usage(folder).free)
        raise CorpusError(
            f"{folder}: {problem} ({error}; {free} are free); free space, set [data] cache_dir to "
            "another disk, or cap the corpus with [data] max_bytes, and run again"
        ) from error


def write_segment(
    batches: Iterator[TokenBatch],
    eos_id: int,
    *,
    folder: Path,
    dtype: str,
    progress: Progress,
    split_of: Callable[[int], str],
    on_batch: Callable[[TokenBatch], None],
    save: Callable[[Progress], None],
    segment_tokens: int,
) -> Progress | None:
    """Writes batches until the segment is full or the stream ends.

    Args:
        split_of: maps a document's number in its stream to its split.
        on_batch: called after each batch is written.
        save: called after each `SAVE_TOKENS` tokens are flushed.

    Returns:
        the progress after the segment, or None if the stream was exhausted.

    Raises:
        CorpusError: if a file cannot be written.
    """
    writers: dict[str, ShardWriter] = {}
    documents, num_bytes, position = progress.documents, progress.bytes_of_text, None
    num_tokens = num_saved = sum(shard.tokens for shard in progress.unfinished.values())

    def reached() -> dict[str, object]:
        return {"position": position, "documents": documents, "bytes_of_text": num_bytes}

    try:
        with explained_write_errors(folder):
            for split, shard in progress.unfinished.items():
                writers[split] = ShardWriter(folder / shard.file, dtype, shard)
        if num_tokens:
            position = progress.position
        for batch in batches if num_tokens < segment_tokens else ():
            read = batch.read
            with explained_write_errors(folder):
                for token_ids, size, text_size in zip(
                    batch.tokens, read.num_bytes, batch.bytes_of_text, strict=True
                ):
                    split = split_of(documents)
                    if split not in writers:
                        writers[split] = ShardWriter(
                            folder / f"{split}-{progress.segments:05d}.bin", dtype
                        )
                    num_tokens += writers[split].write(token_ids, eos_id, text_size)
                    documents, num_bytes = documents + 1, num_bytes + size
            position = read.position
            on_batch(batch)
            if num_tokens >= segment_tokens:
                break
            if num_tokens - num_saved >= SAVE_TOKENS:
                num_saved = num_tokens
                with explained_write_errors(folder):
                    flushed = {split: writer.flush() for split, writer in writers.items()}
                save(progress.model_copy(update={**reached(), "unfinished": flushed}))
        with explained_write_errors(folder):
            finished = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    if position is None:
        return None
    splits = {split: list(shards) for split, shards in progress.splits.items()}
    for split, shard in finished.items():
        splits.setdefault(split, []).append(shard)
    return progress.model_copy(
        update={
            **reached(),
            "segments": progress.segments + 1,
            "splits": splits,
            "unfinished": {},
        }
    )
