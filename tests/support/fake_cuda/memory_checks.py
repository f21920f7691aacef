"""Checks of memory snapshots on fake CUDA; each function runs in a new process."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from support.fake_cuda import python_api
from support.fake_cuda.steps import observed_stepper
from switchtitan.observability.memory_snapshots import MemorySnapshots

CUDA = torch.device("cuda", 0)


def snapshot_of_a_step_that_runs_out(folder: str, step: int | None) -> dict[str, Any]:
    """Returns what happens if a step of a rank runs out of memory."""
    with observed_stepper(Path(folder), "full rank", 0) as (stepper, _):
        failure = torch.OutOfMemoryError("CUDA out of memory")

        def run_out(*_: object) -> None:
            raise failure

        python_api.memory_calls.clear()
        with patch.object(stepper, "clip_gradients", run_out):
            try:
                with MemorySnapshots(Path(folder), 0, CUDA, step):
                    stepper.step()
            except torch.OutOfMemoryError as error:
                is_same = error is failure
    files = sorted(file.name for file in Path(folder, "memory").glob("*"))
    return {"is_same": is_same, "files": files, "calls": list(python_api.memory_calls)}


def snapshots_of_other_ends(folder: str) -> dict[str, Any]:
    """Returns the files after a run that ends well, one with another error, one on request, and
    one on a full disk."""
    found: dict[str, Any] = {}
    root = Path(folder)
    with MemorySnapshots(root / "well", 0, CUDA, 7) as snapshots:
        found["due"] = [step for step in range(10) if snapshots.is_due(step)]
    try:
        with MemorySnapshots(root / "error", 0, CUDA):
            raise ValueError("another")
    except ValueError:
        pass
    with MemorySnapshots(root / "request", 3, CUDA, 7) as snapshots:
        python_api.memory_calls.clear()
        snapshots.after(7)
        found["calls"] = list(python_api.memory_calls)
    with MemorySnapshots(root / "resumed", 0, CUDA, 7) as snapshots:
        python_api.memory_calls.clear()
        for step in (8, 9):
            with snapshots.around(step):
                found[f"resumed at {step}"] = list(python_api.memory_calls)
    found["resumed at the end"] = list(python_api.memory_calls)
    MemorySnapshots(root / "other rank", 1, CUDA, 7, is_asked_for=False).after(7)
    (root / "disk").write_text("a file instead of a folder")
    try:
        with MemorySnapshots(root / "disk", 0, CUDA):
            raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError as error:
        found["disk"] = str(error)
    for name in ("well", "error", "request", "other rank"):
        found[name] = sorted(file.name for file in (root / name / "memory").glob("*"))
    return found
