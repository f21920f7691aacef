"""Which documents are held out, and how much of a long one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.corpus_files import ShardRecord
from switchtitan.data.segments import ShardWriter
from switchtitan.data.tokenizer import DocumentTokenizer


def period_of(fraction: float) -> Fraction:
    """Returns the number of documents of which one is held out: 1 / fraction, as written."""
    return 1 / Fraction(str(fraction))


def is_held_out(document: int, period: Fraction | int, first: int = 0) -> bool:
    """Whether a document is held out: number `first`, and one of each later `period` documents.

    A hash, salted with `first`, chooses the later ones. The held-out fraction is exact, spread over
    the full corpus, and never empty. A period is at least 2. If it is not an integer, the sizes of
    blocks differ by one: 5/2 has blocks of 3 and 2 documents in turn."""
    num_documents, num_blocks = period.numerator, period.denominator
    block = document * num_blocks // num_documents
    if block == 0:
        return document == first
    start, end = (-(-after * num_documents // num_blocks) for after in (block, block + 1))
    salt = first.to_bytes(8, "little")
    chosen = hashlib.blake2b(block.to_bytes(8, "little"), digest_size=8, salt=salt).digest()
    return document - start == int.from_bytes(chosen, "little") % (end - start)


def document_cap(lengths: NDArray[np.int64], max_share: float) -> int:
    """Returns the most tokens that each document keeps, so that none has too large a share.

    That is the largest cap c with c <= share * sum(min(length, c)). With n documents the share is
    at least 2 / n: a smaller one would leave little of a split of few documents.

    Args:
        lengths: [documents], tokens of each document, its end included.
        max_share: the largest share of the split's tokens for one document.

    Returns:
        the longest length if no document has too large a share.
    """
    share = max(max_share, 2 / len(lengths))
    ascending = np.sort(lengths)
    below = np.cumsum(ascending) - ascending  # tokens of shorter documents
    num_others = len(lengths) - np.arange(len(lengths))  # documents that are at least as long
    fits = ascending <= share * (below + ascending * num_others)
    if fits.all():
        return int(ascending[-1])
    # Between two lengths the sum is linear in the cap: c = share * (below + c * others).
    longer = int(np.argmin(fits))
    cap = share * float(below[longer]) / (1 - share * float(num_others[longer]))
    return max(2, int(cap))


@dataclass(frozen=True)
class CutSplit:
    """A split whose long documents were cut."""

    cap: int
    """The most tokens of one document, its end included."""
    num_cut: int
    shard: ShardRecord


def cut_long_documents(
    folder: Path,
    split: str,
    shards: Sequence[ShardRecord],
    dtype: str,
    tokenizer: DocumentTokenizer,
    max_share: float,
) -> CutSplit | None:
    """Writes a split again with each document cut to `document_cap` tokens.

    A cut document keeps its first tokens, and ends like any other. The new shard is
    `<split>-cut.bin`; the old ones stay.

    Returns:
        the new split, or None if no document is longer than the cap.
    """
    tokens = [_mapped(folder / shard.file, dtype) for shard in shards]
    lengths = np.concatenate([_lengths(shard, tokenizer.eos_id) for shard in tokens])
    cap = document_cap(lengths, max_share)
    num_cut = int((lengths > cap).sum())
    if num_cut == 0:
        return None
    writer = ShardWriter(folder / f"{split}-cut.bin", dtype)
    lost_bytes = 0
    try:
        for document in _documents(tokens, tokenizer.eos_id):
            kept = document[:-1][: cap - 1]
            lost = document[:-1][cap - 1 :]
            lost_bytes += len(tokenizer.tokenizer.decode(lost.tolist()).encode())
            writer.write(kept, tokenizer.eos_id, 0)
        record = writer.finish()
    finally:
        writer.close()
    num_bytes = max(0, sum(shard.bytes_of_text for shard in shards) - lost_bytes)
    return CutSplit(cap, num_cut, record.model_copy(update={"bytes_of_text": num_bytes}))


def _mapped(file: Path, dtype: str) -> NDArray[np.unsignedinteger]:
    return np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


def _lengths(tokens: NDArray[np.unsignedinteger], eos_id: int) -> NDArray[np.int64]:
    ends = np.flatnonzero(tokens == eos_id) + 1
    return np.diff(ends, prepend=0)


def _documents(
    shards: Sequence[NDArray[np.unsignedinteger]], eos_id: int
) -> Iterator[NDArray[np.unsignedinteger]]:
    for tokens in shards:
        start = 0
        for end in (np.flatnonzero(tokens == eos_id) + 1).tolist():
            yield tokens[start:end]
            start = end
