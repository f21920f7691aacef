"""The compute dtype is logged, saved and kept by a resumed run, whatever its machine prefers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import rewrite_metadata
from support.tiny import tiny_config, tiny_trainer, train_steps

from switchtitan.cli import evaluate
from switchtitan.distributed import compute_dtype
from switchtitan.distributed.compute_dtype import Bf16Support
from switchtitan.distributed.world import stop_world

NO_EVALUATION = ("--evaluation.interval", "100")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def pretend(monkeypatch: pytest.MonkeyPatch, is_native: bool) -> None:
    support = Bf16Support(is_native, "so the test says")
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: support)


def run_steps(folder: Path, num_steps: int, dtype: str = "auto") -> tuple[list[float], torch.dtype]:
    """Trains, saves, and returns losses and the dtype in which layers compute."""
    trainer = tiny_trainer(folder, "switchlora", *NO_EVALUATION, "--training.dtype", dtype)
    seen: list[torch.dtype] = []
    layer = trainer.stepper.model.get_submodule("model.layers.0.mlp")
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = train_steps(trainer, num_steps)
    handle.remove()
    trainer.save()
    trainer.close()
    stop_world()
    (computed,) = set(seen)
    return losses, computed


@pytest.mark.parametrize("is_native", [True, False])
def test_a_resumed_run_keeps_the_choice_of_another_machine(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, caplog, is_native: bool
) -> None:
    name, dtype = ("bfloat16", torch.bfloat16) if is_native else ("float32", torch.float32)
    pretend(monkeypatch, is_native)
    straight, _ = run_steps(corpora / f"straight-{name}", 4)
    caplog.set_level("INFO")
    folder = corpora / f"kept-{name}"
    losses, first_dtype = run_steps(folder, 2)
    assert f"compute dtype: {name} ({'' if is_native else 'bfloat16 is not '}native" in caplog.text
    pretend(monkeypatch, not is_native)
    caplog.clear()
    resumed, second_dtype = run_steps(folder, 2)
    assert (first_dtype, second_dtype) == (dtype, dtype)
    assert losses + resumed == straight
    assert f"compute dtype: {name} (as in the checkpoint)" in caplog.text
    assert ("WITHOUT NATIVE SUPPORT" in caplog.text) == is_native
    assert "changed since" not in caplog.text


def test_an_explicit_dtype_changes_a_resumed_run_and_is_listed(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    pretend(monkeypatch, True)
    folder = corpora / "changed-dtype"
    run_steps(folder, 1)
    # The same dtype as chosen before: no change.
    run_steps(folder, 1, "bfloat16")
    assert "changed since" not in caplog.text
    _, dtype = run_steps(folder, 1, "float32")
    assert dtype == torch.float32
    assert "changed since that checkpoint: compute dtype: bfloat16 -> float32" in caplog.text
    caplog.clear()
    _, dtype = run_steps(folder, 1)
    assert dtype == torch.float32, "auto keeps the newest checkpoint's"
    assert "changed since" not in caplog.text


@pytest.mark.parametrize("saved", ["bfloat16", "float32"])
def test_a_checkpoint_that_does_not_state_its_dtype_has_its_configurations(
    corpora: Path, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    folder = corpora / f"old-{saved}"
    pretend(monkeypatch, saved == "float32")
    run_steps(folder, 1, saved)
    removed = []
    rewrite_metadata(
        folder / "run" / "checkpoints" / "step-000000001",
        lambda metadata: removed.append(metadata["train_state"].pop("compute_dtype")),
    )
    assert removed == [saved]
    _, dtype = run_steps(folder, 1)
    assert dtype == getattr(torch, saved)


def test_an_evaluation_computes_in_the_checkpoints_dtype(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corpora / "evaluated-dtype"
    pretend(monkeypatch, True)
    run_steps(folder, 1)
    pretend(monkeypatch, False)
    evaluate.main([str(folder / "run"), "--json", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["compute_dtype"] == "bfloat16"


def test_without_native_bf16_a_run_computes_in_fp32_and_says_why(corpora: Path) -> None:
    """In a new process, because oneDNN reads the variable once."""
    folder = corpora / "avx2"
    config = tiny_config(folder, "switchlora", *NO_EVALUATION)
    (file,) = folder.glob("*.toml")
    keys = ("--training.dtype", "auto", "--training.steps", "2")
    finished = subprocess.run(
        [sys.executable, "-m", "switchtitan", "train", "--config", str(file), *keys],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    log = finished.stdout + finished.stderr
    assert "compute dtype: float32 (bfloat16 is not native: " in log
    results = json.loads((config.job.output_dir / "results.json").read_text())
    assert results["compute_dtype"] == "float32"
    assert results["compute_dtype_reason"].startswith("bfloat16 is not native: ")
