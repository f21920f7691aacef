"""What runs around steps: garbage collection, traces, and prompts."""

import gc
import json
import re
import weakref
from ast import literal_eval
from collections import Counter

import pytest
import torch
from support.commands import run
from support.tiny import full_tensors, tiny_trainer

from switchtitan.errors import ConfigError
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


PROMPTS = ["def main(", "größe"]
KEYS = ("--evaluation.prompts", json.dumps(PROMPTS), "--evaluation.prompt_tokens", "6")
SHORT = ("--training.steps", "4", "--evaluation.interval", "2", "--checkpoint.interval", "2")


def test_every_evaluation_continues_every_prompt_as_generate_does(corpora, tmp_path):
    trainer = tiny_trainer(corpora / "prompts", "switchlora", *SHORT, *KEYS)
    trainer.train()
    folder = corpora / "prompts" / "run"
    log = (folder / "train.log").read_text()
    line = r"continuation (\d+) at step (\d+): ('.*?') -> ('.*'|\".*\")$"
    found = [tuple(map(literal_eval, match)) for match in re.findall(line, log, re.M)]
    expected = [(n, step, text) for step in (0, 2, 4) for n, text in enumerate(PROMPTS, start=1)]
    assert [match[:3] for match in found] == expected
    assert len({match[3] for match in found}) > 2  # they change with the weights
    for _, step, prompt, text in found[-2:]:
        checkpoint = folder / "checkpoints" / f"step-{step:09d}"
        words = ("--prompt", prompt, "--temperature", 0, "--max-new-tokens", 6)
        assert run("generate", checkpoint, *words, "--json", tmp_path / "result").status == 0
        assert json.loads((tmp_path / "result").read_text())["text"] == text
    # Nothing else differs from a run without prompts.
    plain = tiny_trainer(corpora / "no-prompts", "switchlora", *SHORT)
    assert plain.evaluators.prompts is None
    plain.train()
    tensors = full_tensors(plain)
    assert all(torch.equal(tensors[name], t) for name, t in full_tensors(trainer).items())


def test_a_prompt_that_does_not_fit_is_named(corpora):
    folder = corpora / "prompts-mistakes"
    keys = ("--evaluation.prompts", '["", "x = 1"]', "--evaluation.prompt_tokens", "13")
    with pytest.raises(ConfigError, match=r"prompts\[1\].* 13 "):
        tiny_trainer(folder, "full_rank", *keys)
