"""Choose the corpus that a configuration means on this machine, and its folder."""

import hashlib
import json
import os
import ssl
import urllib.error
import urllib.request
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


@dataclass(frozen=True)
class CorpusPlan:
    """The corpus to prepare and its folder, planned without reading a document."""

    config: DataConfig
    source: Source
    identity: dict[str, object]
    folder: Path
    fallback_for: str | None
    """The requested corpus and why it was unavailable; None if this is the requested corpus."""

    @property
    def max_documents(self) -> int | None:
        """Maximum number of documents per stream."""
        return self.config.max_documents or DATASETS[self.config.dataset].max_documents

    @property
    def max_document_share(self) -> float | None:
        """The largest share of a held-out split that one document may have; None: any.

        A source's own splits stay as they are published."""
        return None if self.source.splits else self.config.max_document_share

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
    if plan.is_prepared or not needs_hub:
        return plan
    reason = hub_error()
    if reason is None:
        return plan
    path = f"path = {str(config.path)!r}, " if config.path is not None else ""
    wanted = f"dataset = {config.dataset!r}, {path}tokenizer = {config.tokenizer!r}"
    if config.offline_dataset is None:
        raise CorpusError(
            f"[data] {wanted}: the Hugging Face hub cannot be reached ({reason}); check the "
            "connection, prepare the corpus on a connected machine (switchtitan prepare) and copy "
            f"{plan.folder}, set a local path, or set offline_dataset = 'pystdlib'"
        )
    return plan_from_name(
        config.fallback_config(), fallback_for=f"{wanted}: the hub cannot be reached ({reason})"
    )


def plan_from_name(config: DataConfig, fallback_for: str | None = None) -> CorpusPlan:
    """Plans the corpus that `config` names, without checking whether the hub can be reached.

    Raises:
        CorpusError: if a file is missing.
    """
    row = DATASETS[config.dataset]
    path = config.path.expanduser() if config.path else None
    source = row.open(SourceKeys(path, config.text_column, config.hub_config, config.hub_split))
    if source.holds_tokens:
        _check_for_tokens(config, source)
    # A hub dataset's splits are known only when the hub has been asked.
    is_split_here = not row.has_own_splits if row.comes_from_hub else not source.splits
    identity: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "source": dict(source.identity),
        "tokenizer": _tokenizer_identity(config),
        "validation_fraction": validation_fraction(config) if is_split_here else None,
        "max_documents": config.max_documents or row.max_documents,
        "max_bytes": config.max_bytes,
    }
    if config.test_fraction is not None and is_split_here:
        # Only if set, so that corpora without a test split keep their folder names.
        identity["test_fraction"] = config.test_fraction
    if is_split_here and not _has_whole_periods(config):
        # Earlier versions rounded 1 / fraction: their corpora hold out another share.
        identity["held_out"] = "the fractions as given"
    if config.max_document_share is not None and is_split_here:
        # Earlier versions did not cut documents: without the key, their corpora are found.
        identity["max_document_share"] = config.max_document_share
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = config.cache_dir.expanduser() / f"{config.dataset}-{digest}"
    return CorpusPlan(config, source, identity, folder, fallback_for)


def _check_for_tokens(config: DataConfig, source: Source) -> None:
    if config.tokenizer == TRAINED_TOKENIZER:
        raise CorpusError(
            f"[data] tokenizer = 'train': {source.description} holds token ids; set tokenizer to "
            "the one that made them: a tokenizer.json, a folder with one, or a name on the hub"
        )
    if config.max_bytes is not None:
        raise CorpusError(
            f"[data] max_bytes = {config.max_bytes} has no effect: {source.description} holds "
            "token ids; leave it out, or set max_documents"
        )


def validation_fraction(config: DataConfig) -> float:
    """The fraction of documents held out if the corpus does not have its own splits."""
    return config.validation_fraction or DEFAULT_VALIDATION_FRACTION


def _has_whole_periods(config: DataConfig) -> bool:
    fractions = (validation_fraction(config), config.test_fraction)
    return all(period_of(given).denominator == 1 for given in fractions if given is not None)


def _tokenizer_identity(config: DataConfig) -> str:
    if config.tokenizer == TRAINED_TOKENIZER:
        vocab_size = config.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE
        return f"byte-level BPE of {vocab_size} trained on the corpus"
    if config.tokenizer_path is not None:
        tokenizer = read_tokenizer(config.tokenizer_path)
        return f"sha256 {tokenizer.sha256}, documents end with {tokenizer.eos_token}"
    return f"hub {config.tokenizer}"


PROBE_TIMEOUT_S = 10.0


def hub_error() -> str | None:
    """Returns why the hub cannot be reached, or None if it answers one request.

    The hub's clients retry an unreachable host for 25 seconds or more per file and log each retry.
    Like them, this obeys `HF_HUB_OFFLINE`, `HF_ENDPOINT` and the usual proxy variables."""
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{switch} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None  # It answered; the client finds out whether the file is available.
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return None  # The clients may know other certificates.
        return f"{endpoint}: {error.reason}"
    except (OSError, ValueError) as error:
        return f"{endpoint}: {error}"
