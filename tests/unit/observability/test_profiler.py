"""Traces of a few steps, and snapshots of GPU memory."""

import json
import logging
from pathlib import Path

import pytest
import torch

from switchtitan.observability.config import ProfilerConfig
from switchtitan.observability.profiler import MAX_EVENTS, Profiler, snapshot_if_memory_runs_out

START, STOP = {"max_entries": MAX_EVENTS}, {"enabled": None}


def work(steps, profiler):
    weight = torch.ones(5, 7)
    for _ in range(steps):
        (weight @ weight.T).sum()
        profiler.step()


def config_of(**keys):
    return ProfilerConfig(enabled=True, **keys)


def test_a_trace_of_the_chosen_steps_is_written_once(tmp_path):
    config = config_of(start_step=2, num_steps=3, with_stack=True, record_shapes=True)
    with Profiler(config, tmp_path) as profiler:
        work(1, profiler)
        assert profiler.trace is None
        work(3, profiler)
        assert profiler.trace is not None
        work(9, profiler)
    files = {profiler.trace, profiler.trace.with_suffix(".txt")}
    assert set((tmp_path / "tensorboard").iterdir()) == files
    assert profiler.trace.name.startswith("rank0.")
    assert "aten::mm" in profiler.trace.with_suffix(".txt").read_text()
    events = json.loads(profiler.trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3


@pytest.mark.parametrize(
    ("enabled", "rank", "ranks", "steps_done", "num_steps", "is_traced"),
    [
        (False, 0, (0,), 0, 1, False),
        (True, 1, (0,), 0, 1, False),
        (True, 1, "all", 0, 1, True),
        (True, 0, (0,), 10, 1, True),
        (True, 0, (0,), 0, 30, True),
    ],
)
def test_what_is_traced(tmp_path, caplog, enabled, rank, ranks, steps_done, num_steps, is_traced):
    """Nothing if it is off and on another rank; the steps so far if the run ends early."""
    config = ProfilerConfig(enabled=enabled, ranks=ranks, start_step=2, num_steps=num_steps)
    with Profiler(config, tmp_path, rank=rank, steps_done=steps_done) as profiler:
        work(4, profiler)
    names = [trace.name.partition(".")[0] for trace in tmp_path.rglob("*.json")]
    assert names == [f"rank{rank}"] * is_traced
    assert (profiler.trace is not None) == is_traced
    assert not [of for of in caplog.records if of.levelno >= logging.WARNING]


def test_a_run_that_resumes_past_the_chosen_steps_is_traced_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="switchtitan")
    slow, names = [], []
    for steps_done in (10, 12):
        with Profiler(config_of(start_step=2), tmp_path, steps_done=steps_done) as profiler:
            for _ in range(6):
                slow += [steps_done] * profiler.is_slow_next
                work(1, profiler)
        names.append(profiler.trace)
    assert slow == [10, 10, 12, 12]  # by the configuration, so that all ranks agree
    assert names[0] is not None
    assert names[1] is None
    assert "start_step = 14 or more" in caplog.text


# Snapshots: one if memory runs out, one on request, none otherwise.


@pytest.fixture
def calls(monkeypatch):
    """The calls that record and write the history of GPU memory."""
    calls = []

    def dump(file):
        calls.append("dump")
        Path(file).touch()

    module = "torch.cuda.memory"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(f"{module}._record_memory_history", lambda **keys: calls.append(keys))
    monkeypatch.setattr(f"{module}._dump_snapshot", dump)
    return calls


OOM = torch.OutOfMemoryError()


@pytest.mark.parametrize(
    ("error", "step", "is_full", "expected"),
    [
        (OOM, None, False, ["dump"]),
        (OOM, 7, False, [START, "dump", STOP]),
        (OOM, None, True, []),
        (KeyError(), None, False, []),
    ],
)
def test_memory_that_runs_out_leaves_a_snapshot_and_raises_the_same_error(
    tmp_path, calls, error, step, is_full, expected
):
    config = ProfilerConfig(memory_snapshot_step=step)
    if is_full:
        (tmp_path / "memory").write_text("a file instead of a folder")
    with pytest.raises(type(error)) as raised, snapshot_if_memory_runs_out(config, tmp_path, 0):
        raise error
    assert raised.value is error
    assert calls == expected
    names = [file.name for file in tmp_path.glob("memory/*")]
    assert names == ["rank0-out-of-memory.pickle"] * ("dump" in expected)


@pytest.mark.parametrize(
    ("rank", "steps_done", "names"),
    [
        (0, 5, ["rank0-step-000000007.pickle"]),
        # Resumed after the requested step.
        (0, 8, ["rank0-step-000000009.pickle"]),
        (1, 5, []),
    ],
)
def test_a_requested_snapshot_ends_the_recording(tmp_path, calls, rank, steps_done, names):
    config = ProfilerConfig(memory_snapshot_step=7)
    with Profiler(config, tmp_path, rank=rank, steps_done=steps_done) as profiler:
        work(4, profiler)
    assert [file.name for file in tmp_path.glob("memory/*")] == names
    assert calls == [*["dump"] * len(names), STOP]
