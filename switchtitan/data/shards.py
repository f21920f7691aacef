"""From a stream of documents to token shards: batches that are tokenized together, and files."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.corpus_files import ShardRecord, TokenDtype
from switchtitan.data.sources import Documents, Position
from switchtitan.data.tokenizer import DocumentTokenizer

BATCH_BYTES = 1 << 21
BATCH_DOCUMENTS = 4096

T = TypeVar("T")


class Batch(NamedTuple):
    """Documents to tokenize together, and the stream's position after them."""

    documents: list[Any]
    """Texts, or arrays of token ids without their end tokens."""
    num_bytes: list[int]
    """Bytes of each document's text, or of its ids if it is tokenized already."""
    position: Position


def read_batches(
    documents: Documents,
    max_documents: int | None,
    max_bytes: int | None,
    num_documents: int = 0,
    num_bytes: int = 0,
) -> Iterator[Batch]:
    """Yields the non-empty documents of a stream in batches, up to the limits. The document that
    crosses `max_bytes` is the last.

    Args:
        documents: positioned after `num_documents` documents of `num_bytes` bytes in all.
    """
    batch, batch_bytes, position = Batch([], [], {}), 0, Position()
    while (max_documents is None or num_documents < max_documents) and (
        max_bytes is None or num_bytes < max_bytes
    ):
        document, position = next(documents, (None, position))
        if document is None:
            break
        if not len(document):
            continue
        if isinstance(document, str):
            # JSON can hold lone surrogates, which UTF-8 cannot encode: the tokenizer rejects them.
            data = document.encode("utf-8", "replace")
            document, size = data.decode("utf-8"), len(data)
        else:
            size = document.nbytes
        batch.documents.append(document)
        batch.num_bytes.append(size)
        num_documents, num_bytes, batch_bytes = (
            num_documents + 1,
            num_bytes + size,
            batch_bytes + size,
        )
        if batch_bytes >= BATCH_BYTES or len(batch.documents) >= BATCH_DOCUMENTS:
            yield batch._replace(position=position)
            batch, batch_bytes = Batch([], [], {}), 0
    if batch.documents:
        yield batch._replace(position=position)


def tokenized(batches: Iterator[Batch], tokenizer: DocumentTokenizer) -> Iterator[Batch]:
    """Yields the batches with token ids in place of texts."""
    for batch in batches:
        if isinstance(batch.documents[0], str):
            encoded = tokenizer.encode_documents(batch.documents)
            # Arrays take 2 or 4 bytes per token, Python's numbers up to 40.
            ids = [np.array(token_ids, dtype=dtype_of(tokenizer)) for token_ids in encoded]
            batch = batch._replace(documents=ids)
        yield batch


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields the same items and makes the next one in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, items, None)
            yield item


def segments(
    batches: Iterator[Batch], num_tokens: int, on_batch: Callable[[Batch], object]
) -> Iterator[list[Batch]]:
    """Yields tokenized batches that hold at least `num_tokens` tokens together; the last may not.

    Args:
        on_batch: called with each batch.
    """
    segment, left = list[Batch](), num_tokens
    for batch in batches:
        on_batch(batch)
        segment.append(batch)
        left -= sum(map(len, batch.documents)) + len(batch.documents)
        if left <= 0:
            yield segment
            segment, left = [], num_tokens
    if segment:
        yield segment


def dtype_of(tokenizer: DocumentTokenizer) -> TokenDtype:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def write_shard(
    file: Path,
    documents: Sequence[NDArray[Any]],
    tokenizer: DocumentTokenizer,
    bytes_of_text: int,
) -> ShardRecord:
    """Writes the token ids of documents, each with the end token after it, and flushes the file.

    Returns:
        its record.
    """
    end = np.array([tokenizer.eos_id])
    parts = [part for ids in documents for part in (ids, end)]
    dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
    tokens = np.concatenate(parts, dtype=dtype, casting="unsafe")
    with file.open("wb") as stream:
        stream.write(tokens.data)
        stream.flush()
        os.fsync(stream.fileno())
    return ShardRecord(
        file=file.name,
        documents=len(documents),
        tokens=len(tokens),
        bytes_of_text=bytes_of_text,
        sha256=hashlib.sha256(tokens.data).hexdigest(),
    )
