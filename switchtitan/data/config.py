"""The `[data]` section: corpus, tokenizer, sequence length and the cache of prepared corpora."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from switchtitan.data.sources import DATASETS, HUB_KEYS
from switchtitan.data.tokenizer import read_tokenizer
from switchtitan.registry import Section, toml_value

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]

TRAINED_TOKENIZER = "train"
"""The value of `tokenizer` that trains one on the corpus."""


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~"))


class SourceConfig(Section):
    """The documents to read."""

    dataset: DatasetName = "pystdlib"
    """The corpus. "pystdlib": the standard library of the running interpreter, about 30 MB that
    every machine has; "english": 4 MB of English prose, after pip install '.[english]';
    "c4": English C4, streamed from the Hugging Face hub; "hub": the dataset `path` on the hub;
    "text", "jsonl" (also with .gz or .zst), "parquet": the files of that kind under `path`;
    "nanogpt": token files."""
    path: Path | None = None
    """A file or a folder, read recursively in the order of names. For "hub": "owner/name", or a
    folder with the same layout. For "c4": a local copy of the hub's files
    (`en/c4-train.*.json.gz`, `en/c4-validation.*.json.gz`)."""
    text_column: str | None = None
    """The column or key with a document's text, in datasets of records; default "text"."""
    hub_config: str | None = None
    """For "hub": the configuration of the dataset, such as "en"; default: its only one."""
    hub_split: str | None = None
    """For "hub": the split to read, of which documents are held out. Default: "train", with
    "validation" for validation if the dataset has it."""

    @property
    def folder(self) -> Path:
        """The expanded `path`."""
        return (self.path or Path()).expanduser()

    @property
    def column(self) -> str:
        return self.text_column or "text"

    @property
    def needs_hub_dataset(self) -> bool:
        """Whether the dataset itself comes from the hub."""
        is_local = self.path is not None and os.path.exists(self.folder)
        return DATASETS[self.dataset].comes_from_hub and not is_local

    def identity(self) -> dict[str, object]:
        """Returns the keys that determine the documents, wherever their files are."""
        keys = self.model_dump(mode="json", include={"dataset", "hub_config", "hub_split"})
        is_name = DATASETS[self.dataset].keys == HUB_KEYS and not _looks_local(str(self.path))
        return keys | {"text_column": self.column, "path": str(self.path) if is_name else None}

    @model_validator(mode="after")
    def _dataset_has_its_path(self) -> "SourceConfig":
        if DATASETS[self.dataset].needs_path and self.path is None:
            raise ValueError(f"dataset = {self.dataset!r} needs path: the file or folder to read")
        return self

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        unread = set(SourceConfig.model_fields) - {"dataset", *DATASETS[self.dataset].keys}
        return self._not_read(sorted(unread), f"with dataset = {self.dataset!r}")

    def _not_read(self, keys: Iterable[str], cause: str) -> list[str]:
        """Returns a message for each of the keys that is set."""
        return [
            f"{key} = {toml_value(getattr(self, key))} has no effect {cause}"
            for key in keys
            if not self.is_default(key)
        ]


class MixedSource(SourceConfig):
    """One source of a mixture, `[[data.sources]]`."""

    dataset: DatasetName
    """See `[data] dataset`."""
    weight: float = Field(gt=0.0, allow_inf_nan=False)
    """Its share of the training sequences, relative to the other weights; above 0."""


class DataConfig(SourceConfig):
    """The corpus to train on: tokenized once into `cache_dir`, then memory-mapped."""

    sources: tuple[MixedSource, ...] = ()
    """A mixture, as `[[data.sources]]` tables with the keys weight, dataset, path, text_column,
    hub_config and hub_split. The other keys of `[data]` are for all sources; `tokenizer = "train"`
    trains it on the first one. A source that ends starts again."""
    tokenizer: str = TRAINED_TOKENIZER
    """A `tokenizer.json` or a folder with one, a name on the Hugging Face hub (e.g. "t5-base"), or
    "train": a byte-level BPE trained on the corpus."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Vocabulary size of a tokenizer trained on the corpus, at least 257 (256 bytes and the end of
    document); default 4096. Must not exceed the model's."""
    bos: bool | None = None
    """Whether each document begins with the tokens that the tokenizer puts before a text, such as a
    BOS; prompts and exports then do, too. Default: as the tokenizer encodes a text (LLaMA's and
    Mistral's do, t5-base and trained ones do not). "nanogpt": what the files hold; default
    false."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in one training sequence."""
    cache_dir: Path = Path("corpora")
    """The folder of prepared corpora, with one subfolder for each corpus, tokenizer and limit."""
    validation_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The fraction of documents held out for validation, above 0 and at most 0.5; default 0.02.
    "c4" has its own validation split."""
    test_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The fraction of the other documents held out as a test split, above 0 and at most 0.5, for a
    final loss on text that no choice was based on (`[evaluation] test_tokens`). Default: no test
    split. "c4" has none."""
    max_documents: int | None = Field(default=None, ge=1)
    """Maximum number of documents to prepare, per split where the corpus has its own splits;
    default: all."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Maximum bytes of UTF-8 text, or of token ids, to prepare, per split where the corpus has its
    own splits; default: all. The document that crosses the limit is the last."""
    num_workers: int = Field(default=1, ge=0)
    """Processes per rank that prefetch batches; 0 reads in the training process."""
    offline_dataset: Literal["pystdlib"] | None = None
    """The corpus to fall back to, with a tokenizer trained on it, if the Hugging Face hub cannot be
    reached; default: an error. On a machine with GPUs, training falls back only if this key is
    given on the command line."""

    @property
    def trained_vocab_size(self) -> int:
        return self.vocab_size or 4096

    @property
    def held_out_fraction(self) -> float:
        """Of documents, for validation."""
        return self.validation_fraction or 0.02

    @property
    def tokenizer_origin(self) -> Literal["trained", "local", "hub"]:
        """Where the tokenizer comes from."""
        if self.tokenizer == TRAINED_TOKENIZER:
            return "trained"
        path = Path(self.tokenizer).expanduser()
        is_local = _looks_local(self.tokenizer) or path.suffix == ".json" or os.path.exists(path)
        return "local" if is_local else "hub"

    @property
    def tokenizer_identity(self) -> str:
        """What determines the tokenizer: its contents, its name on the hub, or its training."""
        if self.tokenizer_origin == "trained":
            return f"byte-level BPE of {self.trained_vocab_size} trained on the corpus"
        if self.tokenizer_origin == "hub":
            return f"hub {self.tokenizer}"
        found = read_tokenizer(Path(self.tokenizer))
        begins = f", begin with {found.bos_token}" if found.bos_ids else ""
        return f"sha256 {found.sha256}, documents end with {found.eos_token}{begins}"

    @property
    def needs_hub(self) -> bool:
        """Whether a preparation asks the hub for the dataset or the tokenizer."""
        from huggingface_hub import try_to_load_from_cache

        if self.needs_hub_dataset or self.tokenizer_origin != "hub":
            return self.needs_hub_dataset
        return not isinstance(try_to_load_from_cache(self.tokenizer, "tokenizer.json"), str)

    def identity(self) -> dict[str, object]:
        """Returns the keys that determine tokens and splits, wherever their files are."""
        keys = {"bos", "seq_len", "test_fraction", "max_documents", "max_bytes"}
        weighted = [source.identity() | {"weight": source.weight} for source in self.sources]
        return {
            **({"sources": weighted} if weighted else super().identity()),
            "tokenizer": self.tokenizer_identity,
            "validation_fraction": self.held_out_fraction,
            **self.model_dump(mode="json", include=keys),
        }

    def source_configs(self) -> "list[DataConfig]":
        """The configuration of each source of a mixture, or this one."""
        given = [source.model_dump(exclude={"weight"}) for source in self.sources]
        unused = {"sources": (), "offline_dataset": None}
        return [self.model_copy(update=keys | unused) for keys in given] or [self]

    def fallback_config(self) -> "DataConfig":
        """The configuration to use if the hub cannot be reached."""
        keys = {"dataset": self.offline_dataset, "tokenizer": TRAINED_TOKENIZER, "bos": None}
        return self.model_copy(update=keys)

    @model_validator(mode="after")
    def _token_ids_have_their_tokenizer(self) -> "DataConfig":
        for source in self.sources or (self,):
            if self.tokenizer == TRAINED_TOKENIZER and DATASETS[source.dataset].holds_tokens:
                raise ValueError(
                    f"dataset = {source.dataset!r} holds token ids and needs tokenizer: the "
                    "tokenizer.json, folder or name on the hub of the one that made them"
                )
        return self

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        if self.sources:
            void = self._not_read((*SourceConfig.model_fields, "offline_dataset"), "with sources")
            for number, source in enumerate(self.sources):
                void += [f"sources[{number}]: {message}" for message in source.without_effect()]
            return void
        void = super().without_effect()
        if self.offline_dataset is not None:
            # The other keys have an effect on the offline dataset.
            if not self.needs_hub_dataset and self.tokenizer_origin != "hub":
                void += self._not_read(["offline_dataset"], "since nothing comes from the hub")
            return void
        if DATASETS[self.dataset].has_own_splits:
            cause = f"with dataset = {self.dataset!r}, which has its own splits"
            void += self._not_read(("validation_fraction", "test_fraction"), cause)
        if self.tokenizer != TRAINED_TOKENIZER:
            void += self._not_read(["vocab_size"], f"with tokenizer = {self.tokenizer!r}")
        return void
