import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from switchtitan.training.garbage_collection import FULL_INTERVAL, YOUNG_INTERVAL, GarbageCollection


class Node:
    """Garbage that only a collection finds: it holds itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()


def take_steps(garbage: GarbageCollection, first: int, last: int) -> None:
    for _ in range(first, last + 1):
        garbage.step()


def old_node() -> Callable[[], Node | None]:
    """A node that is no longer young, and then let go."""
    node = Node()
    gc.collect()
    return weakref.ref(node)


def test_python_collects_nothing_by_itself():
    with GarbageCollection() as garbage:
        assert gc.isenabled()  # processes that the first step starts inherit this
        garbage.step()
        node = weakref.ref(Node())
        many = [[] for _ in range(100_000)]  # enough for Python to collect what is young otherwise
        assert node() is not None
        assert len(many) == 100_000


def test_young_garbage_goes_every_few_steps_and_all_of_it_now_and_then():
    with GarbageCollection() as garbage:
        garbage.step()
        old = old_node()
        young = weakref.ref(Node())
        take_steps(garbage, 2, YOUNG_INTERVAL - 1)
        assert young() is not None
        garbage.step()
        assert young() is None
        take_steps(garbage, YOUNG_INTERVAL + 1, FULL_INTERVAL - 1)
        assert old() is not None
        garbage.step()
        assert old() is None


def test_what_the_first_step_left_is_old_afterwards():
    """So that collections of what is young do not look through it."""
    with GarbageCollection() as garbage:
        kept = Node()
        assert not any(entry is kept for entry in gc.get_objects(generation=2))
        garbage.step()
        assert any(entry is kept for entry in gc.get_objects(generation=2))


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_python_collects_as_before_when_the_context_is_left(was_enabled, num_steps):
    if not was_enabled:
        gc.disable()
    with pytest.raises(KeyboardInterrupt):
        interrupted_after(num_steps)
    assert gc.isenabled() == was_enabled


def interrupted_after(num_steps: int) -> None:
    with GarbageCollection() as garbage:
        take_steps(garbage, 1, num_steps)
        assert num_steps == 0 or not gc.isenabled()
        raise KeyboardInterrupt
