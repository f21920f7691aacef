"""Opens a trained model: its configuration, architecture, dense weights and tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from switchtitan.checkpoint.save import CheckpointMetadata
from switchtitan.config import flatten, parse_toml, raise_together
from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.data.corpus import Corpus
from switchtitan.data.recorded import find_recorded, recorded_sources
from switchtitan.data.tokenizer import DocumentTokenizer, read_tokenizer
from switchtitan.distributed.world import device_type
from switchtitan.errors import CheckpointError, ConfigError, CorpusError
from switchtitan.hub.huggingface import CONFIG_NAME, ReadWeight, read_config
from switchtitan.hub.initial_weights import find_weights, open_weights
from switchtitan.hub.peft_folder import folders_of
from switchtitan.job.checks import check_device, check_held_out
from switchtitan.job.config import JobConfig
from switchtitan.models import plain_model


@dataclass(frozen=True)
class TrainedModel:
    """A model and where it comes from."""

    source: Path
    """The checkpoint, or the file or folder of weights."""
    config: ModelConfig
    read: ReadWeight
    """Reads the plain model's weights."""
    metadata: CheckpointMetadata | None
    """Of the checkpoint; None for other weights."""

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence that it was made for; None if that is not known."""
        if self.metadata is not None:
            return self.metadata.identity_value("data", "seq_len", int)
        given = _read_beside(self.source, CONFIG_NAME).get("max_position_embeddings")
        return given if isinstance(given, int) and given > 0 else None

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"] | None:
        """The dtype in which the run computed; None for other weights."""
        if self.metadata is None:
            return None
        saved = self.metadata.train_state.get("compute_dtype")
        return "float32" if saved == "float32" else "bfloat16"

    def load(self, device: torch.device, dtype: torch.dtype) -> LanguageModel:
        """Returns the plain model, unsharded, for passes without gradients."""
        model = plain_model(self.config)
        # One at a time, so that memory does not hold the model in both dtypes.
        weights = {name: self.read(name).to(device, dtype) for name, _ in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()


def open_trained_model(path: Path, config: ModelConfig | None = None) -> TrainedModel:
    """Opens a run's newest checkpoint, a given checkpoint, or other weights: a folder in Hugging
    Face's layout, a LoRA adapter's folder or a safetensors file. `config`, the plain model's
    section, is by default the checkpoint's, or the one that a `config.json` describes. Raises a
    CheckpointError if the weights cannot be read or do not match the model, a ConfigError if the
    `config.json` describes no model that is supported."""
    source = find_weights(path)
    weights = open_weights(source, config)
    metadata = weights.metadata if config is None else None
    return TrainedModel(source, weights.config, weights.read, metadata)


def for_evaluation(config: JobConfig) -> JobConfig:
    """Returns a configuration with kernels that this machine has. Raises a ConfigError if its model
    cannot be evaluated here on its data."""
    config = config.model_copy(update={"model": config.model.on_any_machine()})
    raise_together([*check_device(config, device_type()), *check_held_out(config)])
    return config


def open_tokenizer(trained: TrainedModel, given: Path | None = None) -> DocumentTokenizer:
    """Returns a trained model's tokenizer: of a `tokenizer.json`, or a folder with one, that is
    given; by default that of the run's corpus, or the one next to the weights, or next to those of
    an adapter's base. Raises a CorpusError if there is none, or it cannot be read."""
    tokenizer = find_tokenizer(trained, given)
    if tokenizer is None:
        where = " or ".join(map(str, folders_of(trained.source)))
        raise CorpusError(
            f"no tokenizer of {trained.source}: there is none in {where}; pass --tokenizer FILE, a "
            "tokenizer.json or a folder with one, such as a prepared corpus"
        )
    return tokenizer


def find_tokenizer(trained: TrainedModel, given: Path | None = None) -> DocumentTokenizer | None:
    """Like `open_tokenizer`, but None if there is none next to weights. Raises a CorpusError if the
    tokenizer or the run's corpus cannot be read."""
    metadata = trained.metadata
    if given is not None:
        tokenizer = read_tokenizer(given)
        has_bos = metadata is None or recorded_sources(metadata.run, trained.source)[0].bos
        return tokenizer if has_bos else tokenizer.without_bos()
    if metadata is not None:
        return corpus_of_run(metadata, trained.source).tokenizer()
    found = _find_beside(trained.source, "tokenizer.json")
    return None if found is None else read_tokenizer(found.parent)


def corpus_of_run(metadata: CheckpointMetadata, checkpoint: Path) -> Corpus:
    """Finds the corpus that the run of a checkpoint has recorded; see `find_recorded`."""
    config = flatten(parse_toml(metadata.config, "the saved configuration"))
    cache_dir = config.get("data.cache_dir")
    if not isinstance(cache_dir, str) or "\0" in cache_dir:
        raise CheckpointError(f"the checkpoint has data.cache_dir = {cache_dir!r}")
    return find_recorded(metadata.run, Path(cache_dir), checkpoint)


def stop_tokens(trained: TrainedModel, tokenizer: DocumentTokenizer) -> frozenset[int]:
    """Returns the tokens that end a text: those that transformers stops at, or the tokenizer's."""
    for name in ("generation_config.json", CONFIG_NAME) if trained.metadata is None else ():
        given = _read_beside(trained.source, name).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        if ids and all(isinstance(token, int) for token in ids):
            return frozenset(ids)
    return frozenset([tokenizer.eos_id])


def check_tokens(trained: TrainedModel, tokens: list[int]) -> None:
    """Checks that a model can embed all tokens of a text. Raises a ConfigError if the tokenizer is
    another model's."""
    largest = max(tokens, default=0)
    if largest >= trained.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {largest}, and {trained.source} has a vocabulary of "
            f"{trained.config.vocab_size}; pass --tokenizer FILE, the one it was trained with"
        )


def _find_beside(source: Path, name: str) -> Path | None:
    files = (folder / name for folder in folders_of(source))
    return next((file for file in files if file.is_file()), None)


def _read_beside(source: Path, name: str) -> dict[str, Any]:
    """Returns a file of JSON next to weights; empty if there is none."""
    file = _find_beside(source, name)
    return {} if file is None else read_config(file)
