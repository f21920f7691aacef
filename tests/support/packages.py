"""Optional packages."""

import importlib.util

import pytest

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
needs_fira = pytest.mark.skipif(
    importlib.util.find_spec("fira") is None, reason="fira is not installed"
)
