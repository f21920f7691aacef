import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest

from switchtitan.garbage import GarbageCollection


class Node:
    """Garbage that only a collection finds: it holds itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_is_collected_every_few_steps_and_at_no_other_time():
    with GarbageCollection(interval=3) as garbage:
        assert gc.isenabled()  # processes that the first step starts inherit this
        garbage.step()
        node = weakref.ref(Node())
        left_over = [[] for _ in range(100_000)]  # enough for Python to collect by itself
        garbage.step()
        assert node() is not None
        garbage.step()
        assert node() is None
        assert len(left_over) == 100_000


def test_what_the_first_step_left_is_not_looked_through_again():
    kept = Node()
    with GarbageCollection() as garbage:
        garbage.step()
        assert gc.get_freeze_count() > 0
        assert not any(entry is kept for entry in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(entry is kept for entry in gc.get_objects())


@pytest.mark.parametrize("was_enabled", [True, False])
def test_python_collects_as_before_when_the_context_is_left(was_enabled):
    if not was_enabled:
        gc.disable()
    with contextlib.suppress(KeyboardInterrupt), GarbageCollection() as garbage:
        garbage.step()
        assert not gc.isenabled()
        raise KeyboardInterrupt
    assert gc.isenabled() == was_enabled
