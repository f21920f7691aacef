"""Sources of documents."""

from switchtitan.data.sources.arrow import arrow_source
from switchtitan.data.sources.c4 import c4_source, published_c4_source
from switchtitan.data.sources.dataset import (
    BadRecord,
    Dataset,
    DocumentStream,
    HubDataset,
    Position,
    Source,
    SourceKeys,
)
from switchtitan.data.sources.english import english_source
from switchtitan.data.sources.files import (
    gzipped_json_source,
    jsonl_source,
    parquet_source,
    text_source,
)
from switchtitan.data.sources.hub import hub_source
from switchtitan.data.sources.megatron import megatron_source
from switchtitan.data.sources.nanogpt import nanogpt_source
from switchtitan.data.sources.pystdlib import pystdlib_source
from switchtitan.data.sources.tokenized import TokenDocument, TokenizedSource, TokenStream
from switchtitan.data.sources.zstd_files import zstd_json_source

DATASETS = {
    "pystdlib": Dataset(pystdlib_source),
    "english": Dataset(english_source),
    "c4": Dataset(c4_source, path="optional", has_own_splits=True, comes_from_hub=True),
    "c4_512": Dataset(
        published_c4_source,
        path="optional",
        has_own_splits=True,
        comes_from_hub=True,
        max_documents=46_000_000,
    ),
    "c4_256": Dataset(
        published_c4_source,
        path="optional",
        has_own_splits=True,
        comes_from_hub=True,
        max_documents=15_000_000,
    ),
    "hub": Dataset(
        hub_source,
        path="required",
        has_text_column=True,
        can_skip_records=True,
        comes_from_hub=True,
        has_hub_keys=True,
    ),
    "text": Dataset(text_source, path="required", can_skip_records=True),
    "jsonl": Dataset(jsonl_source, path="required", has_text_column=True, can_skip_records=True),
    "json.gz": Dataset(
        gzipped_json_source, path="required", has_text_column=True, can_skip_records=True
    ),
    "jsonl.zst": Dataset(
        zstd_json_source, path="required", has_text_column=True, can_skip_records=True
    ),
    "parquet": Dataset(
        parquet_source, path="required", has_text_column=True, can_skip_records=True
    ),
    "arrow": Dataset(arrow_source, path="required", has_text_column=True, can_skip_records=True),
    "nanogpt": Dataset(nanogpt_source, path="required", can_skip_records=True, holds_tokens=True),
    "megatron": Dataset(megatron_source, path="required", can_skip_records=True, holds_tokens=True),
}
"""The datasets by `[data] dataset`."""

__all__ = [
    "DATASETS",
    "BadRecord",
    "Dataset",
    "DocumentStream",
    "HubDataset",
    "Position",
    "Source",
    "SourceKeys",
    "TokenDocument",
    "TokenStream",
    "TokenizedSource",
]
