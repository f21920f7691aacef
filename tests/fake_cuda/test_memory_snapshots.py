"""Snapshots of GPU memory, on fake CUDA: one if memory runs out, one on request, none otherwise."""

import pytest
from support.fake_cuda import memory_checks
from support.fake_cuda.process import needs_compiler, run_check

from switchtitan.observability.profiler import MAX_EVENTS

START, STOP = f"record(max_entries={MAX_EVENTS})", "record(enabled=None)"


@needs_compiler
@pytest.mark.parametrize("step", [None, 7])
def test_memory_that_runs_out_leaves_a_snapshot_and_raises_the_same_error(tmp_path, step):
    found = run_check(memory_checks.snapshot_of_a_step_that_runs_out, str(tmp_path), step)
    assert found["is_same"]
    assert found["files"] == ["rank0-out-of-memory.pickle"]
    assert found["calls"] == (["dump"] if step is None else [START, "dump", STOP])


@needs_compiler
def test_snapshots_are_written_on_request_and_not_after_other_errors(tmp_path):
    found = run_check(memory_checks.snapshots_of_other_ends, str(tmp_path))
    assert found["error"] == found["other rank"] == []
    assert found["request"] == ["rank0-step-000000007.pickle"]
    assert found["resumed"] == ["rank0-step-000000009.pickle"]
    # Recording slows down allocations: it ends with the requested step.
    expected = {"request": ["dump", STOP], "resumed": ["dump", STOP], "other rank": [STOP]}
    assert found["calls"] == expected
    assert found["disk"] == "CUDA out of memory"
