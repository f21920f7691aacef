import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from switchtitan.training.hooks import FULL_INTERVAL, YOUNG_INTERVAL, GarbageCollection


class Node:
    """Garbage that only a collection frees: it references itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def enable_collection() -> Iterator[None]:
    yield
    gc.enable()


def take_steps(garbage: GarbageCollection, first: int, last: int) -> None:
    for _ in range(first, last + 1):
        garbage.step()


def old_node() -> Callable[[], Node | None]:
    """A weak reference to garbage of the old generation."""
    node = Node()
    gc.collect()
    return weakref.ref(node)


def test_python_collects_nothing_by_itself():
    with GarbageCollection() as garbage:
        assert gc.isenabled()  # the data workers that the first step starts inherit this
        garbage.step()
        node = weakref.ref(Node())
        many = [[] for _ in range(100_000)]  # enough to trigger Python's collector if it is enabled
        assert node() is not None
        assert len(many) == 100_000


def test_young_garbage_is_collected_often_and_all_garbage_rarely():
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


def test_objects_of_the_first_step_are_in_the_old_generation_afterwards():
    """So collections of young generations skip them."""
    with GarbageCollection() as garbage:
        kept = Node()
        assert not any(entry is kept for entry in gc.get_objects(generation=2))
        garbage.step()
        assert any(entry is kept for entry in gc.get_objects(generation=2))


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_leaving_the_context_restores_the_collector(was_enabled, num_steps):
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
