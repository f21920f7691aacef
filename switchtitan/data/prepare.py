"""Tokenize a corpus once into memory-mapped shards: resumable, atomic, one process at a time."""

import errno
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from pydantic import Field

from switchtitan import __version__
from switchtitan.data.config import DEFAULT_TRAINED_VOCAB_SIZE, DataConfig
from switchtitan.data.corpus_files import (
    FORMAT_VERSION,
    TOKENIZER_FILE,
    CorpusIndex,
    Record,
    ShardRecord,
    TokenizerRecord,
    fingerprint_of,
    write_index,
)
from switchtitan.data.corpus_plan import CorpusPlan, source_keys, validation_fraction
from switchtitan.data.held_out import cut_long_documents, is_held_out, period_of
from switchtitan.data.shards import (
    Batch,
    dtype_of,
    read_ahead,
    read_batches,
    segments,
    tokenized,
    write_shard,
)
from switchtitan.data.sources import DATASETS, newest_commit
from switchtitan.data.tokenizer import (
    DocumentTokenizer,
    check_vocabulary,
    fetch_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from switchtitan.errors import CorpusError
from switchtitan.files import (
    file_inside,
    format_bytes,
    sha256_of_file,
    sync_folder,
    write_atomically,
)
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
SEGMENT_TOKENS = 1 << 26
"""Tokens in a segment, which is one shard for each split. A stop loses the unfinished one: at most
a minute of tokenizing on 2 cores."""
TRAINING_SAMPLE_BYTES = 1 << 25
"""A tokenizer is trained on the first 32 MiB of the training documents: a few seconds."""


class Progress(Record):
    """The progress of a preparation: all that resuming needs."""

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


def prepare_corpus(plan: CorpusPlan, model_vocab_size: int | None = None) -> None:
    """Prepares a corpus unless it exists.

    Writes to `<folder>.partial` and renames it when it is complete. A stopped preparation resumes
    after the last finished segment.

    Args:
        model_vocab_size: the largest vocabulary that the tokenizer may have; by default any.

    Raises:
        CorpusError: if the source or the tokenizer cannot be read, or there are too few documents.
    """
    if plan.is_prepared:
        return
    with _locked(plan):
        if not plan.is_prepared:
            _prepare(plan, model_vocab_size)


@contextmanager
def _locked(plan: CorpusPlan) -> Iterator[None]:
    """Waits until no other process prepares the corpus, and then keeps others from it."""
    lock = FileLock(plan.folder.with_name(plan.folder.name + ".lock"))
    try:
        plan.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that is preparing %s", plan.folder)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise CorpusError(
            f"[data] cache_dir = {str(plan.config.cache_dir)!r}: expected a folder in which files "
            f"can be created, written and locked ({error}); choose another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _prepare(plan: CorpusPlan, model_vocab_size: int | None) -> None:
    folder = plan.folder.with_name(plan.folder.name + ".partial")
    progress = _read_progress(folder)
    if plan.source.repository is not None:
        commit = progress.revision or newest_commit(plan.source.repository)
        keys = source_keys(plan.config)._replace(commit=commit)
        plan = replace(plan, source=DATASETS[plan.config.dataset].open(keys))
        progress = progress.model_copy(update={"revision": commit})
        logger.info("reading commit %s of the dataset", commit)
    _check_splits(plan)
    logger.info("preparing corpus: %s -> %s", plan.source.description, plan.folder)
    tokenizer = _tokenizer(plan, folder, progress)
    if model_vocab_size is not None:
        name = f"the tokenizer ([data] tokenizer = {plan.config.tokenizer!r})"
        check_vocabulary(tokenizer.vocab_size, model_vocab_size, name)
    preparation = _Preparation(plan, folder, tokenizer)
    with _explained_write_errors(folder.parent):
        folder.mkdir(exist_ok=True)
        if progress.eos_token is None:
            write_atomically(folder / TOKENIZER_FILE, tokenizer.serialized)
            progress = preparation.reached(progress, eos_token=tokenizer.eos_token)
        while progress.stream < len(_streams(plan)):
            progress = preparation.write_stream(progress)
        preparation.finish(progress)


def _streams(plan: CorpusPlan) -> tuple[str | None, ...]:
    """The splits to read; None is all documents, of which we hold some out."""
    return plan.source.splits or (None,)


def _check_splits(plan: CorpusPlan) -> None:
    # With datasets that always have their own splits, the keys are for the fallback.
    if not plan.source.splits or DATASETS[plan.config.dataset].has_own_splits:
        return
    for key in ("validation_fraction", "test_fraction"):
        value = getattr(plan.config, key)
        if value is not None:
            raise CorpusError(
                f"[data] {key} = {value} has no effect: {plan.source.description} has its own "
                f"splits ({', '.join(plan.source.splits)}); leave it out"
            )


def _split_of(config: DataConfig, stream: str | None) -> Callable[[int], str]:
    """Returns a function from a document's number in its stream to its split."""
    if stream is not None:
        return lambda document: stream
    period = period_of(validation_fraction(config))
    test_period = None if config.test_fraction is None else period_of(config.test_fraction)

    def draw(document: int) -> str:
        if is_held_out(document, period):
            return "validation"
        is_test = test_period is not None and is_held_out(document, test_period, first=1)
        return "test" if is_test else "train"

    return draw


def _tokenizer(plan: CorpusPlan, folder: Path, progress: Progress) -> DocumentTokenizer:
    """The tokenizer saved by the preparation being resumed, or a new one."""
    config = plan.config
    if progress.eos_token is not None:
        return read_tokenizer(folder / TOKENIZER_FILE, progress.eos_token)
    if config.tokenizer_path is not None:
        return read_tokenizer(config.tokenizer_path)
    if config.hub_tokenizer is not None:
        return fetch_tokenizer(config.hub_tokenizer)
    vocab_size = config.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE
    logger.info("training a byte-level BPE tokenizer of %d tokens on the corpus", vocab_size)
    return train_tokenizer(_training_sample(plan), vocab_size)


def _training_sample(plan: CorpusPlan) -> Iterator[str]:
    stream = _streams(plan)[0]
    split_of = _split_of(plan.config, stream)
    max_bytes = min(plan.config.max_bytes or TRAINING_SAMPLE_BYTES, TRAINING_SAMPLE_BYTES)
    batches = read_batches(plan.source.read(stream, None, None), plan.max_documents, max_bytes)
    texts = chain.from_iterable(batch.documents for batch in batches)
    return (text for number, text in enumerate(texts) if split_of(number) == "train")


@dataclass(frozen=True)
class _Preparation:
    """A preparation whose tokenizer is known."""

    plan: CorpusPlan
    folder: Path
    """The folder until it is complete."""
    tokenizer: DocumentTokenizer

    def reached(self, progress: Progress, **changes: object) -> Progress:
        """Writes the progress after `changes`, and returns it."""
        progress = progress.model_copy(update=changes)
        write_atomically(self.folder / PROGRESS_FILE, progress.model_dump_json())
        return progress

    def write_stream(self, progress: Progress) -> Progress:
        """Writes the segments of a stream that are left, and the progress after each."""
        plan, stream = self.plan, _streams(self.plan)[progress.stream]
        documents = plan.source.read(stream, progress.position, self.tokenizer)
        read = read_batches(
            documents,
            plan.max_documents,
            plan.config.max_bytes,
            progress.documents,
            progress.bytes_of_text,
        )
        # Three threads: one reads, one tokenizes with all cores, this one writes.
        batches = read_ahead(tokenized(read_ahead(read), self.tokenizer))
        # Over documents if they are capped, otherwise over bytes.
        in_bytes = plan.max_documents is None
        sizes = (
            (plan.config.max_bytes, plan.source.num_bytes) if in_bytes else (plan.max_documents,)
        )
        with progress_bar(
            f"tokenizing {stream or ''}".rstrip(),
            total=min((size for size in sizes if size is not None), default=None),
            unit="B" if in_bytes else "documents",
        ) as bar:
            bar.update(progress.bytes_of_text if in_bytes else progress.documents)

            def advance(batch: Batch) -> None:
                bar.update(sum(batch.num_bytes) if in_bytes else len(batch.documents))

            for segment in segments(batches, SEGMENT_TOKENS, advance):
                progress = self.write_segment(segment, stream, progress)
        return self.reached(
            progress, stream=progress.stream + 1, position=None, documents=0, bytes_of_text=0
        )

    def write_segment(
        self, segment: list[Batch], stream: str | None, progress: Progress
    ) -> Progress:
        """Writes one shard for each split, and the progress after it."""
        split_of = _split_of(self.plan.config, stream)
        documents = list(chain.from_iterable(batch.documents for batch in segment))
        num_bytes = list(chain.from_iterable(batch.num_bytes for batch in segment))
        by_split: dict[str, list[int]] = {}
        for place in range(len(documents)):
            by_split.setdefault(split_of(progress.documents + place), []).append(place)
        splits = dict(progress.splits)
        for split, places in by_split.items():
            file = self.folder / f"{split}-{progress.segments:05d}.bin"
            own = [documents[place] for place in places]
            is_text = not self.plan.source.holds_tokens
            size = sum(num_bytes[place] for place in places) if is_text else 0
            splits[split] = [*splits.get(split, []), write_shard(file, own, self.tokenizer, size)]
        progress = self.reached(
            progress,
            position=segment[-1].position,
            documents=progress.documents + len(documents),
            bytes_of_text=progress.bytes_of_text + sum(num_bytes),
            segments=progress.segments + 1,
            splits=splits,
        )
        logger.info(
            "finished segment %d: %d documents so far", progress.segments, progress.documents
        )
        return progress

    def finish(self, progress: Progress) -> None:
        """Cuts long held-out documents, writes the index, and gives the folder its name."""
        plan, folder = self.plan, self.folder
        splits, caps = self._cut(_all_splits(plan, progress))
        index = self._index(splits, caps, progress.revision)
        write_index(folder, index)
        os.rename(folder, plan.folder)
        sync_folder(plan.folder.parent)
        # Only now: a preparation killed before the rename resumes from them.
        written = chain.from_iterable(progress.splits.values())
        uncut = [shard.file for shard in written if shard.file not in index.checksums]
        for name in (PROGRESS_FILE, *uncut):
            with suppress(OSError):
                (plan.folder / name).unlink()
        counts = ", ".join(f"{index.num_tokens(split)} {split}" for split in splits)
        logger.info("corpus ready: %s tokens in %s", counts, plan.folder)

    def _cut(
        self, splits: dict[str, list[ShardRecord]]
    ) -> tuple[dict[str, list[ShardRecord]], dict[str, int]]:
        """Returns the splits after cuts of long documents, and the caps of those that were cut."""
        share, caps = self.plan.config.max_document_share, dict[str, int]()
        # A source's own splits stay as they are published.
        if share is not None and not self.plan.source.splits:
            for split in [name for name in splits if name != "train"]:
                cut = cut_long_documents(self.folder, split, splits[split], self.tokenizer, share)
                if cut is not None:
                    caps[split], splits[split] = cut[0], [cut[1]]
        return splits, caps

    def _index(
        self, splits: dict[str, list[ShardRecord]], caps: dict[str, int], revision: str | None
    ) -> CorpusIndex:
        dtype = dtype_of(self.tokenizer)
        sha256 = sha256_of_file(self.folder / TOKENIZER_FILE)
        return CorpusIndex(
            format_version=FORMAT_VERSION,
            name=self.plan.folder.name,
            source=self.plan.source.description,
            identity=self.plan.identity,
            tokenizer=TokenizerRecord(
                sha256=sha256,
                vocab_size=self.tokenizer.vocab_size,
                eos_token=self.tokenizer.eos_token,
                eos_id=self.tokenizer.eos_id,
            ),
            dtype=dtype,
            splits=splits,
            document_caps=caps,
            revision=revision,
            fingerprint=fingerprint_of(sha256, dtype, splits),
            versions={
                "switchtitan": __version__,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )


def _all_splits(plan: CorpusPlan, progress: Progress) -> dict[str, list[ShardRecord]]:
    """Returns the shards of all splits that the corpus must have."""
    has_test = plan.config.test_fraction is not None and not plan.source.splits
    names = ("train", "validation", "test") if has_test else ("train", "validation")
    for split in names:
        if split not in progress.splits:
            raise CorpusError(
                f"{plan.source.description}: no document for the {split} split; a corpus needs at "
                f"least {len(names)} documents, {len(names) - 1} of them held out; add text"
            )
    return {split: progress.splits[split] for split in names}


@contextmanager
def _explained_write_errors(folder: Path) -> Iterator[None]:
    """Turns errors of writing into errors that say what to do."""
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


def _read_progress(folder: Path) -> Progress:
    """Returns the progress of a stopped preparation. If it cannot be resumed, deletes the folder.

    Raises:
        CorpusError: if the folder is a link.
    """
    if folder.is_symlink():
        raise CorpusError(f"{folder} is a link; remove it")
    if not folder.exists():
        return Progress()
    try:
        progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
        (folder / TOKENIZER_FILE).stat()
        if any(path.is_symlink() for path in folder.iterdir()):
            raise ValueError("it holds links")
        for shard in chain.from_iterable(progress.splits.values()):
            num_bytes = file_inside(folder, shard.file).stat().st_size
            if num_bytes not in (2 * shard.tokens, 4 * shard.tokens):
                raise ValueError(f"{shard.file} has {num_bytes} bytes")
    except (OSError, ValueError) as error:
        logger.info("cannot resume %s (%s); starting over", folder, error)
        shutil.rmtree(folder)
        return Progress()
    logger.info("resuming a stopped preparation after %d finished segments", progress.segments)
    return progress
