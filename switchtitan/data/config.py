"""The section `[data]`: which corpus, which tokenizer, how long the sequences, where prepared corpora lie."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from switchtitan.config.section import Section
from switchtitan.data.sources import DATASETS

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]

TRAINED_TOKENIZER = "train"
"""The value of `tokenizer` that asks for one trained on the corpus."""
DEFAULT_TRAINED_VOCAB_SIZE = 4096
DEFAULT_VALIDATION_FRACTION = 0.02


class DataConfig(Section):
    """What to train on. A corpus is tokenised once into `cache_dir` and memory-mapped from there."""

    dataset: DatasetName = "pystdlib"
    """The corpus. "pystdlib": the running interpreter's standard library, about 30 MB that every machine has;
    "c4": English C4 from the Hugging Face hub, streamed; "text", "jsonl", "json.gz", "parquet": the files
    of that kind under `path`."""
    path: Path | None = None
    """A file or a folder (read recursively, in the order of names) for "text", "jsonl", "json.gz" and
    "parquet"; for "c4" a local copy of the hub's files (`en/c4-train.*.json.gz`,
    `en/c4-validation.*.json.gz`)."""
    text_column: str | None = None
    """The column or key that holds a document's text in "jsonl", "json.gz" and "parquet"; "text" unless
    set."""
    tokenizer: str = TRAINED_TOKENIZER
    """A `tokenizer.json` or a folder with one, a name on the Hugging Face hub (e.g. "t5-base"), or "train": a
    byte-level BPE trained on the corpus."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Tokens in the vocabulary of a tokenizer that is trained here, 257 or more (256 bytes and the end of
    document); 4096 unless set. Must not exceed the model's."""
    seq_len: int = Field(default=512, ge=2)
    """Tokens in one training sequence."""
    cache_dir: Path = Path("corpora")
    """The folder in which prepared corpora lie, one subfolder for each corpus, tokenizer and cap."""
    validation_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The share of documents held out for validation, above 0 and at most 0.5; 0.02 unless set. "c4" has its
    own validation split."""
    test_fraction: float | None = Field(default=None, gt=0.0, le=0.5)
    """The share of documents held out a second time, above 0 and at most 0.5: the test split, for a report on text that
    chose nothing (`[evaluation] test_tokens`). No test split unless set. "c4" has none."""
    max_documents: int | None = Field(default=None, ge=1)
    """Documents to prepare at most (of each split, where the corpus has its own); all of them unless set."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Bytes of UTF-8 text to prepare at most (of each split, where the corpus has its own; the document that
    crosses the cap is the last); all of them unless set."""
    num_workers: int = Field(default=1, ge=0)
    """Processes per rank that read batches ahead of the training step; 0 reads in the training process."""
    offline_dataset: Literal["pystdlib"] | None = None
    """The corpus to train on, with a tokenizer trained on it, when something that is needed from the Hugging
    Face hub cannot be reached; an error unless set."""

    @property
    def tokenizer_path(self) -> Path | None:
        """The local tokenizer that `tokenizer` names; None where it is trained or comes from the hub."""
        if self.tokenizer == TRAINED_TOKENIZER:
            return None
        path = Path(self.tokenizer).expanduser()
        looks_local = self.tokenizer.startswith((".", "/", "~")) or path.suffix == ".json"
        return path if looks_local or path.exists() else None

    @property
    def hub_tokenizer(self) -> str | None:
        """The name of the tokenizer on the hub; None where it is local or trained."""
        is_local = self.tokenizer == TRAINED_TOKENIZER or self.tokenizer_path is not None
        return None if is_local else self.tokenizer

    @property
    def needs_hub(self) -> bool:
        """Whether something must be fetched from the hub before this corpus can be prepared."""
        return self.needs_hub_dataset or self.hub_tokenizer is not None

    @property
    def needs_hub_dataset(self) -> bool:
        """Whether the dataset itself comes from the hub."""
        return DATASETS[self.dataset].comes_from_hub and self.path is None

    def offline_stand_in(self) -> "DataConfig":
        """The configuration that takes this one's place when the hub cannot be reached."""
        assert self.offline_dataset is not None
        return self.model_copy(
            update={
                "dataset": self.offline_dataset,
                "path": None,
                "text_column": None,
                "tokenizer": TRAINED_TOKENIZER,
                "offline_dataset": None,
            }
        )

    @model_validator(mode="after")
    def _each_setting_has_an_effect(self) -> "DataConfig":
        mistakes = []
        row = DATASETS[self.dataset]
        if row.path == "required" and self.path is None:
            mistakes.append(f'dataset = "{self.dataset}" needs path: the file or folder to read')
        if row.path == "unused" and self.path is not None:
            mistakes.append(
                f'path = "{self.path}" has no effect with dataset = "{self.dataset}"; leave it out or set dataset '
                f'= "text"'
            )
        if self.text_column is not None and not row.has_text_column:
            with_columns = ", ".join(
                f'"{name}"' for name, row in DATASETS.items() if row.has_text_column
            )
            mistakes.append(
                f'text_column = "{self.text_column}" has an effect with dataset = {with_columns} '
                f"only; leave it out"
            )
        if (
            row.has_own_splits
            and self.validation_fraction is not None
            and self.offline_dataset is None
        ):
            mistakes.append(
                f'validation_fraction has no effect with dataset = "{self.dataset}", which has its own split; leave it out'
            )
        if row.has_own_splits and self.test_fraction is not None and self.offline_dataset is None:
            mistakes.append(
                f'test_fraction has no effect with dataset = "{self.dataset}", which has its own splits; leave it out'
            )
        if (
            self.vocab_size is not None
            and self.tokenizer != TRAINED_TOKENIZER
            and self.offline_dataset is None
        ):
            mistakes.append(
                f'vocab_size = {self.vocab_size} has an effect with tokenizer = "{TRAINED_TOKENIZER}" only; '
                "leave it out, or give --data.vocab_size none"
            )
        if self.offline_dataset is not None and not self.needs_hub:
            mistakes.append(
                f'offline_dataset = "{self.offline_dataset}" has no effect: nothing here comes from the hub; '
                f"leave it out"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self
