"""Open a prepared corpus, the same one on every rank."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchtitan.data.config import DataConfig
from switchtitan.data.corpus_files import CorpusIndex, TokenSequences, read_index, verify_files
from switchtitan.data.corpus_plan import plan_corpus
from switchtitan.data.prepare import prepare_planned_corpus
from switchtitan.data.tokenizer import DocumentTokenizer, read_tokenizer
from switchtitan.errors import CorpusError, UserError

logger = logging.getLogger(__name__)

VERIFIED_BYTES = 1 << 30
"""Corpora of up to 1 GiB of tokens are verified by checksum on every open (a second or two), larger
ones by file size."""

Outcome = dict[str, str]
Broadcast = Callable[[Outcome], Outcome]
"""Returns the main rank's value on every rank; ignores the values of the other ranks."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    index: CorpusIndex
    fallback_for: str | None
    """The requested corpus and why it was unavailable; None if this is the requested corpus."""

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the tokens and the tokenizer on any machine."""
        return self.index.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.index.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self.index.tokenizer.eos_id

    @property
    def description(self) -> str:
        """The documents, for people and for a run's metadata, and the fallback if there was one."""
        if self.fallback_for is None:
            return self.index.source
        return f"{self.index.source} (fallback for {self.fallback_for})"

    def tokenizer(self) -> DocumentTokenizer:
        """The tokenizer whose ids the corpus holds."""
        return read_tokenizer(self.folder, self.index.tokenizer.eos_token)

    def split(self, name: Literal["train", "validation", "test"], seq_len: int) -> TokenSequences:
        """The sequences of one split.

        Raises:
            CorpusError: if there is no such split, it is shorter than one sequence, or a shard is
                missing or truncated.
        """
        if name not in self.index.splits:
            raise CorpusError(
                f"[evaluation] test_tokens: the corpus in {self.folder} has no {name} split, only "
                f"{', '.join(self.index.splits)}; leave test_tokens out, or set [data] "
                "test_fraction if the corpus does not have its own splits"
            )
        shards = self.index.splits[name]
        if self.index.num_tokens(name) < seq_len + 1:
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the {name} split of {self.folder} has "
                f"{self.index.num_tokens(name):,} tokens, fewer than the {seq_len + 1:,} of one "
                "sequence and its last target; lower seq_len, use a larger corpus"
                + (" or increase validation_fraction" if name == "validation" else "")
                + (" or increase test_fraction" if name == "test" else "")
            )
        return TokenSequences(
            [self.folder / shard.file for shard in shards],
            [shard.tokens for shard in shards],
            dtype=self.index.dtype,
            seq_len=seq_len,
            eos_id=self.eos_id,
        )

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Checks that a model can embed every token.

        Raises:
            CorpusError: if the tokenizer has more tokens than the model.
        """
        if self.vocab_size > model_vocab_size:
            raise CorpusError(
                f"[model] vocab_size = {model_vocab_size}: the tokenizer of {self.folder} has "
                f"{self.vocab_size} tokens; increase [model] vocab_size to at least that, or "
                "choose a smaller tokenizer ([data] tokenizer, or [data] vocab_size if it is "
                "trained)"
            )


def open_corpus(
    config: DataConfig,
    *,
    is_main: bool = True,
    broadcast: Broadcast | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Opens the corpus of `config`, the same one on every rank; prepares it on first use.

    The main rank plans and prepares while the others wait in `broadcast`. Then they open its
    corpus, or prepare their own copy and compare fingerprints if they cannot see its folder. If the
    main rank fails, all ranks raise its error.

    Args:
        config: the section.
        is_main: whether this rank prepares.
        broadcast: sends the main rank's value to all ranks; None for one rank. It must not time out
            during a preparation: prepare large corpora in advance with `switchtitan prepare`.
        show_progress: whether the main rank shows a progress bar on a terminal.

    Raises:
        CorpusError: if the corpus cannot be prepared or read, is damaged, or is not the main
            rank's.
    """
    if is_main:
        try:
            corpus = _open(config, show_progress)
        except UserError as error:
            _share(broadcast, {"error": str(error)})
            raise
        _share(
            broadcast,
            {"fallback_for": corpus.fallback_for or "", "fingerprint": corpus.fingerprint},
        )
        return corpus
    outcome = _share(broadcast, {})
    if "error" in outcome:
        raise CorpusError(outcome["error"])
    return _open_as_main_rank(config, outcome)


def open_prepared(folder: Path, fallback_for: str | None = None) -> Corpus:
    """Opens the prepared corpus in a folder.

    Raises:
        CorpusError: if a file is missing or damaged.
    """
    index = read_index(folder)
    item_bytes = 2 if index.dtype == "uint16" else 4
    if sum(index.num_tokens(split) for split in index.splits) * item_bytes <= VERIFIED_BYTES:
        verify_files(folder, index)
    return Corpus(folder, index, fallback_for)


def _open(config: DataConfig, show_progress: bool) -> Corpus:
    plan = plan_corpus(config)
    if plan.fallback_for is not None:
        logger.warning(
            "REQUESTED CORPUS UNAVAILABLE, FALLING BACK: training on %s instead of %s",
            plan.source.description,
            plan.fallback_for,
        )
    prepare_planned_corpus(plan, show_progress=show_progress)
    return open_prepared(plan.folder, plan.fallback_for)


def _open_as_main_rank(config: DataConfig, outcome: Outcome) -> Corpus:
    fallback_for = outcome["fallback_for"] or None
    plan = plan_corpus(config if fallback_for is None else config.fallback_config())
    prepare_planned_corpus(plan, show_progress=False)
    index = read_index(plan.folder)
    if index.fingerprint != outcome["fingerprint"]:
        raise CorpusError(
            f"{plan.folder}: this rank's corpus has fingerprint {index.fingerprint}, the main "
            f"rank's {outcome['fingerprint']}; put [data] cache_dir on a disk that all nodes "
            "share, or copy the main rank's folder"
        )
    return Corpus(plan.folder, index, fallback_for)


def _share(broadcast: Broadcast | None, outcome: Outcome) -> Outcome:
    return outcome if broadcast is None else broadcast(outcome)
