"""Fixtures for all tests. The folder of a test is its tier; CONTRIBUTING.md has a table."""

import os
import resource
from pathlib import Path

import pytest
import torch
from support.compiled import BACKEND, choose_backend

from switchtitan.distributed.world import stop_world

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
choose_backend()

TESTS = Path(__file__).parent
# Workers take files in this order, so that none of them is left with a long file at the end.
TIERS = (
    *("end_to_end", "faults", "ranks", "compiled_cuda", "fake_cuda", "compiled", "runs", "unit"),
    "gpu",
)


def tier(node):
    return node.path.relative_to(TESTS).parts[0]


def pytest_configure(config):
    # Tests of CPUs would otherwise train on a device, and ranks that gloo joins would share it.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: TIERS.index(tier(item)))
    # With `-m gpu` they run, and fail, where torch sees no GPU: skipped would look like passed.
    if config.option.markexpr != "gpu":
        skip = pytest.mark.skip(reason="needs a GPU; where there is one, run pytest -m gpu")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """A folder whose runs share one prepared corpus: give tiny runs subfolders of it."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def trained(corpora):
    """A trained run and its export, which tests of commands read."""
    from support.trained import train_and_export

    return train_and_export(corpora / "commands")


@pytest.fixture
def fresh_compiler():
    """torch.compile starts without compiled code and counts, and leaves no compiled code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


@pytest.fixture
def float64():
    """Tensors are in float64 by default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def bounded_memory():
    """This process may map 4 GiB more, so that memory taken for a size in a header is an error."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def leave_world():
    """Destroys the process group that a test has started; one of a fixture of its module stays."""
    was_started = torch.distributed.is_initialized()
    yield
    if not was_started:
        stop_world()


@pytest.fixture(autouse=True, scope="module")
def leave_world_of_module(request):
    """Destroys what is left at a module's end; tests/compiled and tests/gpu use Inductor."""
    if tier(request.node) in ("compiled", "gpu"):
        os.environ[BACKEND] = "inductor"
    yield
    os.environ.pop(BACKEND, None)
    stop_world()
