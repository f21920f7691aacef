import json
import logging

import pytest
import torch
from support.small_disk import Filler, small_disk
from torch._dynamo.testing import CompileCounter
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.run_generator import RunGenerator

from switchtitan.observability import Profiler, ProfilerConfig


def work(steps: int, profiler: Profiler) -> None:
    weight = torch.ones(5, 7)
    for _ in range(steps):
        (weight @ weight.T).sum()
        profiler.step()


def traced_steps(path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted(
        event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")
    )


@pytest.mark.parametrize("start_step", [2, 4])
def test_trace_of_the_chosen_number_of_steps_is_written_once(tmp_path, start_step):
    config = ProfilerConfig(enabled=True, start_step=start_step, num_steps=3)
    with Profiler(config, tmp_path / "tensorboard") as profiler:
        work(start_step - 1, profiler)
        assert profiler.trace is None
        work(3, profiler)
        assert profiler.trace is not None
        work(20, profiler)
    assert list((tmp_path / "tensorboard").iterdir()) == [profiler.trace]
    assert profiler.trace.name.startswith("rank0.")
    assert profiler.trace.name.endswith(".pt.trace.json")
    assert len(traced_steps(profiler.trace)) == 3
    events = json.loads(profiler.trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 3


def test_profile_plugin_reads_the_trace(tmp_path):
    config = ProfilerConfig(
        enabled=True, start_step=2, num_steps=3, with_stack=True, record_shapes=True
    )
    with Profiler(config, tmp_path) as profiler:
        work(9, profiler)
    data = RunProfileData.parse("rank0", None, str(profiler.trace), str(tmp_path))
    profile = RunGenerator("rank0", None, data).generate_run_profile()
    assert {"Overview", "Operator", "Trace"} <= {view.display_name for view in profile.views}
    assert len(profile.overview["steps"]["rows"]) == 3
    assert "aten::mm" in str(profile.operation_table_by_name)


@pytest.mark.parametrize(("enabled", "rank"), [(False, 0), (True, 1)])
def test_nothing_is_written_when_disabled_or_on_another_rank(tmp_path, enabled, rank):
    config = ProfilerConfig(enabled=enabled, start_step=2, num_steps=1)
    with Profiler(config, tmp_path, rank=rank) as profiler:
        work(5, profiler)
    assert profiler.trace is None
    assert list(tmp_path.iterdir()) == []


def test_run_resumed_beyond_the_chosen_steps_is_not_traced(tmp_path, caplog):
    config = ProfilerConfig(enabled=True, start_step=4, num_steps=1)
    with Profiler(config, tmp_path, steps_done=10) as profiler:
        work(5, profiler)
    assert profiler.trace is None
    assert caplog.text == ""


def test_run_that_ends_too_early_warns(tmp_path, caplog):
    config = ProfilerConfig(enabled=True, start_step=40)
    with caplog.at_level(logging.WARNING), Profiler(config, tmp_path) as profiler:
        work(5, profiler)
    assert "start_step = 40, but training ended after 5 steps" in caplog.text


def test_partial_trace_is_written_when_training_ends(tmp_path):
    config = ProfilerConfig(enabled=True, start_step=2, num_steps=30)
    with Profiler(config, tmp_path) as profiler:
        work(4, profiler)
    assert profiler.trace is not None
    assert not list(tmp_path.glob(".*"))


def test_a_trace_that_does_not_fit_the_disk_is_a_warning_and_leaves_nothing(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        Filler(disk).fill()
        config = ProfilerConfig(enabled=True, start_step=2, num_steps=1)
        with caplog.at_level(logging.WARNING), Profiler(config, disk) as profiler:
            work(5, profiler)
        assert profiler.trace is None
        assert f"no trace was written to {disk}" in caplog.text
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_profiling_recompiles_nothing(tmp_path):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: (x @ x.T).sum(), backend=counter, fullgraph=True)
    x = torch.ones(5, 7)
    compiled(x)
    assert counter.frame_count == 1
    config = ProfilerConfig(
        enabled=True, start_step=3, num_steps=2, with_stack=True, record_shapes=True
    )
    with Profiler(config, tmp_path) as profiler:
        for _ in range(10):
            compiled(x)
            profiler.step()
    assert profiler.trace is not None
    assert counter.frame_count == 1
