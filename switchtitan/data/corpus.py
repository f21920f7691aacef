"""Open a prepared corpus, the same one on every rank."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

from switchtitan.data.config import TRAINED_TOKENIZER, DataConfig
from switchtitan.data.corpus_files import (
    CorpusIndex,
    check_sizes,
    read_index,
    verify_changed_files,
    verify_files,
)
from switchtitan.data.corpus_plan import plan_corpus
from switchtitan.data.mixture import (
    PERIOD,
    InterleavedSequences,
    MixedSequences,
    Schedule,
    schedule_of,
)
from switchtitan.data.prepare import prepare_planned_corpus
from switchtitan.data.sequences import TokenSequences
from switchtitan.data.tokenizer import DocumentTokenizer, check_vocabulary, read_tokenizer
from switchtitan.errors import CorpusError

logger = logging.getLogger(__name__)

VERIFIED_BYTES = 1 << 30
"""Corpora of up to 1 GiB of tokens are verified by checksum on every open (a second or two). Of
larger ones, only files whose size or times changed since they were last verified."""

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks that open one corpus, as seen from one of them."""

    @property
    def is_main(self) -> bool: ...

    @property
    def is_node_main(self) -> bool:
        """Whether this is the first rank of its machine."""
        ...

    def together(self, function: Callable[[], T]) -> list[T]:
        """Returns the results of all ranks; raises a `UserError` of one rank on all."""
        ...


class _Decision(NamedTuple):
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
    parts: tuple["MixedPart", ...] = ()
    """Of a mixture: all sources. Folder and index are those of the first one, whose tokenizer all
    have."""

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the tokens and the tokenizer on any machine."""
        if not self.parts:
            return self.index.fingerprint
        contents = [[part.corpus.fingerprint, part.count] for part in self.parts]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:32]

    @property
    def sources(self) -> "tuple[Corpus, ...]":
        """The corpora that were prepared: all of a mixture, or this one."""
        return tuple(part.corpus for part in self.parts) or (self,)

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
        if self.parts:
            return "mixture of " + " + ".join(
                f"{part.count / PERIOD:.2%} {part.corpus.description}" for part in self.parts
            )
        description = self.index.source
        if self.fallback_for is not None:
            description += f" (fallback for {self.fallback_for})"
        return description

    def tokenizer(self) -> DocumentTokenizer:
        """The tokenizer whose ids the corpus holds."""
        return read_tokenizer(self.folder, self.index.tokenizer.eos_token)

    def train_split(self, seq_len: int) -> TokenSequences | MixedSequences:
        """The training sequences, of all sources of a mixture. Errors: see `split`."""
        if not self.parts:
            return self.split("train", seq_len)
        return MixedSequences(
            [part.corpus.split("train", seq_len) for part in self.parts],
            [part.corpus.name for part in self.parts],
            self._schedule(),
        )

    def held_out_split(
        self, name: Literal["validation", "test"], seq_len: int
    ) -> TokenSequences | InterleavedSequences:
        """Held-out sequences, of all sources of a mixture in their shares. Errors: see `split`."""
        if not self.parts:
            return self.split(name, seq_len)
        return InterleavedSequences(
            [part.corpus.split(name, seq_len) for part in self.parts], self._schedule()
        )

    def _schedule(self) -> Schedule:
        return Schedule(tuple(part.count for part in self.parts))

    def split(self, name: Literal["train", "validation", "test"], seq_len: int) -> TokenSequences:
        """The sequences of one split of a corpus that is no mixture.

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
            vocab_size=self.vocab_size,
            checksums=[shard.sha256 for shard in shards],
        )

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Checks that a model can embed every token.

        Raises:
            CorpusError: if the tokenizer has more tokens than the model.
        """
        check_vocabulary(self.vocab_size, model_vocab_size, f"the tokenizer of {self.folder}")


@dataclass(frozen=True)
class MixedPart:
    """A source of a mixture."""

    corpus: Corpus
    count: int
    """Its sequences in `PERIOD`."""


def open_corpus(
    config: DataConfig,
    *,
    ranks: Ranks | None = None,
    show_progress: bool = True,
    model_vocab_size: int | None = None,
) -> Corpus:
    """Opens the corpus of `config`, the same one on every rank; prepares it on first use.

    The main rank plans and prepares, then one rank of each machine that does not see its folder,
    while the others wait.

    Args:
        config: the section.
        ranks: None for this process alone. Its waits must not time out during a preparation.
        show_progress: whether a rank that prepares shows a progress bar on a terminal.
        model_vocab_size: the largest vocabulary that the tokenizer may have; by default any.
            Checked before a preparation too, which can take hours.

    Raises:
        CorpusError: on every rank, if the corpus of one cannot be prepared or read, is damaged, or
            is not the main rank's, or the tokenizer has more tokens than the model.
    """
    if config.sources:
        corpus = _open_mixture(config, ranks, show_progress, model_vocab_size)
    else:
        corpus = _open_together(config, ranks, show_progress, model_vocab_size)
    if model_vocab_size is not None:
        corpus.check_vocabulary(model_vocab_size)
    return corpus


def _open_mixture(
    config: DataConfig, ranks: Ranks | None, show_progress: bool, model_vocab_size: int | None
) -> Corpus:
    schedule_of([source.weight for source in config.sources])  # checks the weights first
    corpora: list[Corpus] = []
    for number in range(len(config.sources)):
        source = config.source_config(number, mixture_tokenizer(config, corpora))
        corpora.append(_open_together(source, ranks, show_progress, model_vocab_size))
    return mix(config, corpora)


def mixture_tokenizer(config: DataConfig, earlier: Sequence[Corpus]) -> str:
    """Returns the key `tokenizer` of the next source of a mixture, after the `earlier` ones."""
    if earlier and config.tokenizer == TRAINED_TOKENIZER:
        return str(earlier[0].folder)
    return config.tokenizer


def mix(config: DataConfig, corpora: Sequence[Corpus]) -> Corpus:
    """Returns the mixture of the prepared sources of `config`, in its order.

    Raises:
        ConfigError: if a weight would be rounded to nothing.
        CorpusError: if two sources hold the same tokens.
    """
    for number, corpus in enumerate(corpora):
        for other, earlier in enumerate(corpora[:number]):
            if earlier.fingerprint == corpus.fingerprint:
                raise CorpusError(
                    f"[data] sources[{number}]: holds the same tokens as sources[{other}]; leave "
                    "it out, and add its weight to the other"
                )
    schedule = schedule_of([source.weight for source in config.sources])
    parts = tuple(map(MixedPart, corpora, schedule.counts))
    return Corpus(corpora[0].folder, corpora[0].index, None, parts)


def _open_together(
    config: DataConfig, ranks: Ranks | None, show_progress: bool, model_vocab_size: int | None
) -> Corpus:
    if ranks is None:
        return _open(config, show_progress, model_vocab_size)
    corpus: Corpus | None = None
    decision: _Decision | None = None

    def open_if(is_own_turn: bool) -> _Decision | None:
        nonlocal corpus
        if not is_own_turn:
            return None
        if decision is None:
            corpus = _open(config, show_progress, model_vocab_size)
        else:
            corpus = _open_decided(config, decision, ranks.is_node_main, show_progress)
        return _Decision(corpus.fingerprint, corpus.fallback_for)

    decision = ranks.together(lambda: open_if(ranks.is_main))[0]
    ranks.together(lambda: open_if(ranks.is_node_main and not ranks.is_main))
    ranks.together(lambda: open_if(corpus is None))
    assert corpus is not None
    return corpus


def open_prepared(folder: Path, fallback_for: str | None = None) -> Corpus:
    """Opens the prepared corpus in a folder.

    Raises:
        CorpusError: if a file is missing or damaged.
    """
    index = read_index(folder)
    check_sizes(folder, index)
    item_bytes = 2 if index.dtype == "uint16" else 4
    if sum(index.num_tokens(split) for split in index.splits) * item_bytes <= VERIFIED_BYTES:
        verify_files(folder, index)
    else:
        verify_changed_files(folder, index)
    return Corpus(folder, index, fallback_for)


def _open(config: DataConfig, show_progress: bool, model_vocab_size: int | None) -> Corpus:
    plan = plan_corpus(config)
    if plan.fallback_for is not None:
        logger.warning(
            "REQUESTED CORPUS UNAVAILABLE, FALLING BACK: training on %s instead of %s",
            plan.source.description,
            plan.fallback_for,
        )
    prepare_planned_corpus(plan, show_progress=show_progress, model_vocab_size=model_vocab_size)
    return open_prepared(plan.folder, plan.fallback_for)


def _open_decided(
    config: DataConfig, decision: _Decision, is_node_main: bool, show_progress: bool
) -> Corpus:
    """Opens the main rank's corpus, or this machine's own copy of it.

    The first rank of a machine verifies it, since it may be on a disk that only this machine sees.
    """
    fallback_for = decision.fallback_for
    plan = plan_corpus(config if fallback_for is None else config.fallback_config())
    if not plan.is_prepared:
        logger.warning(
            "preparing the corpus again in %s: this machine does not see the main rank's folder; "
            "[data] cache_dir on a shared disk is prepared once",
            plan.folder,
        )
        prepare_planned_corpus(plan, show_progress=show_progress)
    index = open_prepared(plan.folder).index if is_node_main else read_index(plan.folder)
    if index.fingerprint != decision.fingerprint:
        raise CorpusError(
            f"{plan.folder}: this rank's corpus has fingerprint {index.fingerprint}, the main "
            f"rank's {decision.fingerprint}; put [data] cache_dir on a disk that all nodes "
            "share, or copy the main rank's folder"
        )
    return Corpus(plan.folder, index, fallback_for)
