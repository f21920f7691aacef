"""Fault tests have a short form, and a long one for `./scripts/test.sh --faults`."""

import resource
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from support.fault_report import record

_ADDRESS_SPACE_BYTES = 4 << 30


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Records each test, with the time of its fixtures."""
    report = yield
    if not report.skipped:
        is_call = report.when == "call"
        record(
            "tests",
            file=item.path.stem,
            test=item.originalname,
            passed=int(report.passed and is_call),
            failed=int(report.failed),
            seconds=report.duration,
        )
    return report


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """This process may map 4 GiB more, so that memory taken for a size in a header is an error."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESS_SPACE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
