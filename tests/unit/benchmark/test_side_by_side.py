"""Steps of several configurations are timed in alternation, without compiling or leaving files."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.tiny import COMPILED, tiny_config
from torch._dynamo.utils import compilation_time_metrics

from switchtitan.benchmark import side_by_side
from switchtitan.benchmark.side_by_side import time_steps_side_by_side
from switchtitan.contracts import TrainingOptimizer
from switchtitan.errors import ConfigError, UserError
from switchtitan.training.stepper import Stepper, StepResult

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def num_compilations() -> int:
    return len(compilation_time_metrics.get("_compile.compile_inner", []))


def test_every_step_is_timed_and_is_longer_than_its_parts(corpora: Path) -> None:
    folder = corpora / "timed"
    configs = {
        method: tiny_config(folder, method) for method in ("full_rank", "lora", "switchlora")
    }
    times = time_steps_side_by_side(configs, rounds=3, steps_per_round=2)
    assert list(times) == list(configs)
    for measured in times.values():
        assert measured.step_s.shape == (3, 2)
        assert measured.tokens_per_step == 8 * 16
        assert (measured.forward_backward_s > 0).all()
        assert (measured.optimizer_s > 0).all()
        parts = measured.forward_backward_s + measured.optimizer_s
        # The rest is the end of the step, which frees gradients.
        assert (measured.step_s > parts).all()
    assert not (folder / "run").exists()
    assert not dist.is_initialized()


def test_python_collects_no_garbage_in_a_timed_step(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_collect: list[bool] = []
    compute_gradients = Stepper.compute_gradients

    def noting(stepper: Stepper) -> StepResult:
        may_collect.append(gc.isenabled())
        return compute_gradients(stepper)

    monkeypatch.setattr(Stepper, "compute_gradients", noting)
    time_steps_side_by_side(
        {"": tiny_config(corpora / "garbage", "lora")}, rounds=2, steps_per_round=2
    )
    assert may_collect == [True] * side_by_side.WARM_UP_STEPS + [False] * 4
    assert gc.isenabled()


def test_the_order_alternates_from_round_to_round(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = corpora / "places"
    configs = {
        f"rank {rank}": tiny_config(folder, "lora", "--method.rank", str(rank))
        for rank in (3, 4, 5)
    }
    turns: list[str] = []
    run = side_by_side.Bench.run

    def noted_run(bench: side_by_side.Bench, num_steps: int) -> np.ndarray:
        turns.append(bench.name)
        return run(bench, num_steps)

    monkeypatch.setattr(side_by_side.Bench, "run", noted_run)
    times = time_steps_side_by_side(configs, rounds=3, steps_per_round=1)
    names = list(configs)
    assert turns[side_by_side.WARM_UP_STEPS * len(names) :] == [*names, *reversed(names), *names]
    assert list(times) == names
    assert all(of_one.step_s.shape == (3, 1) for of_one in times.values())


def test_a_timed_step_that_is_skipped_is_refused(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(corpora / "skipping", "lora", "--training.on_nonfinite", "skip")
    run = side_by_side.Bench.run

    def spoiled_run(bench: side_by_side.Bench, num_steps: int) -> np.ndarray:
        if num_steps > 1:
            with torch.no_grad():
                next(iter(bench.stepper.model.parameters())).fill_(torch.inf)
        return run(bench, num_steps)

    monkeypatch.setattr(side_by_side.Bench, "run", spoiled_run)
    with pytest.raises(
        UserError, match=r"tiny one: step 3 cannot be timed: its update was skipped"
    ):
        time_steps_side_by_side({"tiny one": config}, rounds=2, steps_per_round=2)
    assert not dist.is_initialized()


def test_alternating_compiled_models_recompiles_nothing(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks and batches differ, so shared functions have separate graphs for each configuration.

    Each has five shapes of factors: more graphs than torch.compile keeps per function by default.
    """
    folder = corpora / "alternated"
    configs = {
        f"rank {rank}, batch {batch}": tiny_config(
            folder,
            "switchlora",
            *COMPILED,
            *("--method.rank", str(rank), "--training.local_batch_size", str(batch)),
        )
        for rank, batch in ((4, 2), (5, 4))
    }
    compiled_by_step: list[int] = []
    run = side_by_side.Bench.run

    def counted_run(bench: side_by_side.Bench, num_steps: int) -> np.ndarray:
        before = num_compilations()
        result = run(bench, num_steps)
        compiled_by_step.append(num_compilations() - before)
        return result

    monkeypatch.setattr(side_by_side.Bench, "run", counted_run)
    times = time_steps_side_by_side(configs, rounds=2, steps_per_round=3)
    num_warm_up = side_by_side.WARM_UP_STEPS * len(configs)
    assert all(compiled_by_step[: len(configs)])
    assert not any(compiled_by_step[num_warm_up:])
    assert len(times) == 2


def test_a_run_shorter_than_the_timed_steps_is_refused(corpora: Path) -> None:
    config = tiny_config(corpora / "short", "lora", "--training.steps", "22")
    with pytest.raises(
        ConfigError, match=r"tiny one: \[training\] steps = 22: expected at least 23"
    ):
        time_steps_side_by_side({"tiny one": config}, rounds=5, steps_per_round=4)


@pytest.mark.parametrize("key", ["tf32", "deterministic"])
def test_sides_that_differ_in_a_key_of_the_process_are_refused(corpora: Path, key: str) -> None:
    config = tiny_config(corpora / f"differing-{key}", "lora")
    # Not by the command line: a CPU has no TF32.
    configs = {}
    for name, value in (("one", True), ("other", False)):
        training = config.training.model_copy(update={key: value})
        configs[name] = config.model_copy(update={"training": training})
    with pytest.raises(
        ConfigError, match=rf"\[training\] {key} = true in one, false in other: expected one value"
    ):
        time_steps_side_by_side(configs, rounds=1, steps_per_round=1)


def test_updates_are_timed_in_the_precision_of_training(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[str] = []
    update = side_by_side._update

    def noting(optimizer: TrainingOptimizer, mark: Callable[[], None]) -> None:
        precisions.append(torch.get_float32_matmul_precision())
        update(optimizer, mark)

    monkeypatch.setattr(side_by_side, "_update", noting)
    torch.set_float32_matmul_precision("high")
    try:
        time_steps_side_by_side(
            {"": tiny_config(corpora / "precision", "lora")}, rounds=1, steps_per_round=1
        )
        assert set(precisions) == {"highest"}
    finally:
        torch.set_float32_matmul_precision("highest")
