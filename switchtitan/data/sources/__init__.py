"""Sources of documents."""

from switchtitan.data.sources.c4 import c4_source
from switchtitan.data.sources.dataset import (
    BadRecord,
    Dataset,
    DocumentStream,
    Position,
    Source,
)
from switchtitan.data.sources.files import (
    gzipped_json_source,
    jsonl_source,
    parquet_source,
    text_source,
)
from switchtitan.data.sources.pystdlib import pystdlib_source

DATASETS = {
    "pystdlib": Dataset(pystdlib_source),
    "c4": Dataset(c4_source, path="optional", has_own_splits=True, comes_from_hub=True),
    "text": Dataset(text_source, path="required", can_skip_records=True),
    "jsonl": Dataset(jsonl_source, path="required", has_text_column=True, can_skip_records=True),
    "json.gz": Dataset(
        gzipped_json_source, path="required", has_text_column=True, can_skip_records=True
    ),
    "parquet": Dataset(
        parquet_source, path="required", has_text_column=True, can_skip_records=True
    ),
}
"""The datasets by `[data] dataset`."""

__all__ = ["DATASETS", "BadRecord", "Dataset", "DocumentStream", "Position", "Source"]
