"""Fixtures for all tests, and the order in which test files run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Workers take files in this order, so that none of them is left with a long file at the end.
_LONG_FIRST = ("end_to_end", "distributed", "slow")


def pytest_configure(config: pytest.Config) -> None:
    # Tests of CPUs would otherwise train on a device, and ranks that gloo joins would share it.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            reason = "no CUDA device is visible; where there is one, run ./scripts/test.sh -m gpu"
            item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = [item for file in sorted(files.values(), key=_place) for item in file]


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Otherwise a GPU that torch cannot use would look like a GPU that passes.
    if session.config.option.markexpr == "gpu" and _only_skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.markexpr == "gpu" and _only_skipped(config):
        terminalreporter.write_line(
            "error: all GPU tests were skipped, so nothing was tested on a GPU; fix the reasons "
            "below, for example the driver, or a torch without CUDA",
            red=True,
        )


def _only_skipped(config: pytest.Config) -> bool:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    counts = {} if reporter is None else reporter.stats
    run = ("passed", "failed", "error", "xfailed", "xpassed")
    return bool(counts.get("skipped")) and not any(counts.get(outcome) for outcome in run)


def _place(items: list[pytest.Item]) -> int:
    names = {mark.name for item in items for mark in item.iter_markers()}
    return next(
        (place for place, name in enumerate(_LONG_FIRST) if name in names), len(_LONG_FIRST)
    )


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs share one prepared corpus: give tiny runs subfolders of it."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile starts without compiled code and counts, and leaves no compiled code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left_behind():
    """Destroy the process group that a module's tests have started."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
