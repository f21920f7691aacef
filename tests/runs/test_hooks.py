"""What runs around steps: garbage collection and traces."""

import gc
import json
import weakref
from collections import Counter

from support.tiny import tiny_trainer

from switchtitan.regions import STEP
from switchtitan.training.step import FULL_INTERVAL, YOUNG_INTERVAL, GarbageCollection


class Node:
    """Garbage that only a collection frees: it references itself."""

    def __init__(self):
        self.itself = self


def take_steps(garbage, first, last):
    for _ in range(first, last + 1):
        garbage.step()


def test_young_garbage_is_collected_often_and_all_garbage_rarely():
    with GarbageCollection() as garbage:
        assert gc.isenabled()  # the data workers that the first step starts inherit this
        kept = Node()
        garbage.step()
        # So collections of young generations skip it.
        assert any(entry is kept for entry in gc.get_objects(generation=2))
        node = Node()
        gc.collect()  # into the old generation
        old = weakref.ref(node)
        del node
        young = weakref.ref(Node())
        many = [[] for _ in range(100_000)]  # enough to trigger Python's collector if it is enabled
        take_steps(garbage, 2, YOUNG_INTERVAL - 1)
        assert young() is not None
        garbage.step()
        assert young() is None
        take_steps(garbage, YOUNG_INTERVAL + 1, FULL_INTERVAL - 1)
        assert old() is not None
        garbage.step()
        assert old() is None
        del many


def test_a_trace_has_the_regions_of_all_its_steps(corpora):
    keys = ("--profiler.enabled", "true", "--profiler.start_step", "2", "--profiler.num_steps", "3")
    keys += ("--training.steps", "5", "--evaluation.interval", "3", "--checkpoint.interval", "3")
    trainer = tiny_trainer(corpora / "regions", "switchlora", *keys)
    trainer.train()
    events = json.loads(trainer.profiler.trace.read_text())["traceEvents"]
    counts = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    in_every_step = (STEP, "reduce", "clip", "switch")
    assert {name: counts[name] for name in in_every_step} == dict.fromkeys(in_every_step, 3)
    assert counts["backward"] == 3 * 4  # micro-batches
    assert all(counts[name] for name in ("data", "forward", "update", "evaluate", "save", "report"))
