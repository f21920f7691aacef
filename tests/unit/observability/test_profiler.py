"""Traces of a few steps, and their summaries: nested regions, threads, kernels and allocations."""

import json
import logging

import pytest
import torch

from switchtitan.observability.config import ProfilerConfig
from switchtitan.observability.profiler import Profiler


def work(steps, profiler):
    weight = torch.ones(5, 7)
    for _ in range(steps):
        (weight @ weight.T).sum()
        profiler.step()


def config_of(**keys):
    return ProfilerConfig(enabled=True, **keys)


def test_a_trace_of_the_chosen_steps_is_written_once_and_the_profile_plugin_reads_it(tmp_path):
    from torch_tb_profiler.profiler.data import RunProfileData
    from torch_tb_profiler.profiler.run_generator import RunGenerator

    config = config_of(start_step=2, num_steps=3, with_stack=True, record_shapes=True)
    tables = []
    with Profiler(config, tmp_path, report=tables.append) as profiler:
        work(1, profiler)
        assert profiler.trace is None
        work(3, profiler)
        assert profiler.trace is not None
        work(9, profiler)
    assert list((tmp_path / "tensorboard").iterdir()) == [profiler.trace]
    assert profiler.trace.name.startswith("rank0.")
    (table,) = tables
    assert "aten::mm" in table
    events = json.loads(profiler.trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3
    data = RunProfileData.parse("rank0", None, str(profiler.trace), str(tmp_path))
    profile = RunGenerator("rank0", None, data).generate_run_profile()
    assert {"Overview", "Operator", "Trace"} <= {view.display_name for view in profile.views}
    assert len(profile.overview["steps"]["rows"]) == 3
    assert "aten::mm" in str(profile.operation_table_by_name)


@pytest.mark.parametrize(
    ("enabled", "rank", "steps_done", "num_steps"),
    [(False, 0, 0, 1), (True, 1, 0, 1), (True, 0, 10, 1), (True, 0, 0, 30)],
)
def test_what_is_traced(tmp_path, caplog, enabled, rank, steps_done, num_steps):
    """Nothing if it is off, on another rank, and in a run that resumes after the chosen steps;
    the steps so far if the run ends early."""
    config = ProfilerConfig(enabled=enabled, start_step=2, num_steps=num_steps)
    with Profiler(config, tmp_path, rank=rank, steps_done=steps_done) as profiler:
        work(4, profiler)
    is_traced = num_steps == 30
    assert list(tmp_path.rglob("*.json")) == ([profiler.trace] if is_traced else [])
    assert (profiler.trace is not None) == is_traced
    assert not [of for of in caplog.records if of.levelno >= logging.WARNING]


def test_a_run_that_ends_too_early_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), Profiler(config_of(start_step=40), tmp_path) as profiler:
        work(5, profiler)
    assert "start_step = 40" in caplog.text
    assert "5 steps" in caplog.text


def test_profiling_recompiles_nothing(tmp_path, fresh_compiler):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x: (x @ x.T).sum(), backend=counter, fullgraph=True)
    x = torch.ones(5, 7)
    compiled(x)
    config = config_of(start_step=3, num_steps=2, with_stack=True, record_shapes=True)
    with Profiler(config, tmp_path) as profiler:
        for _ in range(10):
            compiled(x)
            profiler.step()
    assert profiler.trace is not None
    assert counter.frame_count == 1
