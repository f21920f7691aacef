"""Fault tests have a short form, and a long one for `./scripts/test.sh --faults`."""

import resource
from pathlib import Path

import pytest

_ADDRESS_SPACE_BYTES = 4 << 30


@pytest.fixture
def bounded_memory():
    """This process may map 4 GiB more, so that memory taken for a size in a header is an error."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESS_SPACE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
