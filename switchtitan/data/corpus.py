"""Open a prepared corpus, the same one on every rank."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from switchtitan.data.config import TRAINED_TOKENIZER, DataConfig
from switchtitan.data.corpus_files import CorpusIndex, check_sizes, read_index, verify_files
from switchtitan.data.corpus_plan import plan_corpus
from switchtitan.data.mixture import (
    PERIOD,
    InterleavedSequences,
    MixedSequences,
    Schedule,
    schedule_of,
)
from switchtitan.data.prepare import prepare_corpus
from switchtitan.data.sequences import TokenSequences
from switchtitan.data.tokenizer import DocumentTokenizer, check_vocabulary, read_tokenizer
from switchtitan.distributed.world import World
from switchtitan.errors import CorpusError

logger = logging.getLogger(__name__)

VERIFIED_BYTES = 1 << 30
"""Corpora of up to 1 GiB of tokens are verified by checksum on every open (a second or two), larger
ones by size; `switchtitan prepare` verifies all."""


class _MainCorpus(NamedTuple):
    """The main rank's corpus."""

    fingerprint: str
    fallback_for: str | None


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    index: CorpusIndex
    fallback_for: str | None
    """The requested corpus and why it was unavailable; None if this is the requested corpus."""
    parts: tuple["Corpus", ...] = ()
    """Of a mixture: all sources. Folder and index are those of the first one, whose tokenizer all
    have."""
    schedule: Schedule | None = None
    """Of a mixture."""

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the tokens and the tokenizer on any machine."""
        if self.schedule is None:
            return self.index.fingerprint
        pairs = zip(self.parts, self.schedule.counts, strict=True)
        contents = [[part.fingerprint, count] for part, count in pairs]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]

    @property
    def sources(self) -> "tuple[Corpus, ...]":
        """The corpora that were prepared: all of a mixture, or this one."""
        return self.parts or (self,)

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
        if self.schedule is not None:
            pairs = zip(self.parts, self.schedule.counts, strict=True)
            shares = (f"{count / PERIOD:.2%} {part.description}" for part, count in pairs)
            return f"mixture of {' + '.join(shares)}"
        fallback = f" (fallback for {self.fallback_for})" if self.fallback_for else ""
        return self.index.source + fallback

    def tokenizer(self) -> DocumentTokenizer:
        """The tokenizer whose ids the corpus holds."""
        return read_tokenizer(self.folder, self.index.tokenizer.eos_token)

    def train_split(self, seq_len: int) -> TokenSequences | MixedSequences:
        """The training sequences, of all sources of a mixture. Errors: see `split`."""
        if self.schedule is None:
            return self.split("train", seq_len)
        parts = [part.split("train", seq_len) for part in self.parts]
        return MixedSequences(parts, [part.name for part in self.parts], self.schedule)

    def held_out_split(
        self, name: Literal["validation", "test"], seq_len: int
    ) -> TokenSequences | InterleavedSequences:
        """Held-out sequences, of all sources of a mixture in their shares. Errors: see `split`."""
        if self.schedule is None:
            return self.split(name, seq_len)
        return InterleavedSequences([p.split(name, seq_len) for p in self.parts], self.schedule)

    def split(self, name: Literal["train", "validation", "test"], seq_len: int) -> TokenSequences:
        """The sequences of one split of a corpus that is no mixture.

        Raises:
            CorpusError: if there is no such split, it is shorter than one sequence, or a shard is
                missing or truncated.
        """
        if name not in self.index.splits:
            raise CorpusError(
                f"the corpus in {self.folder} has no {name} split, only "
                f"{', '.join(self.index.splits)}; leave --split or [evaluation] test_tokens out, "
                "or set [data] test_fraction if the corpus does not have its own splits"
            )
        if self.index.num_tokens(name) < seq_len + 1:
            more = "" if name == "train" else f" or increase {name}_fraction"
            raise CorpusError(
                f"[data] seq_len = {seq_len}: the {name} split of {self.folder} has "
                f"{self.index.num_tokens(name):,} tokens, fewer than the {seq_len + 1:,} of one "
                f"sequence and its last target; lower seq_len, use a larger corpus{more}"
            )
        shards = self.index.splits[name]
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
        check_vocabulary(self.vocab_size, model_vocab_size, f"the tokenizer of {self.folder}")


def open_corpus(
    config: DataConfig, *, ranks: World | None = None, model_vocab_size: int | None = None
) -> Corpus:
    """Opens the corpus of `config`, the same one on every rank; prepares it on first use.

    The main rank plans and prepares, then one rank of each machine that does not see its folder,
    while the others wait.

    Args:
        config: the section.
        ranks: None for this process alone. Its waits must not time out during a preparation.
        model_vocab_size: the largest vocabulary that the tokenizer may have; by default any.
            Checked before a preparation too, which can take hours.

    Raises:
        CorpusError: on every rank, if the corpus of one cannot be prepared or read, is damaged, or
            is not the main rank's, or the tokenizer has more tokens than the model.
    """
    if not config.sources:
        return _open(config, ranks, model_vocab_size)
    schedule = schedule_of([source.weight for source in config.sources])
    tokenizer, parts = config.tokenizer, list[Corpus]()
    for number in range(len(config.sources)):
        part = _open(config.source_config(number, tokenizer), ranks, model_vocab_size)
        for other, earlier in enumerate(parts):
            if earlier.fingerprint == part.fingerprint:
                raise CorpusError(
                    f"[data] sources[{number}]: holds the same tokens as sources[{other}]; leave "
                    "it out, and add its weight to the other"
                )
        parts.append(part)
        if tokenizer == TRAINED_TOKENIZER:
            tokenizer = str(part.folder)
    return Corpus(parts[0].folder, parts[0].index, None, tuple(parts), schedule)


def open_prepared(
    folder: Path, fallback_for: str | None = None, *, verifies: bool = True
) -> Corpus:
    """Opens the prepared corpus in a folder.

    Args:
        verifies: whether checksums are compared, if it is not larger than `VERIFIED_BYTES`.

    Raises:
        CorpusError: if a file is missing or damaged.
    """
    index = read_index(folder)
    check_sizes(folder, index)
    item_bytes = 2 if index.dtype == "uint16" else 4
    num_bytes = item_bytes * sum(index.num_tokens(split) for split in index.splits)
    if verifies and num_bytes <= VERIFIED_BYTES:
        verify_files(folder, index)
    return Corpus(folder, index, fallback_for)


def _open(config: DataConfig, ranks: World | None, model_vocab_size: int | None) -> Corpus:
    if ranks is None:
        return _open_own(config, True, model_vocab_size, None)
    opened: list[Corpus] = []

    def take_turn(is_own: bool, main: _MainCorpus | None = None) -> _MainCorpus | None:
        if not is_own:
            return None
        corpus = _open_own(config, ranks.is_node_main, model_vocab_size, main)
        opened.append(corpus)
        return _MainCorpus(corpus.fingerprint, corpus.fallback_for)

    main = ranks.together(lambda: take_turn(ranks.is_main))[0]
    ranks.together(lambda: take_turn(ranks.is_node_main and not opened, main))
    ranks.together(lambda: take_turn(not opened, main))
    return opened[0]


def _open_own(
    config: DataConfig, is_node_main: bool, model_vocab_size: int | None, main: _MainCorpus | None
) -> Corpus:
    """Opens this rank's corpus, which must be the main rank's; prepares it if it is not there.

    Args:
        is_node_main: whether to verify it: it may be on a disk that only this machine sees.
        main: None on the main rank.
    """
    fallback_for = None if main is None else main.fallback_for
    plan = plan_corpus(config if fallback_for is None else config.fallback_config())
    if main is None and plan.fallback_for is not None:
        fallback_for = plan.fallback_for
        logger.warning(
            "REQUESTED CORPUS UNAVAILABLE, FALLING BACK: training on %s instead of %s",
            plan.source.description,
            fallback_for,
        )
    if main is not None and not plan.is_prepared:
        logger.warning(
            "preparing the corpus again in %s: this machine does not see the main rank's folder; "
            "[data] cache_dir on a shared disk is prepared once",
            plan.folder,
        )
    prepare_corpus(plan, model_vocab_size)
    corpus = open_prepared(plan.folder, fallback_for, verifies=is_node_main)
    if model_vocab_size is not None:
        corpus.check_vocabulary(model_vocab_size)
    if main is not None and corpus.fingerprint != main.fingerprint:
        raise CorpusError(
            f"{plan.folder}: this rank's corpus has fingerprint {corpus.fingerprint}, the main "
            f"rank's {main.fingerprint}; put [data] cache_dir on a disk that all nodes share, or "
            "copy the main rank's folder"
        )
    return corpus
