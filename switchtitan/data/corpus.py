"""A prepared corpus, open for reading, the same one on every rank."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from switchtitan.data.config import DataConfig
from switchtitan.data.corpus_files import CorpusIndex, TokenSequences, read_index, verify_files
from switchtitan.data.corpus_plan import plan_corpus
from switchtitan.data.prepare import carry_out
from switchtitan.data.tokenizer import DocumentTokenizer, read_tokenizer
from switchtitan.errors import CorpusError, UserError

logger = logging.getLogger(__name__)

VERIFIED_BYTES = 1 << 30
"""Corpora of up to 1 GiB of tokens are compared with their checksums whenever they are opened (a second or
two); of larger ones only the files' sizes are."""

Outcome = dict[str, str]
Broadcast = Callable[[Outcome], Outcome]
"""Returns the main rank's value on every rank; what other ranks hand in does not matter."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    index: CorpusIndex
    stands_in_for: str | None
    """Why this is the offline corpus and in place of what; None where it is the corpus asked for."""

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the tokens and the tokenizer, wherever they were prepared."""
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
        """What the documents are, for people and for a run's metadata; says so where the offline corpus
        stands in."""
        if self.stands_in_for is None:
            return self.index.source
        return f"{self.index.source}, in place of {self.stands_in_for}"

    def tokenizer(self) -> DocumentTokenizer:
        """The tokenizer whose ids the corpus holds."""
        return read_tokenizer(self.folder, self.index.tokenizer.eos_token)

    def split(self, name: Literal["train", "validation", "test"], seq_len: int) -> TokenSequences:
        """The sequences of one split.

        Raises:
            CorpusError: if there is no such split, it is shorter than one sequence, or a shard is missing or truncated.
        """
        if name not in self.index.splits:
            raise CorpusError(
                f"[evaluation] test_tokens: the corpus in {self.folder} has no {name} split, only "
                f"{', '.join(self.index.splits)}; leave test_tokens out, or set [data] test_fraction where the corpus has no "
                "splits of its own"
            )
        shards = self.index.splits[name]
        if self.index.num_tokens(name) < seq_len + 1:
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the {name} split of {self.folder} has "
                f"{self.index.num_tokens(name):,} tokens, fewer than the {seq_len + 1:,} of one sequence and "
                f"its last target; shorten seq_len, use a larger corpus"
                + (" or raise validation_fraction" if name == "validation" else "")
                + (" or raise test_fraction" if name == "test" else "")
            )
        return TokenSequences(
            [self.folder / shard.file for shard in shards],
            [shard.tokens for shard in shards],
            dtype=self.index.dtype,
            seq_len=seq_len,
            eos_id=self.eos_id,
        )

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Makes sure that a model can embed every token.

        Raises:
            CorpusError: if the tokenizer has more tokens than the model.
        """
        if self.vocab_size > model_vocab_size:
            raise CorpusError(
                f"[model] vocab_size = {model_vocab_size}: the tokenizer of {self.folder} has "
                f"{self.vocab_size} tokens; raise [model] vocab_size to that at least, or choose a smaller "
                f"tokenizer ([data] tokenizer, or vocab_size where it is trained)"
            )


def open_corpus(
    config: DataConfig,
    *,
    is_main: bool = True,
    broadcast: Broadcast | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Opens the corpus that `config` means, prepared on first use, the same one on every rank.

    The main rank decides and prepares while the others wait in `broadcast`; then they open its corpus too,
    or, where they do not see its folder, prepare their own copy and compare. If the main rank fails, all
    ranks raise its error.

    Args:
        config: the section.
        is_main: whether this rank prepares.
        broadcast: hands the main rank's value to all ranks; None where there is one rank. It must not time
            out before a preparation is over, so prepare large corpora beforehand with
            `switchtitan prepare`.
        show_progress: whether the main rank shows a progress bar on a terminal.

    Raises:
        CorpusError: if the corpus cannot be prepared or read, is damaged, or is not the main rank's.
    """
    if is_main:
        try:
            corpus = _open(config, show_progress)
        except UserError as error:
            _share(broadcast, {"error": str(error)})
            raise
        _share(
            broadcast,
            {"stands_in_for": corpus.stands_in_for or "", "fingerprint": corpus.fingerprint},
        )
        return corpus
    outcome = _share(broadcast, {})
    if "error" in outcome:
        raise CorpusError(outcome["error"])
    return _open_as_main_rank(config, outcome)


def open_prepared(folder: Path, stands_in_for: str | None = None) -> Corpus:
    """Opens a prepared corpus by its folder.

    Raises:
        CorpusError: if a file of it is missing or damaged.
    """
    index = read_index(folder)
    item_bytes = 2 if index.dtype == "uint16" else 4
    if sum(index.num_tokens(split) for split in index.splits) * item_bytes <= VERIFIED_BYTES:
        verify_files(folder, index)
    return Corpus(folder, index, stands_in_for)


def _open(config: DataConfig, show_progress: bool) -> Corpus:
    plan = plan_corpus(config)
    if plan.stands_in_for is not None:
        logger.warning(
            "REQUESTED CORPUS UNAVAILABLE, FALLING BACK: training on %s, in place of %s",
            plan.source.description,
            plan.stands_in_for,
        )
    carry_out(plan, show_progress=show_progress)
    return open_prepared(plan.folder, plan.stands_in_for)


def _open_as_main_rank(config: DataConfig, outcome: Outcome) -> Corpus:
    stands_in_for = outcome["stands_in_for"] or None
    plan = plan_corpus(config if stands_in_for is None else config.offline_stand_in())
    carry_out(plan, show_progress=False)
    index = read_index(plan.folder)
    if index.fingerprint != outcome["fingerprint"]:
        raise CorpusError(
            f"{plan.folder}: this rank's corpus has the fingerprint {index.fingerprint}, the main rank's "
            f"{outcome['fingerprint']}; put [data] cache_dir on a disk that all nodes share, or copy the "
            f"main rank's folder"
        )
    return Corpus(plan.folder, index, stands_in_for)


def _share(broadcast: Broadcast | None, outcome: Outcome) -> Outcome:
    return outcome if broadcast is None else broadcast(outcome)
