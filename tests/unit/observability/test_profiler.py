"""Traces of a few steps, and their summaries: nested regions, threads, kernels and allocations."""

import json
import logging

import pytest
import torch

from switchtitan.observability import Profiler, ProfilerConfig
from switchtitan.observability.profile_report import as_png, pictures, tables, write_summary
from switchtitan.observability.profile_summary import (
    NUM_MEMORY_POINTS,
    OperationTime,
    ProfileSummary,
    RegionTime,
    read_summary,
)

REGIONS = {"step", "forward", "backward", "update", "switch", "save"}


def work(steps, profiler):
    weight = torch.ones(5, 7)
    for _ in range(steps):
        (weight @ weight.T).sum()
        profiler.step()


def config_of(**keys):
    return ProfilerConfig(enabled=True, **keys)


# ---- Traces


def test_a_trace_of_the_chosen_steps_is_written_once_and_the_profile_plugin_reads_it(tmp_path):
    from torch_tb_profiler.profiler.data import RunProfileData
    from torch_tb_profiler.profiler.run_generator import RunGenerator

    config = config_of(start_step=2, num_steps=3, with_stack=True, record_shapes=True)
    with Profiler(config, tmp_path / "tensorboard") as profiler:
        work(1, profiler)
        assert profiler.trace is None
        work(3, profiler)
        assert profiler.trace is not None
        work(9, profiler)
    assert list((tmp_path / "tensorboard").iterdir()) == [profiler.trace]
    assert profiler.trace.name.startswith("rank0.")
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
    assert list(tmp_path.iterdir()) == ([profiler.trace] if is_traced else [])
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


# ---- Summaries of traces written by hand


def span(cat, name, start, end, tid=1, **args):
    """A span, in microseconds."""
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "args": args} | times


def annotation(name, start, end):
    return span("user_annotation", name, start, end)


STEPS = [
    event
    for start in (0, 100_000)
    for event in (
        annotation("step", start, start + 50_000),
        annotation("forward", start, start + 10_000),
        annotation("FSDP::pre_forward", start, start + 9_000),
        annotation("backward", start + 10_000, start + 30_000),
        annotation("update", start + 30_000, start + 48_000),
        annotation("switch", start + 35_000, start + 40_000),
    )
]


def summary_of(folder, events):
    trace = folder / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    return read_summary(trace, 3, REGIONS)


def test_regions_exclude_those_inside_and_cover_the_step(tmp_path):
    summary = summary_of(tmp_path, [*STEPS, annotation("save", 160_000, 190_000)])
    assert (summary.rank, summary.num_steps, summary.step_ms) == (3, 2, 50)
    host_ms = {name: time.host_ms for name, time in summary.regions.items()}
    expected = {"step": 2, "forward": 10, "backward": 20, "update": 13, "switch": 5, "save": 30}
    assert host_ms == pytest.approx(expected)
    assert summary.share("switch") == pytest.approx(5 / 50)
    assert summary.share("missing") == 0
    assert not summary.is_on_gpu


def test_kernels_belong_to_the_region_in_which_any_thread_launched_them(tmp_path):
    events = []
    for number, launch, duration in (
        (1, 5_000, 1_000),
        (2, 20_000, 6_000),
        (3, 36_000, 2_000),
        (4, 49_000, 1_000),
        (5, 99_000, 7_000),
    ):
        key = {"correlation": number}
        events += [
            span("cuda_runtime", "cudaLaunchKernel", launch, launch + 5, 40 + number, **key),
            # Kernels run later, in other regions.
            span("kernel", f"k{number % 2}", 60_000, 60_000 + duration, 80 + number, **key),
        ]
    summary = summary_of(tmp_path, [*STEPS, *events])
    device_ms = {name: time.device_ms for name, time in summary.regions.items()}
    # Per step of two; the last kernel belongs to no region.
    assert device_ms == {"step": 0.5, "forward": 0.5, "backward": 3, "update": 0, "switch": 1}
    assert summary.share("backward") == pytest.approx(3 / 5)
    found = [(of.name, of.num_calls, of.self_ms) for of in summary.operations]
    assert found == [("k1", 3, 10), ("k0", 2, 7)]


def test_self_time_of_operations_excludes_those_they_call_in_the_same_thread(tmp_path):
    events = [
        span("cpu_op", "outer", 0, 10_000),
        span("cpu_op", "inner", 2_000, 5_000),
        span("cpu_op", "inner", 5_000, 6_000),
        span("cpu_op", "inner", 2_000, 4_000, tid=2),
    ]
    operations = summary_of(tmp_path, events).operations
    found = [(of.name, of.num_calls, of.self_ms) for of in operations]
    assert found == [("outer", 1, 6), ("inner", 3, 6)]
    assert sum(of.share for of in operations) == pytest.approx(1)


def test_the_curve_of_memory_keeps_peaks_and_prefers_the_gpu(tmp_path):
    def allocation(time, num_bytes, device):
        args = {"Device Type": device, "Total Allocated": num_bytes}
        return {"ph": "i", "name": "[memory]", "ts": time, "args": args}

    on_gpu = [allocation(1000 * i, 2**20 * (7 if i == 1234 else 1), 1) for i in range(3000)]
    curve = summary_of(tmp_path, [*on_gpu, allocation(0, 2**30, 0)]).memory_mib
    assert len(curve) <= NUM_MEMORY_POINTS
    assert max(mib for _, mib in curve) == 7
    assert curve[0] == (0, 1)
    assert summary_of(tmp_path, [allocation(5, 2**21, 0)]).memory_mib == [(0, 2)]
    assert summary_of(tmp_path, []).memory_mib == []


def test_tables_and_pictures_of_several_ranks_are_written(tmp_path):
    def summary(rank):
        host_ms = {"step": 1.0, "forward": 10.0, "update": 4.0, "switch": 5.0 + rank, "save": 70.0}
        regions = {name: RegionTime(3, ms, ms / 2) for name, ms in host_ms.items()}
        operations = [OperationTime("aten::mm<a|b>", 6, 12.0, 0.75)]
        return ProfileSummary(rank, 3, 20.0 + rank, regions, operations, [(0.0, 1.0), (5.0, 3.0)])

    summaries = [summary(0), summary(2)]
    titled = tables(summaries)
    assert "| switch | 3 | 5.000 | 7.000 | 25.0% |" in titled["Time per region"]
    assert "| forward | 3 | 5.000 | 5.000 | 50.0% |" in titled["Time per region on the GPU"]
    assert r"`aten::mm<a\|b>`" in titled["Operations"]
    for figure in pictures(summaries).values():
        data, width, height = as_png(figure)
        assert data.startswith(b"\x89PNG")
        assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [width, height]
    write_summary(tmp_path, summaries)
    saved = json.loads((tmp_path / "profile_summary.json").read_text())
    assert [of["regions"]["switch"]["host_ms"] for of in saved] == [5, 7]
    assert "Time per region" in (tmp_path / "profile_summary.md").read_text()
