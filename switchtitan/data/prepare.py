"""Tokenize a corpus once into memory-mapped shards: resumable, atomic, one process at a time."""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from switchtitan.data.config import TRAINED_TOKENIZER, DataConfig
from switchtitan.data.corpus import (
    FORMAT_VERSION,
    HELD_OUT_DOCUMENT_TOKENS,
    TOKENIZER_FILE,
    VERIFIED_BYTES,
    Corpus,
    CorpusIndex,
    CorpusPlan,
    ShardRecord,
    TokenizerRecord,
    join_sources,
    plan_corpus,
    plan_from_name,
    read_index,
    write_index,
)
from switchtitan.data.recorded import check_files
from switchtitan.data.sequences import schedule_of
from switchtitan.data.sources import DATASETS, Documents, FileState, Position, newest_commit
from switchtitan.data.tokenizer import (
    DocumentTokenizer,
    check_vocabulary,
    fetch_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from switchtitan.distributed.world import World
from switchtitan.errors import CorpusError
from switchtitan.files import (
    rename_complete,
    sha256_of_file,
    write_atomically,
    write_flushed,
)
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
SEGMENT_TOKENS = 1 << 26
"""Tokens in a segment, which is one shard for each split. A stop loses the unfinished one: at most
a minute of tokenizing on 2 cores."""
TRAINING_SAMPLE_BYTES = 1 << 25
"""A tokenizer is trained on the first training documents: a few seconds."""
CHUNK_BYTES = 1 << 21
CHUNK_DOCUMENTS = 4096


def open_corpus(
    config: DataConfig,
    *,
    ranks: World | None = None,
    model_vocab_size: int | None = None,
    prepares: bool = True,
) -> Corpus:
    """Opens the corpus of `config`, the same one on every rank; prepares it on first use.

    The main rank plans and prepares, then one rank of each machine that does not see its folder,
    while the others wait.

    Args:
        ranks: None for this process alone.
        model_vocab_size: the largest vocabulary that the tokenizer may have; by default any.
            Checked before a preparation too, which can take hours.
        prepares: whether a corpus is prepared that is not yet.

    Raises:
        CorpusError: on every rank, if the corpus of one cannot be prepared or read, is damaged, or
            is not the main rank's, or the tokenizer has more tokens than the model.
    """
    schedule = schedule_of([source.weight for source in config.sources] or [1.0])
    parts = list[Corpus]()
    for own in config.source_configs():
        if parts and own.tokenizer == TRAINED_TOKENIZER:
            own = own.model_copy(update={"tokenizer": str(parts[0].folder)})
        if ranks is not None:
            parts.append(_open_on_ranks(own, ranks, model_vocab_size))
        else:
            plan = plan_corpus(own) if prepares else plan_from_name(own)
            parts.append(_open(plan, model_vocab_size, prepares=prepares))
    return join_sources(parts, schedule)


def _open(
    plan: CorpusPlan, model_vocab_size: int | None, *, prepares: bool = True, verifies: bool = True
) -> Corpus:
    if prepares:
        prepare_corpus(plan, model_vocab_size)
    corpus = Corpus(plan.folder, read_index(plan.folder), plan.fallback_for)
    corpus.verify(VERIFIED_BYTES if verifies else 0)
    remedy = f"delete {plan.folder} to prepare it again, or set another [data] cache_dir"
    if verifies:
        check_files(plan.config, plan.source, corpus, remedy)
    is_old = not corpus.index.tokenizer.bos and read_tokenizer(plan.folder).bos_ids
    if is_old and plan.config.bos is None:
        raise CorpusError(
            f"{plan.folder}: an earlier version prepared it, without the tokens that its tokenizer "
            f"puts before a text; {remedy}"
        )
    if model_vocab_size is not None:
        corpus.check_vocabulary(model_vocab_size)
    return corpus


def _open_on_ranks(config: DataConfig, ranks: World, model_vocab_size: int | None) -> Corpus:
    main = ranks.on_main(lambda: _open(plan_corpus(config), model_vocab_size))

    def open_same() -> Corpus:
        if ranks.is_main:
            return main
        own = config if main.fallback_for is None else config.fallback_config()
        plan = plan_from_name(own, main.fallback_for)
        if not plan.folder.is_dir():
            logger.warning(
                "preparing the corpus again in %s: this machine does not see the main rank's "
                "folder; [data] cache_dir on a shared disk is prepared once",
                plan.folder,
            )
        corpus = _open(plan, model_vocab_size, verifies=ranks.is_node_main)
        if corpus.fingerprint != main.fingerprint:
            raise CorpusError(
                f"{plan.folder}: this rank's corpus has fingerprint {corpus.fingerprint}, the main "
                f"rank's {main.fingerprint}; put [data] cache_dir on a disk that all nodes share, "
                "or copy the main rank's folder"
            )
        return corpus

    return ranks.together(open_same)[ranks.rank]


def prepare_corpus(plan: CorpusPlan, model_vocab_size: int | None = None) -> None:
    """Prepares a corpus unless it exists, or waits while another process prepares it.

    The folder is `<folder>.partial` until it is complete. A stopped preparation resumes after the
    last finished segment.

    Raises:
        CorpusError: if the source or the tokenizer cannot be read or does not fit the model, there
            are too few documents, or the folder cannot be written.
    """
    if plan.folder.is_dir():
        return
    lock = FileLock(plan.folder.with_name(plan.folder.name + ".lock"))
    try:
        plan.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that is preparing %s", plan.folder)
            lock.acquire()
        if not plan.folder.is_dir():
            _Preparation(plan).run(model_vocab_size)
    except (OSError, NotImplementedError) as error:
        raise CorpusError(
            f"[data] cache_dir = {str(plan.config.cache_dir)!r}: cannot be written and locked "
            f"({error}); free space there or choose another folder, or limit the corpus with "
            "[data] max_bytes, and run again to resume"
        ) from error
    finally:
        lock.release()


class Progress(BaseModel):
    """All that resuming a preparation needs."""

    model_config = ConfigDict(strict=True, extra="forbid")  # an earlier version's has other keys

    eos_token: str | None = None
    """Of the saved tokenizer; None before it is saved."""
    stream: int = 0
    """The stream being read, in the order of the source's splits."""
    position: Position | None = None
    documents: int = 0
    bytes_of_text: int = 0
    """Where to go on in that stream, and the non-empty documents before it."""
    splits: dict[str, list[ShardRecord]] = {}
    """What is finished."""
    revision: str | None = None
    files: list[FileState] = []
    """See `CorpusIndex`."""
    num_files_read: int = 0


class _Preparation:
    """A preparation from its start, or from where another one was stopped."""

    def __init__(self, plan: CorpusPlan) -> None:
        self._plan, self._config, self._source = plan, plan.config, plan.source
        self._folder = plan.folder.with_name(plan.folder.name + ".partial")
        self._progress = _read_progress(self._folder, list(plan.source.files))

    def run(self, model_vocab_size: int | None) -> None:
        config, progress, row = self._config, self._progress, DATASETS[self._config.dataset]
        if self._source.repository is not None:
            progress.revision = progress.revision or newest_commit(self._source.repository)
            self._source = row.open(config, progress.revision)
            logger.info("reading commit %s of the dataset", progress.revision)
        logger.info("preparing corpus: %s -> %s", self._source.description, self._plan.folder)
        own_splits = self._source.splits()
        # Where a dataset always has its own splits, the keys are for other sources.
        if own_splits and not row.has_own_splits:
            for key in ("validation_fraction", "test_fraction"):
                if (value := getattr(config, key)) is not None:
                    raise CorpusError(
                        f"[data] {key} = {value} has no effect: {self._source.description} has its "
                        "own splits; leave it out"
                    )
        # The splits to read; None is all documents, of which we hold some out.
        streams = own_splits or (None,)
        tokenizer, bos = self._tokenizer(streams[0]), config.bos
        if bos and not tokenizer.bos_ids:
            raise CorpusError(
                "[data] bos = true: the tokenizer puts no token before a text; leave bos out, or "
                "change the post_processor in its file"
            )
        if bos is False or (bos is None and row.holds_tokens):
            tokenizer = tokenizer.without_bos()
        if model_vocab_size is not None:
            name = f"the tokenizer ([data] tokenizer = {config.tokenizer!r})"
            check_vocabulary(tokenizer.vocab_size, model_vocab_size, name)
        self._folder.mkdir(exist_ok=True)
        if progress.eos_token is None:
            write_atomically(self._folder / TOKENIZER_FILE, tokenizer.serialized)
            progress.eos_token = tokenizer.eos_token
            self._save_progress()
        for stream in streams[progress.stream :]:
            self._write_stream(stream, tokenizer)
        has_test_split = config.test_fraction is not None and not own_splits
        self._finish(tokenizer, ["train", "validation", *["test"] * has_test_split])

    def _tokenizer(self, stream: str | None) -> DocumentTokenizer:
        """The tokenizer saved by the preparation being resumed, or a new one."""
        config, eos_token = self._config, self._progress.eos_token
        if eos_token is not None:
            return read_tokenizer(self._folder / TOKENIZER_FILE, eos_token)
        if config.tokenizer_origin == "local":
            return read_tokenizer(Path(config.tokenizer))
        if config.tokenizer_origin == "hub":
            return fetch_tokenizer(config.tokenizer)
        vocab_size = config.trained_vocab_size
        logger.info("training a byte-level BPE tokenizer of %d tokens on the corpus", vocab_size)
        max_bytes = min(config.max_bytes or TRAINING_SAMPLE_BYTES, TRAINING_SAMPLE_BYTES)
        documents = self._source.read(stream, None, None)
        chunks = read_chunks(documents, config.max_documents, max_bytes)
        texts = enumerate(chain.from_iterable(texts for texts, *_ in chunks))
        sample = (text for number, text in texts if _split_of(number, stream, config) == "train")
        return train_tokenizer(sample, vocab_size)

    def _write_stream(self, stream: str | None, tokenizer: DocumentTokenizer) -> None:
        """Writes the segments of a stream that are left, and the progress after each."""
        config, progress = self._config, self._progress
        chunks = read_chunks(
            self._source.read(stream, progress.position, tokenizer),
            config.max_documents,
            config.max_bytes,
            progress.documents,
            progress.bytes_of_text,
        )
        total = config.max_bytes or self._source.num_bytes
        segment, num_tokens = dict[str, list[NDArray[Any]]](), 0
        with progress_bar(f"tokenizing {stream or ''}".rstrip(), total=total, unit="B") as bar:
            bar.update(progress.bytes_of_text)
            for documents, num_bytes, position in read_ahead(chunks):
                if isinstance(documents[0], str):
                    encoded = tokenizer.encode_documents(documents)
                    # Arrays take 2 or 4 bytes per token, Python's numbers up to 40.
                    documents = [np.array(ids, dtype=tokenizer.dtype) for ids in encoded]
                for ids in documents:
                    split = _split_of(progress.documents, stream, config)
                    is_whole = split in (stream, "train")
                    kept = ids if is_whole else ids[: HELD_OUT_DOCUMENT_TOKENS - 1]
                    segment.setdefault(split, []).append(kept)
                    progress.documents += 1
                    num_tokens += len(ids) + 1
                progress.position, progress.num_files_read = position, position.get("file", 0) + 1
                progress.bytes_of_text += num_bytes
                bar.update(num_bytes)
                if num_tokens >= SEGMENT_TOKENS:
                    self._write_segment(segment, tokenizer)
                    segment, num_tokens = {}, 0
        if segment:
            self._write_segment(segment, tokenizer)
        progress.stream += 1
        progress.position, progress.documents, progress.bytes_of_text = None, 0, 0
        self._save_progress()

    def _write_segment(
        self, segment: dict[str, list[NDArray[Any]]], tokenizer: DocumentTokenizer
    ) -> None:
        """Writes one shard for each split, and the progress after it."""
        for split, documents in segment.items():
            shards = self._progress.splits.setdefault(split, [])
            file = self._folder / f"{split}-{len(shards):05d}.bin"
            shards.append(write_shard(file, documents, tokenizer))
        self._save_progress()
        logger.info("finished a segment of %s", " and ".join(segment))

    def _save_progress(self) -> None:
        write_atomically(self._folder / PROGRESS_FILE, self._progress.model_dump_json())

    def _finish(self, tokenizer: DocumentTokenizer, names: Sequence[str]) -> None:
        """Writes the index of these splits, and gives the folder its name."""
        plan, splits = self._plan, self._progress.splits
        for split in names:
            if split not in splits:
                found = sum(shard.documents for shards in splits.values() for shard in shards)
                raise CorpusError(
                    f"{self._source.description}: no document for {split}: {found} found, "
                    f"all in {' and '.join(splits) or 'none'}; at least {len(names)} are needed"
                )
        splits = {split: splits[split] for split in names}
        index = CorpusIndex(
            format_version=FORMAT_VERSION,
            name=plan.folder.name,
            source=plan.source.description,
            identity=plan.identity,
            tokenizer=TokenizerRecord(
                sha256=sha256_of_file(self._folder / TOKENIZER_FILE),
                vocab_size=tokenizer.vocab_size,
                eos_token=tokenizer.eos_token,
                eos_id=tokenizer.eos_id,
                bos=bool(tokenizer.bos_ids),
            ),
            dtype=tokenizer.dtype,
            splits=splits,
            revision=self._progress.revision,
            files=self._hashed_files(),
        )
        write_index(self._folder, index)
        rename_complete(self._folder, plan.folder)
        # Only now: a preparation killed before the rename resumes from it.
        (plan.folder / PROGRESS_FILE).unlink()
        counts = ", ".join(f"{index.num_tokens(split)} {split}" for split in splits)
        logger.info("corpus ready: %s tokens in %s", counts, plan.folder)

    def _hashed_files(self) -> list[FileState]:
        """Returns the source's files, with checksums of those that were read."""
        source, files = self._source, list(self._source.files)
        has_own_splits = self._progress.stream > 1
        num_read = len(files) if has_own_splits else self._progress.num_files_read
        with progress_bar("hashing source", total=source.num_bytes, unit="B") as bar:
            for number, file in enumerate(files[:num_read]):
                sha256 = sha256_of_file(source.folder / file.name, bar.update)
                files[number] = file._replace(sha256=sha256)
        if DATASETS[self._config.dataset].open(self._config, None).files != source.files:
            raise CorpusError(
                f"{source.description}: files have changed while they were read; run again to "
                "prepare the corpus from scratch"
            )
        return files


def _read_progress(folder: Path, files: list[FileState]) -> Progress:
    """Returns the progress of a stopped preparation of `files`; deletes what cannot be resumed."""
    try:
        progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes())
        if progress.files != files:
            raise ValueError("files of the source have changed since")
        if any(path.is_symlink() for path in (folder, *folder.iterdir())):
            raise ValueError("it holds links")
    except (OSError, ValueError) as error:
        if folder.exists():
            logger.info("cannot resume %s (%s); starting over", folder, error)
            shutil.rmtree(folder)
        return Progress(files=files)
    logger.info("resuming a stopped preparation after its last finished segment")
    return progress


def _split_of(document: int, stream: str | None, config: DataConfig) -> str:
    """Returns the split of a document of a stream by its number."""
    if stream is not None:
        return stream
    if is_held_out(document, config.held_out_fraction):
        return "validation"
    is_test = config.test_fraction is not None and is_held_out(document, config.test_fraction, 1)
    return "test" if is_test else "train"


@cache
def _period_of(fraction: float) -> Fraction:
    return 1 / Fraction(str(fraction))


def is_held_out(document: int, fraction: float, first: int = 0) -> bool:
    """Whether a document is held out: number `first`, and one of each later 1 / fraction documents,
    chosen by a hash that is salted with `first`.

    The held-out fraction is exact, as written in decimals. Blocks of documents are those of the
    period: 1 / 0.4 = 5/2 has blocks of 3 and 2 documents in turn."""
    period = _period_of(fraction)
    num_documents, num_blocks = period.numerator, period.denominator
    block = document * num_blocks // num_documents
    if block == 0:
        return document == first
    start, end = (-(-after * num_documents // num_blocks) for after in (block, block + 1))
    salt = first.to_bytes(8, "little")
    chosen = hashlib.blake2b(block.to_bytes(8, "little"), digest_size=8, salt=salt).digest()
    return document - start == int.from_bytes(chosen, "little") % (end - start)


Chunk = tuple[list[Any], int, Position]
"""Documents to tokenize together (texts, or arrays of token ids without their end tokens), their
bytes, and the stream's position after them."""


def read_chunks(
    documents: Documents,
    max_documents: int | None,
    max_bytes: int | None,
    num_documents: int = 0,
    num_bytes: int = 0,
) -> Iterator[Chunk]:
    """Yields the non-empty documents of a stream in chunks, up to the limits. The stream is after
    `num_documents` documents of `num_bytes` bytes. The one that crosses `max_bytes` is the last."""
    chunk, before, position = list[Any](), num_bytes, Position()
    while num_documents < (max_documents or math.inf) and num_bytes < (max_bytes or math.inf):
        document, position = next(documents, (None, position))
        if document is None:
            break
        if isinstance(document, str):
            # JSON can hold lone surrogates, which UTF-8 cannot encode: the tokenizer rejects them.
            data = document.encode("utf-8", "replace")
            document, size = data.decode("utf-8"), len(data)
        else:
            size = document.nbytes
        if size:
            chunk.append(document)
            num_documents, num_bytes = num_documents + 1, num_bytes + size
        if num_bytes - before >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk, num_bytes - before, position
            chunk, before = [], num_bytes
    if chunk:
        yield chunk, num_bytes - before, position


def read_ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Yields the same chunks, and reads the next one in a thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, chunks, None)
        while (chunk := pending.result()) is not None:
            pending = reader.submit(next, chunks, None)
            yield chunk


def write_shard(
    file: Path, documents: Sequence[NDArray[Any]], tokenizer: DocumentTokenizer
) -> ShardRecord:
    """Writes the token ids of documents, each with the end token after it, and flushes the file."""
    end = np.array([tokenizer.eos_id])
    parts = [part for ids in documents for part in (ids, end)]
    dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
    tokens = np.concatenate(parts, dtype=dtype, casting="unsafe")
    file.unlink(missing_ok=True)  # of a segment that was not finished
    write_flushed(file, tokens.data)
    sha256 = hashlib.sha256(tokens.data).hexdigest()
    return ShardRecord(file=file.name, documents=len(documents), tokens=len(tokens), sha256=sha256)
