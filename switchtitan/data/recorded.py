"""The corpus of a run, as its checkpoints record it: opened by content, wherever it is now."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from switchtitan.data.config import DataConfig
from switchtitan.data.corpus import INDEX_FILE, Corpus, Record, join_sources, read_index
from switchtitan.data.sequences import ONE_SOURCE, Schedule
from switchtitan.data.sources import DATASETS, Source
from switchtitan.errors import CorpusError, abbreviate
from switchtitan.files import sha256_of_file
from switchtitan.registry import explain

logger = logging.getLogger(__name__)


class RecordedSource(Record):
    """A prepared corpus that a run reads, and where it was; see `Corpus`, `Schedule` and
    `TokenizerRecord`."""

    folder: str
    fingerprint: str
    count: int
    fallback_for: str | None
    bos: bool


class _RecordedCorpus(Record):
    """A part of the metadata of a run."""

    sources: list[RecordedSource]


def record(corpus: Corpus) -> dict[str, JsonValue]:
    """Returns what a run's checkpoints record of its corpus, for `find_recorded`."""
    sources = [
        RecordedSource(
            folder=str(source.folder.absolute()),
            fingerprint=source.fingerprint,
            count=count,
            fallback_for=source.fallback_for,
            bos=source.index.tokenizer.bos,
        )
        for source, count in corpus.shares
    ]
    return {"corpus": corpus.description, **_RecordedCorpus(sources=sources).model_dump()}


def find_recorded(run: Mapping[str, object], cache_dir: Path, checkpoint: Path) -> Corpus:
    """Finds the corpus that the metadata of a checkpoint record, by its index, in `cache_dir` and
    in the folder where it was; verifies and prepares nothing. Raises a CorpusError if it is not on
    this machine, or its index is damaged."""
    sources = recorded_sources(run, checkpoint)
    parts = [_find(source, cache_dir, checkpoint) for source in sources]
    return join_sources(parts, Schedule(tuple(source.count for source in sources)))


def recorded_sources(run: Mapping[str, object], checkpoint: Path) -> list[RecordedSource]:
    """Returns the sources of a run, the one with its tokenizer first; see `find_recorded`."""
    try:
        sources = _RecordedCorpus.model_validate(run).sources
        counts = [source.count for source in sources]
        if sum(counts) != sum(ONE_SOURCE.counts) or min(counts) < 1:
            raise ValueError(f"sources[].count = {counts}")
    except ValueError as error:
        raise CorpusError(f"{checkpoint}: names no corpus ({explain(error)})") from error
    return sources


def _find(source: RecordedSource, cache_dir: Path, checkpoint: Path) -> Corpus:
    recorded, cache = Path(source.folder), cache_dir.expanduser()
    others = sorted(index.parent for index in cache.glob(f"*/{INDEX_FILE}"))
    for folder in dict.fromkeys([cache / recorded.name, recorded, *others]):
        if not os.path.isfile(folder / INDEX_FILE):  # also without permission
            continue
        with suppress(CorpusError):
            index = read_index(folder)
            if index.fingerprint == source.fingerprint:
                return Corpus(folder, index, source.fallback_for)
    keys = " --dataset pystdlib --tokenizer train" if source.fallback_for else ""
    config_file = checkpoint.absolute().parents[1] / "config.toml"
    raise CorpusError(
        f"the run's corpus (fingerprint {source.fingerprint}) is neither at {source.folder} nor in "
        f"[data] cache_dir = {str(cache_dir)!r}: missing, damaged, or its documents have changed; "
        "copy it there, or restore its documents, delete what is left of its folder and prepare it "
        f"again: switchtitan prepare --config {config_file}{keys}"
    )


def check_unchanged(config: DataConfig, corpus: Corpus) -> None:
    """Checks that a user's own files, where they still are, are those of the recorded corpus; see
    `check_files`."""
    for own, prepared in zip(config.source_configs(), corpus.sources, strict=True):
        if not prepared.index.files:
            continue
        try:
            source = DATASETS[own.dataset].open(own, None)
        except CorpusError as error:
            logger.info("training on %s without its source: %s", prepared.folder, error)
        else:
            check_files(own, source, prepared, "start a new run in another [job] output_dir")


def check_files(config: DataConfig, source: Source, corpus: Corpus, remedy: str) -> None:
    """Checks that a user's own files are those that a corpus was prepared from.

    Compares names, sizes and times, and reads a file only if its time differs. Raises a CorpusError
    with the remedy if they are not.
    """
    now = {file.name: file for file in source.files}
    changed = now.keys() ^ {file.name for file in corpus.index.files}
    for was in corpus.index.files:
        found = now.get(was.name, was)
        if found.num_bytes != was.num_bytes or (
            found.changed_ns != was.changed_ns
            and was.sha256 not in (None, sha256_of_file(source.folder / was.name))
        ):
            changed.add(was.name)
    if changed:
        raise CorpusError(
            f"[data] path = {str(config.path)!r}: not what {corpus.folder} was prepared from: "
            f"{abbreviate(sorted(changed))}: missing, new or changed; restore that, or {remedy}"
        )
