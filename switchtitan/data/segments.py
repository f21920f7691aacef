"""Turning a stream of documents into token shards, one segment after the other; a stopped preparation
resumes after the last one."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from switchtitan.data.corpus_files import ShardRecord
from switchtitan.data.sources.dataset import DocumentStream
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError

SEGMENT_TOKENS = 1 << 26
"""Tokens after which a segment is closed: at most this much tokenising is repeated after a stop (about a
minute on 2 cores)."""

_BATCH_BYTES = 1 << 21
_BATCH_DOCUMENTS = 4096


class Progress(BaseModel):
    """The progress of a preparation: everything that is needed to resume it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    eos_token: str | None = None
    """The end-of-document token of the tokenizer that is saved; None before one is."""
    stream: int = 0
    """The stream being read, in the order of the source's splits."""
    position: dict[str, object] | None = None
    """Where to open that stream; None at its start."""
    documents: int = 0
    """Documents read from that stream, the empty ones not counted."""
    bytes_of_text: int = 0
    """Bytes of those documents."""
    segments: int = 0
    """Segments finished, of all streams."""
    splits: dict[str, list[ShardRecord]] = Field(default_factory=dict)
    """The shards finished, by split."""


@dataclass(frozen=True)
class TextBatch:
    """Documents that are tokenised together, and the stream's position after them."""

    documents: list[str]
    num_bytes: list[int]
    position: dict[str, object]


@dataclass(frozen=True)
class Limits:
    """Caps on what is taken from one stream; None takes everything."""

    max_documents: int | None
    max_bytes: int | None

    def allow(self, documents: int, num_bytes: int) -> bool:
        """Whether one more document may be taken after so many documents and bytes."""
        return (self.max_documents is None or documents < self.max_documents) and (
            self.max_bytes is None or num_bytes < self.max_bytes
        )


def text_batches(
    stream: DocumentStream, limits: Limits, documents: int, num_bytes: int
) -> Iterator[TextBatch]:
    """Cuts a stream into batches, empty documents left out, and ends it at the limits.

    Args:
        stream: opened where `documents` and `num_bytes` have been taken already.
    """
    texts: list[str] = []
    sizes: list[int] = []
    batch_bytes = 0
    while limits.allow(documents, num_bytes):
        text = next(stream, None)
        if text is None:
            break
        if not text:
            continue
        # JSON can hold lone surrogates, which have no UTF-8 form: the tokenizer would refuse them.
        data = text.encode("utf-8", "replace")
        texts.append(data.decode("utf-8"))
        sizes.append(len(data))
        documents, num_bytes, batch_bytes = (
            documents + 1,
            num_bytes + len(data),
            batch_bytes + len(data),
        )
        if batch_bytes >= _BATCH_BYTES or len(texts) >= _BATCH_DOCUMENTS:
            yield TextBatch(texts, sizes, stream.position())
            texts, sizes, batch_bytes = [], [], 0
    if texts:
        yield TextBatch(texts, sizes, stream.position())


def read_ahead(batches: Iterator[TextBatch]) -> Iterator[TextBatch]:
    """Yields the same batches, reading the next one in a thread while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch


class ShardWriter:
    """Writes the token file of one split in one segment, and its checksum along with it."""

    def __init__(self, file: Path, dtype: str) -> None:
        self._file = file
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._stream = file.open("wb")
        self._digest = hashlib.sha256()
        self._documents = 0
        self._tokens = 0
        self._bytes_of_text = 0

    def write(self, token_ids: list[int], eos_id: int, bytes_of_text: int) -> int:
        """Appends one document and its end token; returns how many tokens that were."""
        data = np.asarray([*token_ids, eos_id], dtype=self._dtype).tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._documents += 1
        self._tokens += len(token_ids) + 1
        self._bytes_of_text += bytes_of_text
        return len(token_ids) + 1

    def finish(self) -> ShardRecord:
        """Makes the file durable and returns its record."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return ShardRecord(
            file=self._file.name,
            documents=self._documents,
            tokens=self._tokens,
            bytes_of_text=self._bytes_of_text,
            sha256=self._digest.hexdigest(),
        )

    def close(self) -> None:
        """Gives up the file as it is."""
        self._stream.close()


def write_segment(
    batches: Iterator[TextBatch],
    tokenizer: DocumentTokenizer,
    *,
    folder: Path,
    dtype: str,
    progress: Progress,
    split_of: Callable[[int], str],
    on_batch: Callable[[TextBatch], None],
    segment_tokens: int,
) -> Progress | None:
    """Tokenises batches until the segment is full or the stream ends.

    Args:
        split_of: the split of the document with a given number in its stream.
        on_batch: called with each batch when it is written.

    Returns:
        the progress after the segment, or None where the stream had no document left.

    Raises:
        CorpusError: if the disk is full.
    """
    writers: dict[str, ShardWriter] = {}
    documents, num_bytes, num_tokens, position = progress.documents, progress.bytes_of_text, 0, None
    try:
        for batch in batches:
            encoded = tokenizer.encode_documents(batch.documents)
            for token_ids, size in zip(encoded, batch.num_bytes, strict=True):
                split = split_of(documents)
                if split not in writers:
                    writers[split] = ShardWriter(
                        folder / f"{split}-{progress.segments:05d}.bin", dtype
                    )
                num_tokens += writers[split].write(token_ids, tokenizer.eos_id, size)
                documents, num_bytes = documents + 1, num_bytes + size
            position = batch.position
            on_batch(batch)
            if num_tokens >= segment_tokens:
                break
        finished = {split: writer.finish() for split, writer in writers.items()}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CorpusError(
            f"{folder}: the disk is full; make room, or set [data] cache_dir to another disk or cap the "
            f"corpus with max_bytes, and run again"
        ) from error
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
            "position": position,
            "documents": documents,
            "bytes_of_text": num_bytes,
            "segments": progress.segments + 1,
            "splits": splits,
        }
    )
