"""A save is timed as the trainer does it. The speed of steps after saves is relative to a process
that never saves."""

import time
from pathlib import Path

import pytest
from support.tiny import tiny_trainer

from switchtitan.benchmark.commands.time_checkpoint import SaveTimes, time_saves
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.distributed.world import stop_world


@pytest.mark.parametrize(
    ("before", "after", "speed"),
    [
        ([1.0, 1.1, 0.9], [1.0, 1.1, 0.9], 1.0),  # other load, which slows the control down too
        ([1.0, 1.1, 0.9], [2.0, 1.9, 2.1], 0.5),
    ],
)
def test_load_that_slows_both_processes_down_does_not_count(before, after, speed):
    times = SaveTimes(
        step_before_saves_s=[0.1] * 3,
        undisturbed_step_s=[0.2] * 3,
        control_before_saves=before,
        control_after_saves=after,
    )
    assert times.speed_after_saves == pytest.approx(speed)


def test_without_such_a_process_it_is_the_ratio_of_times():
    times = SaveTimes(step_before_saves_s=[0.1] * 3, undisturbed_step_s=[0.2] * 3)
    assert times.speed_after_saves == pytest.approx(0.5)


def test_the_search_for_values_that_are_not_finite_is_timed(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_s = 0.5

    def search(tensors: CheckpointTensors) -> list[str]:
        time.sleep(search_s)
        return []

    monkeypatch.setattr(CheckpointTensors, "non_finite", search)
    trainer = tiny_trainer(corpora / "save-times", "full_rank")
    try:
        times = time_saves(trainer.stepper, tmp_path, rounds=1, undisturbed_steps=1)
    finally:
        trainer.close()
        stop_world()
    assert min(times.synchronous_s + times.stall_s) >= search_s
