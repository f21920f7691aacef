"""Corpora: from a source's documents to the batches of a training step."""

from switchtitan.data.config import DataConfig
from switchtitan.data.corpus import Corpus, open_prepared, plan_corpus
from switchtitan.data.loader import ValidationBatches, build_train_batches
from switchtitan.data.prepare import open_corpus
from switchtitan.data.sources import DATASETS

__all__ = [
    "DATASETS",
    "Corpus",
    "DataConfig",
    "ValidationBatches",
    "build_train_batches",
    "open_corpus",
    "open_prepared",
    "plan_corpus",
]
