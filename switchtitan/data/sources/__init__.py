"""Corpus sources: where documents come from."""

from collections.abc import Callable

from switchtitan.data.config import DataConfig
from switchtitan.data.sources.c4 import c4_source
from switchtitan.data.sources.files import gzipped_json_source, jsonl_source, parquet_source, text_source
from switchtitan.data.sources.pystdlib import pystdlib_source
from switchtitan.data.sources.stream import DocumentStream, Position, Source

DATASETS: dict[str, Callable[[DataConfig], Source]] = {
    "pystdlib": pystdlib_source,
    "c4": c4_source,
    "text": text_source,
    "jsonl": jsonl_source,
    "json.gz": gzipped_json_source,
    "parquet": parquet_source,
}
"""The corpus sources by `[data] dataset`."""

__all__ = ["DATASETS", "DocumentStream", "Position", "Source"]
