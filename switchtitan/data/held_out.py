"""Which documents are held out, and how much of a long one."""

import hashlib
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.corpus_files import ShardRecord
from switchtitan.data.shards import dtype_of, write_shard
from switchtitan.data.tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)


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


def cut_long_documents(
    folder: Path,
    split: str,
    shards: Sequence[ShardRecord],
    tokenizer: DocumentTokenizer,
    max_share: float,
) -> tuple[int, ShardRecord] | None:
    """Writes a split again, as `<split>-cut.bin`, with each document cut to `document_cap` tokens.

    A cut document keeps its first tokens, and ends like any other. The old shards stay.

    Returns:
        the cap and the new shard, or None if no document is longer than the cap.
    """
    stored = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
    files = [np.memmap(folder / shard.file, dtype=stored, mode="r") for shard in shards]
    documents: list[NDArray[Any]] = []
    for tokens in files:
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        documents += [document[:-1] for document in np.split(tokens, ends + 1)[:-1]]
    lengths = np.array([len(document) + 1 for document in documents])
    cap = document_cap(lengths, max_share)
    num_cut = int((lengths > cap).sum())
    if num_cut == 0:
        return None
    lost = [tokenizer.tokenizer.decode(document[cap - 1 :].tolist()) for document in documents]
    num_bytes = sum(shard.bytes_of_text for shard in shards) - sum(len(t.encode()) for t in lost)
    kept = [document[: cap - 1] for document in documents]
    record = write_shard(folder / f"{split}-cut.bin", kept, tokenizer, max(0, num_bytes))
    logger.info(
        "cut %d documents of the %s split to %d tokens, %.1f %% of the split",
        num_cut,
        split,
        cap,
        100 * cap / record.tokens,
    )
    return cap, record
