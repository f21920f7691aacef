"""Switches are counted and timed inside training steps; costs do not grow with their number."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.switchlora_layers import build_layer, build_optimizer, set_gradients
from support.tiny import tiny_config, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.benchmark.counters import CountOperations
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS
from switchtitan.benchmark.switch_costs import time_switches_side_by_side
from switchtitan.distributed.world import stop_world
from switchtitan.errors import ConfigError
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.optim import AdamWConfig


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def test_views_and_allocations_are_not_counted() -> None:
    with CountOperations() as counter:
        matrix = torch.empty(3, 4)
        matrix.zero_()
        matrix[1:].t().add_(1)
        torch._foreach_add_([matrix, matrix.clone()], 1)
    assert counter.num_operations == 4


def switching_optimizer(
    num_layers: int,
    num_per_step: int,
    candidates_dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> SwitchLoraOptimizer:
    layers = [build_layer(64, 48, 24, 1.0, torch.float32, seed) for seed in range(num_layers)]
    for layer in layers:
        for name, candidates in list(layer.named_buffers()):
            setattr(layer, name, candidates.to(candidates_dtype))
    config = SwitchLoraConfig(
        rank=24, interval=24 / num_per_step, freeze_steps=1, decay="constant", **keys
    )
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), layers, 100)
    set_gradients(layers, 0.0)
    return optimizer


def operations_of_switches(num_layers: int, num_per_step: int, **keys: Any) -> int:
    """Operations of a step in which no ring wraps around."""
    optimizer = switching_optimizer(num_layers, num_per_step, **keys)
    with CountOperations() as counter:
        optimizer.switch()
    assert optimizer.metrics()["switch/vectors_switched"] == 2 * num_layers * num_per_step
    return counter.num_operations


@pytest.mark.parametrize("reset_moments", ["counterpart", "rescaled"])
def test_switching_more_vectors_needs_no_more_operations(reset_moments: str) -> None:
    count = partial(operations_of_switches, reset_moments=reset_moments)
    one = count(num_layers=3, num_per_step=1)
    assert count(num_layers=3, num_per_step=8) == one
    # One fold into the weight for each further layer.
    assert count(num_layers=5, num_per_step=1) == one + 2


class RecordListLayouts(TorchDispatchMode):
    """Records for each foreach operation whether tensors are contiguous, and each list's dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: list[tuple[bool, list[set[torch.dtype]]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if "_foreach" in str(func):
            lists = [argument for argument in args if isinstance(argument, list)]
            are_contiguous = all(t.is_contiguous() for entries in lists for t in entries)
            self.layouts.append((are_contiguous, [{t.dtype for t in entries} for entries in lists]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reset_moments", ["counterpart", "rescaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_of_a_switch_are_contiguous_and_of_one_dtype_each(
    dtype: torch.dtype, reset_moments: str
) -> None:
    optimizer = switching_optimizer(
        num_layers=3, num_per_step=2, candidates_dtype=dtype, reset_moments=reset_moments
    )
    with RecordListLayouts() as recorded:
        optimizer.switch()
    for are_contiguous, dtypes in recorded.layouts:
        assert are_contiguous
        assert all(len(of_list) == 1 for of_list in dtypes)
    assert recorded.layouts


def test_switches_are_timed_within_their_steps_and_compared_with_none(corpora: Path) -> None:
    # Steps after the counted one switch far fewer vectors.
    keys = ("--method.decay", "exponential", "--method.decay_ratio", "0.1")
    config = tiny_config(corpora / "switch-costs", "switchlora", *keys)
    costs = time_switches_side_by_side({"tiny": config}, rounds=2, steps_per_round=3)["tiny"]
    assert costs.step_s.shape == costs.switch_s.shape == costs.step_without_s.shape == (2, 3)
    assert (costs.switch_s > 0).all()
    assert (costs.switch_s < costs.step_s).all()
    assert 0 < costs.share < 1
    assert costs.median_s <= costs.percentile_99_s
    trainer = tiny_trainer(corpora / "switch-costs-again", "switchlora", *keys)
    vectors = [
        (trainer.stepper.step(), trainer.stepper.optimizer.metrics()["switch/vectors_switched"])[1]
        for _ in range(9)
    ]
    trainer.stepper.close()
    assert costs.num_vectors == vectors[WARM_UP_STEPS - 1] > vectors[-1]
    # A single rank gathers nothing.
    assert costs.num_collectives == 0
    assert costs.num_operations > 14


def test_a_method_without_switches_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "lora")
    with pytest.raises(ConfigError, match=r"\[method\] name = 'lora': has no switches"):
        time_switches_side_by_side({"tiny": config}, rounds=1, steps_per_round=1)
