"""Which corpus a configuration means on this machine, and where it lies once prepared."""

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
from switchtitan.data.sources import DATASETS, Source
from switchtitan.data.tokenizer import is_cached, read_tokenizer
from switchtitan.errors import CorpusError


@dataclass(frozen=True)
class CorpusPlan:
    """What is to be prepared, and where; made without reading a document."""

    config: DataConfig
    source: Source
    identity: dict[str, object]
    folder: Path
    stands_in_for: str | None
    """Why this is the offline corpus and in place of what; None where it is the corpus asked for."""

    @property
    def is_prepared(self) -> bool:
        """Whether the folder is there, which it is only once it is complete."""
        return self.folder.is_dir()


def plan_corpus(config: DataConfig) -> CorpusPlan:
    """Decides which corpus `config` means here: the one it names, or the offline one if the hub is out of
    reach.

    What lies prepared is used without asking the hub.

    Raises:
        CorpusError: if a file is missing, or the hub is needed, cannot be reached and nothing stands in.
    """
    plan = plan_as_named(config)
    needs_hub = config.needs_hub_dataset or (
        config.hub_tokenizer is not None and not is_cached(config.hub_tokenizer)
    )
    if plan.is_prepared or not needs_hub:
        return plan
    reason = why_hub_is_unreachable()
    if reason is None:
        return plan
    wanted = f'dataset "{config.dataset}" with tokenizer "{config.tokenizer}"'
    if config.offline_dataset is None:
        raise CorpusError(
            f"[data] {wanted}: the Hugging Face hub cannot be reached ({reason}); check the connection, "
            f"prepare the corpus where there is one (switchtitan prepare) and copy {plan.folder}, "
            f'give a local path, or set offline_dataset = "pystdlib"'
        )
    return plan_as_named(
        config.offline_stand_in(), stands_in_for=f"{wanted}: the hub cannot be reached ({reason})"
    )


def plan_as_named(config: DataConfig, stands_in_for: str | None = None) -> CorpusPlan:
    """The corpus that `config` names, wherever its parts are.

    Raises:
        CorpusError: if a file is missing.
    """
    path = config.path.expanduser() if config.path else None
    source = DATASETS[config.dataset].open(path, config.text_column)
    identity: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "source": dict(source.identity()),
        "tokenizer": _tokenizer_identity(config),
        "validation_fraction": None if source.splits else validation_fraction(config),
        "max_documents": config.max_documents,
        "max_bytes": config.max_bytes,
    }
    if config.test_fraction is not None and not source.splits:
        # Only where it is set: corpora without a test split keep the names that they always had.
        identity["test_fraction"] = config.test_fraction
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = config.cache_dir.expanduser() / f"{config.dataset}-{digest}"
    return CorpusPlan(config, source, identity, folder, stands_in_for)


def validation_fraction(config: DataConfig) -> float:
    """The share of documents held out, where the corpus has no split of its own."""
    return config.validation_fraction or DEFAULT_VALIDATION_FRACTION


def _tokenizer_identity(config: DataConfig) -> str:
    if config.tokenizer == TRAINED_TOKENIZER:
        return f"byte-level BPE of {config.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE} trained on the corpus"
    if config.tokenizer_path is not None:
        tokenizer = read_tokenizer(config.tokenizer_path)
        return f"sha256 {tokenizer.sha256}, documents end with {tokenizer.eos_token}"
    return f"hub {config.tokenizer}"


PROBE_TIMEOUT_S = 10.0


def why_hub_is_unreachable() -> str | None:
    """Asks the hub for a sign of life: None if there is one, else the reason in a few words.

    The hub's own clients retry an unreachable host for 25 seconds and more per file, with a line each time;
    this asks once. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and the usual proxy variables count as they do for those
    clients.
    """
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{switch} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None  # It answered; whether it gives the file is for the client to find out.
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return None  # The clients may know other certificates.
        return f"{endpoint}: {error.reason}"
    except (OSError, ValueError) as error:
        return f"{endpoint}: {error}"
