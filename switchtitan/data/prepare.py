"""Tokenize a corpus once into memory-mapped shards: resumable, atomic, one process at a time."""

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import tokenizers
from tqdm import tqdm

from switchtitan import __version__
from switchtitan.data.config import DEFAULT_TRAINED_VOCAB_SIZE, DataConfig
from switchtitan.data.corpus_files import (
    FORMAT_VERSION,
    TOKENIZER_FILE,
    CorpusIndex,
    ShardRecord,
    TokenDtype,
    TokenizerRecord,
    fingerprint_of,
    write_index,
)
from switchtitan.data.corpus_plan import (
    CorpusPlan,
    plan_corpus,
    plan_from_name,
    validation_fraction,
)
from switchtitan.data.held_out import cut_long_documents, is_held_out, period_of
from switchtitan.data.segments import (
    SEGMENT_TOKENS,
    Limits,
    Progress,
    TokenBatch,
    explained_write_errors,
    read_ahead,
    text_batches,
    token_batches,
    write_segment,
)
from switchtitan.data.sources import DATASETS
from switchtitan.data.tokenizer import (
    DocumentTokenizer,
    check_vocabulary,
    fetch_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from switchtitan.errors import CorpusError
from switchtitan.files import file_inside, lock, sha256_of_file, sync_folder, write_atomically

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
TRAINING_SAMPLE_BYTES = 1 << 25
"""A tokenizer is trained on the first 32 MiB of the training documents: a few seconds."""


def prepare_corpus(
    config: DataConfig, *, show_progress: bool = True, segment_tokens: int = SEGMENT_TOKENS
) -> Path:
    """Prepares the corpus of `config` unless it exists, and returns its folder.

    Writes to `<folder>.partial` and renames it when it is complete. A stopped preparation resumes
    after the last finished segment.

    Raises:
        CorpusError: if the source or the tokenizer cannot be read, or there are too few documents.
    """
    plan = plan_corpus(config)
    prepare_planned_corpus(plan, show_progress=show_progress, segment_tokens=segment_tokens)
    return plan.folder


def prepare_planned_corpus(
    plan: CorpusPlan,
    *,
    show_progress: bool = True,
    segment_tokens: int = SEGMENT_TOKENS,
    model_vocab_size: int | None = None,
) -> None:
    """Prepares a planned corpus; see `prepare_corpus`.

    Args:
        model_vocab_size: the largest vocabulary that the tokenizer may have; by default any.
    """
    if plan.is_prepared:
        return
    lock_file = plan.folder.with_name(plan.folder.name + ".lock")
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock_file.touch()
    except OSError as error:
        raise CorpusError(
            f"[data] cache_dir = {str(plan.config.cache_dir)!r}: the folder cannot be created or "
            f"written ({error.strerror}); choose another"
        ) from error

    def on_wait() -> None:
        logger.info(
            "waiting for another process that is preparing this corpus (lock %s)", lock_file
        )

    with lock(lock_file, on_wait, key="[data] cache_dir"):
        if not plan.is_prepared:
            _Preparation(plan, show_progress, segment_tokens).run(model_vocab_size)


def _check_splits(plan: CorpusPlan) -> None:
    """Refuses settings for held-out documents of a source that turned out to have its own splits.

    Raises:
        CorpusError: names the first one.
    """
    for key in ("validation_fraction", "test_fraction"):
        value = getattr(plan.config, key)
        # With these datasets the key is for the fallback.
        is_fixed = DATASETS[plan.config.dataset].has_own_splits
        if plan.source.splits and value is not None and not is_fixed:
            raise CorpusError(
                f"[data] {key} = {value} has no effect: {plan.source.description} has its own "
                f"splits ({', '.join(plan.source.splits)}); leave it out"
            )


def _pinned(progress: Progress, plan: CorpusPlan) -> tuple[Progress, CorpusPlan]:
    """Returns a plan that reads one commit of a dataset on the hub: the one of `progress`, or the
    newest one, which `progress` then has.

    Raises:
        CorpusError: if the hub does not answer.
    """
    if plan.source.pin is None:
        return progress, plan
    revision, source = plan.source.pin(progress.revision)
    logger.info("reading commit %s of the dataset", revision)
    return progress.model_copy(update={"revision": revision}), replace(plan, source=source)


class _Preparation:
    """One preparation of one corpus, new or resumed."""

    def __init__(self, plan: CorpusPlan, show_progress: bool, segment_tokens: int) -> None:
        self._partial = plan.folder.with_name(plan.folder.name + ".partial")
        self._show_progress = show_progress
        self._segment_tokens = segment_tokens
        self._progress, plan = _pinned(self._read_progress(), plan)
        self._plan = plan
        self._config = plan.config
        self._source = plan.source
        self._limits = Limits(plan.max_documents, self._config.max_bytes)
        self._streams: tuple[str | None, ...] = self._source.splits or (None,)
        _check_splits(plan)
        self._period = period_of(validation_fraction(self._config))
        test_fraction = self._config.test_fraction
        self._test_period = None if test_fraction is None else period_of(test_fraction)

    def run(self, model_vocab_size: int | None) -> None:
        logger.info("preparing corpus: %s -> %s", self._source.description, self._plan.folder)
        self._mention_uncut_corpus()
        progress = self._progress
        tokenizer = self._tokenizer(progress)
        if model_vocab_size is not None:
            check_vocabulary(
                tokenizer.vocab_size,
                model_vocab_size,
                f"the tokenizer ([data] tokenizer = {self._config.tokenizer!r})",
            )
        self._partial.mkdir(parents=True, exist_ok=True)
        if progress.eos_token is None:
            with explained_write_errors(self._partial):
                write_atomically(self._partial / TOKENIZER_FILE, tokenizer.serialized)
            progress = progress.model_copy(update={"eos_token": tokenizer.eos_token})
            self._write_progress(progress)
        dtype: TokenDtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        while progress.stream < len(self._streams):
            with self._bar(progress) as bar:
                progress = self._prepare_stream(progress, tokenizer, dtype, bar)
        self._finish(progress, tokenizer, dtype)

    def _mention_uncut_corpus(self) -> None:
        """Logs that a corpus is there whose held-out documents were not cut, as in version 0.2."""
        if self._plan.max_document_share is None:
            return
        config = self._config.model_copy(update={"max_document_share": None})
        folder = plan_from_name(config).folder
        if folder.is_dir():
            logger.warning(
                "%s holds the same text without cuts of held-out documents, as before version 0.3; "
                'to resume a run on it, set [data] max_document_share = "none"',
                folder,
            )

    def _prepare_stream(
        self, progress: Progress, tokenizer: DocumentTokenizer, dtype: str, bar: "tqdm[NoReturn]"
    ) -> Progress:
        split = self._streams[progress.stream]
        read = text_batches(
            self._source.read(split, progress.position, tokenizer),
            self._limits,
            progress.documents,
            progress.bytes_of_text,
        )
        # Three threads: one reads, one tokenizes with all cores, this one writes.
        batches = read_ahead(token_batches(read_ahead(read), tokenizer))
        started_at, num_tokens = time.monotonic(), 0

        def advance(batch: TokenBatch) -> None:
            nonlocal num_tokens
            num_tokens += sum(map(len, batch.tokens)) + len(batch.tokens)
            rate = num_tokens / max(time.monotonic() - started_at, 1e-3)
            bar.set_postfix_str(f"{rate / 1e3:,.0f}k tokens/s", refresh=False)
            in_bytes = self._limits.max_documents is None
            bar.update(sum(batch.read.num_bytes) if in_bytes else len(batch.tokens))

        while True:
            after = write_segment(
                batches,
                tokenizer.eos_id,
                folder=self._partial,
                dtype=dtype,
                progress=progress,
                split_of=self._split_of(split),
                on_batch=advance,
                save=self._write_progress,
                segment_tokens=self._segment_tokens,
            )
            if after is None:
                break
            progress = after
            self._write_progress(progress)
            is_text = not self._source.holds_tokens
            logger.info(
                "finished segment %d: %d documents%s so far",
                progress.segments,
                progress.documents,
                f", {progress.bytes_of_text / 1e6:.1f} MB of text" if is_text else "",
            )
        progress = progress.model_copy(
            update={
                "stream": progress.stream + 1,
                "position": None,
                "documents": 0,
                "bytes_of_text": 0,
            }
        )
        self._write_progress(progress)
        return progress

    def _split_of(self, split: str | None) -> Callable[[int], str]:
        if split is not None:
            return lambda document: split
        return self._drawn_split

    def _drawn_split(self, document: int) -> str:
        if is_held_out(document, self._period):
            return "validation"
        if self._test_period is not None and is_held_out(document, self._test_period, first=1):
            return "test"
        return "train"

    def _tokenizer(self, progress: Progress) -> DocumentTokenizer:
        """The tokenizer saved by the preparation being resumed, or a new one."""
        if progress.eos_token is not None:
            return read_tokenizer(self._partial / TOKENIZER_FILE, progress.eos_token)
        if self._config.tokenizer_path is not None:
            return read_tokenizer(self._config.tokenizer_path)
        if self._config.hub_tokenizer is not None:
            return fetch_tokenizer(self._config.hub_tokenizer)
        vocab_size = self._config.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE
        logger.info("training a byte-level BPE tokenizer of %d tokens on the corpus", vocab_size)
        return train_tokenizer(self._training_sample(), vocab_size)

    def _training_sample(self) -> Iterator[str]:
        assert not self._source.holds_tokens, "checked by the plan"
        max_bytes = min(self._config.max_bytes or TRAINING_SAMPLE_BYTES, TRAINING_SAMPLE_BYTES)
        split = self._streams[0]
        split_of = self._split_of(split)
        document = 0
        limits = Limits(self._limits.max_documents, max_bytes)
        for batch in text_batches(self._source.read(split, None, None), limits):
            for text in batch.documents:
                if split_of(document) == "train":
                    yield text
                document += 1

    def _bar(self, progress: Progress) -> "tqdm[NoReturn]":
        """A progress bar for one stream: over documents if capped, otherwise over bytes."""
        total: int | None = self._limits.max_documents
        initial, unit = progress.documents, "documents"
        if total is None:
            sizes = [
                size
                for size in (self._config.max_bytes, self._source.num_bytes)
                if size is not None
            ]
            total, initial, unit = min(sizes, default=None), progress.bytes_of_text, "B"
        return tqdm(
            desc=f"tokenizing {self._streams[progress.stream] or ''}".rstrip(),
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=True,
            disable=None if self._show_progress else True,
            mininterval=0.2,
        )

    def _read_progress(self) -> Progress:
        file = self._partial / PROGRESS_FILE
        if self._partial.is_symlink():
            raise CorpusError(f"{self._partial} is a link; remove it")
        try:
            progress = Progress.model_validate_json(file.read_bytes())
            (self._partial / TOKENIZER_FILE).stat()
            if any(path.is_symlink() for path in self._partial.iterdir()):
                raise ValueError("it holds links")
            for shards in progress.splits.values():
                for shard in shards:
                    num_bytes = file_inside(self._partial, shard.file).stat().st_size
                    if num_bytes not in (2 * shard.tokens, 4 * shard.tokens):
                        raise ValueError(f"{shard.file} has {num_bytes} bytes")
            for shard in progress.unfinished.values():
                # More may have been written before the stop, but not less.
                if file_inside(self._partial, shard.file).stat().st_size < 2 * shard.tokens:
                    raise ValueError(f"{shard.file} is truncated")
        except (OSError, ValueError) as error:
            if self._partial.exists():
                logger.info("cannot resume %s (%s); starting over", self._partial, error)
                shutil.rmtree(self._partial)
            return Progress()
        logger.info(
            "resuming a stopped preparation after %d finished segments and %d tokens more",
            progress.segments,
            sum(shard.tokens for shard in progress.unfinished.values()),
        )
        return progress

    def _write_progress(self, progress: Progress) -> None:
        with explained_write_errors(self._partial):
            write_atomically(self._partial / PROGRESS_FILE, progress.model_dump_json())

    def _finish(self, progress: Progress, tokenizer: DocumentTokenizer, dtype: TokenDtype) -> None:
        has_test = self._test_period is not None and not self._source.splits
        held_out = ("validation", "test") if has_test else ("validation",)
        names = ("train", *held_out)
        splits = {split: progress.splits.get(split, []) for split in names}
        for split, shards in splits.items():
            if not shards:
                raise CorpusError(
                    f"{self._source.description}: no document for the {split} split; a "
                    f"corpus needs at least {len(names)} documents, {len(names) - 1} of them held "
                    "out; add text"
                )
        caps: dict[str, int] = {}
        uncut: list[ShardRecord] = []
        share = self._plan.max_document_share
        for split in held_out:
            if share is None:
                break
            with explained_write_errors(self._partial):
                cut = cut_long_documents(
                    self._partial, split, splits[split], dtype, tokenizer, share
                )
            if cut is not None:
                uncut += splits[split]
                caps[split], splits[split] = cut.cap, [cut.shard]
                logger.info(
                    "cut %d documents of the %s split to %d tokens, %.1f %% of the split",
                    cut.num_cut,
                    split,
                    cut.cap,
                    100 * cut.cap / cut.shard.tokens,
                )
        tokenizer_sha256 = sha256_of_file(self._partial / TOKENIZER_FILE)
        index = CorpusIndex(
            format_version=FORMAT_VERSION,
            name=self._plan.folder.name,
            source=self._source.description,
            identity=self._plan.identity,
            tokenizer=TokenizerRecord(
                sha256=tokenizer_sha256,
                vocab_size=tokenizer.vocab_size,
                eos_token=tokenizer.eos_token,
                eos_id=tokenizer.eos_id,
            ),
            dtype=dtype,
            splits=splits,
            document_caps=caps,
            revision=progress.revision,
            fingerprint=fingerprint_of(tokenizer_sha256, dtype, splits),
            versions={
                "switchtitan": __version__,
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )
        # Earlier versions read an index without newer keys.
        newer = ("document_caps", "revision")
        unused = {key for key in newer if not getattr(index, key)}
        contents = index.model_dump_json(indent=2, exclude=unused)
        with explained_write_errors(self._partial.parent):
            write_index(self._partial, contents)
            os.rename(self._partial, self._plan.folder)
            sync_folder(self._plan.folder.parent)
        # Only now: a preparation killed before the rename resumes from them.
        for name in (PROGRESS_FILE, *(shard.file for shard in uncut)):
            with suppress(OSError):
                (self._plan.folder / name).unlink()
        logger.info(
            "corpus ready: %s tokens in %s",
            ", ".join(f"{index.num_tokens(split)} {split}" for split in splits),
            self._plan.folder,
        )
