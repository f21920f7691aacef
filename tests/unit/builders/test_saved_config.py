"""Configurations in checkpoints of earlier versions keep their meaning."""

from types import SimpleNamespace
from typing import cast

import pytest
from support.smallest import SMALLEST

from switchtitan.builders.saved_config import saved_config
from switchtitan.checkpoint import CheckpointMetadata

SAVED = (
    SMALLEST.format(folder="outputs/a")
    + """
[data]
dataset = "pystdlib"
"""
)


@pytest.mark.parametrize(
    ("line", "expected"), [("", None), ("max_document_share = 0.02", 0.02)], ids=["older", "newer"]
)
def test_a_run_without_the_key_had_documents_that_were_not_cut(
    line: str, expected: float | None
) -> None:
    metadata = cast(CheckpointMetadata, SimpleNamespace(config=SAVED + line))
    assert saved_config(metadata).data.max_document_share == expected
