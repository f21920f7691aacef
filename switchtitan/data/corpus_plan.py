"""Choose the corpus that a configuration means on this machine, and its folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from switchtitan.data.config import (
    DEFAULT_TRAINED_VOCAB_SIZE,
    DEFAULT_VALIDATION_FRACTION,
    TRAINED_TOKENIZER,
    DataConfig,
)
from switchtitan.data.corpus_files import FORMAT_VERSION
from switchtitan.data.held_out import period_of
from switchtitan.data.sources import DATASETS, Source, SourceKeys
from switchtitan.data.tokenizer import is_cached, read_tokenizer
from switchtitan.errors import CorpusError

_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus to prepare and its folder, planned without reading a document."""

    config: DataConfig
    source: Source
    identity: dict[str, object]
    folder: Path
    fallback_for: str | None = None
    """The requested corpus and why it was unavailable; None if this is the requested corpus."""

    @property
    def max_documents(self) -> int | None:
        """Maximum number of documents per stream."""
        return self.config.max_documents or DATASETS[self.config.dataset].max_documents

    @property
    def is_prepared(self) -> bool:
        """Whether the folder exists; it gets its name only when it is complete."""
        return self.folder.is_dir()


def plan_corpus(config: DataConfig) -> CorpusPlan:
    """Plans the corpus that `config` names, or the offline one if the hub cannot be reached.

    A corpus that is already prepared is used without contacting the hub.

    Raises:
        CorpusError: if a file is missing, or the hub is needed and cannot be reached and there is
            no fallback.
    """
    assert not config.sources, "each source of a mixture is a corpus"
    plan = plan_from_name(config)
    needs_hub = config.needs_hub_dataset or (
        config.hub_tokenizer is not None and not is_cached(config.hub_tokenizer)
    )
    if plan.is_prepared or not needs_hub or (reason := hub_error()) is None:
        return plan
    path = f"path = {str(config.path)!r}, " if config.path is not None else ""
    wanted = f"dataset = {config.dataset!r}, {path}tokenizer = {config.tokenizer!r}"
    if config.offline_dataset is None:
        raise CorpusError(
            f"[data] {wanted}: the Hugging Face hub cannot be reached ({reason}); check the "
            "connection, prepare the corpus on a connected machine (switchtitan prepare) and copy "
            f"{plan.folder}, set a local path, or set offline_dataset = 'pystdlib'"
        )
    fallback_for = f"{wanted}: the hub cannot be reached ({reason})"
    return plan_from_name(config.fallback_config(), fallback_for)


def plan_from_name(config: DataConfig, fallback_for: str | None = None) -> CorpusPlan:
    """Plans the corpus that `config` names, without checking whether the hub can be reached.

    Raises:
        CorpusError: if a file is missing.
    """
    row = DATASETS[config.dataset]
    source = row.open(source_keys(config))
    if source.holds_tokens and config.tokenizer == TRAINED_TOKENIZER:
        raise CorpusError(
            f"[data] tokenizer = 'train': {source.description} holds token ids; set tokenizer to "
            "the one that made them: a tokenizer.json, a folder with one, or a name on the hub"
        )
    if source.holds_tokens and config.max_bytes is not None:
        raise CorpusError(
            f"[data] max_bytes = {config.max_bytes} has no effect: {source.description} holds "
            "token ids; leave it out, or set max_documents"
        )
    # A hub dataset's splits are known only when the hub has been asked.
    is_split_here = not row.has_own_splits if row.comes_from_hub else not source.splits
    fraction, test_fraction = validation_fraction(config), config.test_fraction
    identity: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "source": dict(source.identity),
        "tokenizer": _tokenizer_identity(config),
        "validation_fraction": fraction if is_split_here else None,
        "max_documents": config.max_documents or row.max_documents,
        "max_bytes": config.max_bytes,
    }
    # Keys that are newer than the first corpora are there only if they are set.
    if test_fraction is not None and is_split_here:
        identity["test_fraction"] = test_fraction
    if (
        is_split_here
        and not period_of(fraction).denominator == period_of(test_fraction or 1.0).denominator == 1
    ):
        # Earlier versions rounded 1 / fraction: their corpora hold out another share.
        identity["held_out"] = "the fractions as given"
    if config.max_document_share is not None and is_split_here:
        identity["max_document_share"] = config.max_document_share
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = config.cache_dir.expanduser() / f"{config.dataset}-{digest}"
    return CorpusPlan(config, source, identity, folder, fallback_for)


def source_keys(config: DataConfig) -> SourceKeys:
    path = config.path.expanduser() if config.path else None
    return SourceKeys(path, config.text_column, config.hub_config, config.hub_split)


def validation_fraction(config: DataConfig) -> float:
    """The fraction of documents held out if the corpus does not have its own splits."""
    return config.validation_fraction or DEFAULT_VALIDATION_FRACTION


def _tokenizer_identity(config: DataConfig) -> str:
    if config.tokenizer == TRAINED_TOKENIZER:
        vocab_size = config.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE
        return f"byte-level BPE of {vocab_size} trained on the corpus"
    if config.tokenizer_path is not None:
        tokenizer = read_tokenizer(config.tokenizer_path)
        return f"sha256 {tokenizer.sha256}, documents end with {tokenizer.eos_token}"
    return f"hub {config.tokenizer}"


def hub_error() -> str | None:
    """Returns why the hub cannot be reached, or None if it answers one request with any status.

    Its clients would retry an unreachable host for 25 seconds or more per file and log each retry.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_TIMEOUT_S)
    except Exception as error:  # the errors of the client's transport
        return f"{constants.ENDPOINT}: {error}"
    return None
