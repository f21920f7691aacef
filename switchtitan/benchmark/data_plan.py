"""The corpus that a run would train on, found without preparing it or reading its tokens."""

from dataclasses import dataclass
from pathlib import Path

from switchtitan.data import Corpus, DataConfig
from switchtitan.data.config import TRAINED_TOKENIZER
from switchtitan.data.corpus import mix, mixture_tokenizer
from switchtitan.data.corpus_files import check_sizes, read_index
from switchtitan.data.corpus_plan import plan_corpus
from switchtitan.data.mixture import PERIOD, schedule_of


@dataclass(frozen=True)
class SourcePlan:
    """A corpus, alone or as one source of a mixture."""

    description: str
    fallback_for: str | None
    folder: Path | None
    """None if it follows from the tokenizer of a mixture's first source, not yet trained."""
    corpus: Corpus | None
    """None if it is not prepared."""
    share: float | None
    """Of a mixture's training sequences; None for a corpus alone."""


@dataclass(frozen=True)
class DataPlan:
    """What a run would train on."""

    sources: tuple[SourcePlan, ...]
    corpus: Corpus | None
    """The corpus or the mixture. None if any of its sources is not prepared."""

    def epochs(self, num_tokens: int) -> list[float] | None:
        """Returns the passes over the training split of each source in `num_tokens` tokens; None
        if they are not prepared."""
        if self.corpus is None:
            return None
        return [
            num_tokens * (source.share or 1.0) / corpus.index.num_tokens("train")
            for source, corpus in zip(self.sources, self.corpus.sources, strict=True)
        ]


def plan_data(config: DataConfig, model_vocab_size: int) -> DataPlan:
    """Opens what is prepared, without comparing checksums, which may write a file.

    Raises:
        UserError: as training would.
    """
    if not config.sources:
        plan = _plan_source(config, None)
        _check_vocabulary(plan.corpus, model_vocab_size)
        return DataPlan((plan,), plan.corpus)
    shares = [count / PERIOD for count in schedule_of([s.weight for s in config.sources]).counts]
    plans: list[SourcePlan] = []
    for number, share in enumerate(shares):
        prepared = [plan.corpus for plan in plans if plan.corpus is not None]
        is_tokenizer_known = (
            number == 0 or config.tokenizer != TRAINED_TOKENIZER or plans[0].corpus is not None
        )
        if is_tokenizer_known:
            source = config.source_config(number, mixture_tokenizer(config, prepared))
            plans.append(_plan_source(source, share))
            _check_vocabulary(plans[-1].corpus, model_vocab_size)
        else:
            source = config.source_config(number, TRAINED_TOKENIZER)
            planned = plan_corpus(source)
            description = planned.source.description
            plans.append(SourcePlan(description, planned.fallback_for, None, None, share))
    corpora = [plan.corpus for plan in plans if plan.corpus is not None]
    corpus = mix(config, corpora) if len(corpora) == len(plans) else None
    return DataPlan(tuple(plans), corpus)


def _plan_source(config: DataConfig, share: float | None) -> SourcePlan:
    plan = plan_corpus(config)
    corpus = None
    if plan.is_prepared:
        index = read_index(plan.folder)
        check_sizes(plan.folder, index)
        corpus = Corpus(plan.folder, index, plan.fallback_for)
    return SourcePlan(plan.source.description, plan.fallback_for, plan.folder, corpus, share)


def _check_vocabulary(corpus: Corpus | None, model_vocab_size: int) -> None:
    if corpus is not None:
        corpus.check_vocabulary(model_vocab_size)
