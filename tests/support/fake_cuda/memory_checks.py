"""Checks of memory snapshots on fake CUDA; each function runs in a new process."""

from pathlib import Path
from unittest.mock import patch

import torch

from support.fake_cuda import python_api
from support.fake_cuda.steps import observed_stepper
from switchtitan.observability.config import ProfilerConfig
from switchtitan.observability.profiler import Profiler, snapshot_if_memory_runs_out


def snapshot_of_a_step_that_runs_out(folder, step):
    """Returns what happens if a step of a rank runs out of memory."""
    with observed_stepper(Path(folder), "full rank", 0) as (stepper, _):
        failure = torch.OutOfMemoryError("CUDA out of memory")

        def run_out(*_):
            raise failure

        python_api.memory_calls.clear()
        with patch.object(stepper, "clip_gradients", run_out):
            try:
                with snapshot_if_memory_runs_out(Path(folder), 0, step is not None):
                    stepper.step()
            except torch.OutOfMemoryError as error:
                is_same = error is failure
    files = sorted(file.name for file in Path(folder, "memory").glob("*"))
    return {"is_same": is_same, "files": files, "calls": list(python_api.memory_calls)}


def snapshots_of_other_ends(folder):
    """Returns the files after a run that ends with another error, one on request, one that resumed
    after the requested step, one of another rank, and one on a full disk."""
    root = Path(folder)
    try:
        with snapshot_if_memory_runs_out(root / "error", 0, False):
            raise ValueError("another")
    except ValueError:
        pass
    found = {"calls": {}}
    for name, rank, steps_done in (("request", 0, 5), ("resumed", 0, 8), ("other rank", 1, 5)):
        python_api.memory_calls.clear()
        config = ProfilerConfig(memory_snapshot_step=7)
        with Profiler(config, root / name, rank=rank, steps_done=steps_done) as profiler:
            for _ in range(4):
                profiler.step()
        found["calls"][name] = list(python_api.memory_calls)
    (root / "disk").write_text("a file instead of a folder")
    try:
        with snapshot_if_memory_runs_out(root / "disk", 0, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:
        found["disk"] = str(error)
    for name in ("error", "request", "resumed", "other rank"):
        found[name] = sorted(file.name for file in (root / name / "memory").glob("*"))
    return found
