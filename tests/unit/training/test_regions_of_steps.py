"""The regions of a run's steps, in the trace and in TensorBoard's scalars."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_trainer

from switchtitan.distributed.world import stop_world
from switchtitan.observability.region_times import RegionTimes
from switchtitan.regions import STEP, observe_regions, region, stop_observing_regions
from switchtitan.training.trainer import Trainer

INSIDE_STEP = {"data", "forward", "backward", "reduce", "clip", "switch", "update"}
OUTSIDE_STEP = {"evaluate", "save", "report"}
TRACED = (
    *("--profiler.enabled", "true", "--profiler.start_step", "4", "--profiler.num_steps", "3"),
    *("--training.steps", "8", "--evaluation.interval", "5", "--checkpoint.interval", "5"),
)


@pytest.fixture(autouse=True)
def no_world_left_behind():
    yield
    stop_world()


def traced_regions(trace: Path) -> list[dict]:
    """The spans of all regions, in microseconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    names = INSIDE_STEP | OUTSIDE_STEP | {STEP}
    return [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in names
    ]


def uncovered_share(trace: Path) -> float:
    """The share of a step's time in no region, in the step with the least: others were
    interrupted."""
    spans = traced_regions(trace)
    steps = [(e["ts"], e["ts"] + e["dur"]) for e in spans if e["name"] == STEP]
    # A switch is inside the update.
    inside = [e for e in spans if e["name"] in INSIDE_STEP - {"switch"}]
    return min(
        1 - sum(e["dur"] for e in inside if start <= e["ts"] < end) / (end - start)
        for start, end in steps
    )


def trained(trainer: Trainer) -> Trainer:
    trainer.train()
    return trainer


def test_a_trace_has_all_regions_and_they_cover_the_steps(corpora):
    trainer = trained(tiny_trainer(corpora / "regions", "switchlora", *TRACED))
    trace = trainer.profiler.trace
    assert trace is not None
    counts = Counter(event["name"] for event in traced_regions(trace))
    assert counts[STEP] == counts["switch"] == counts["reduce"] == counts["clip"] == 3
    assert counts["backward"] == 3 * 4  # micro-batches
    assert set(counts) == INSIDE_STEP | OUTSIDE_STEP | {STEP}
    assert uncovered_share(trace) < 0.03


def test_the_check_finds_a_gap(corpora, monkeypatch):
    """Shows that the check above can fail."""
    trainer = tiny_trainer(corpora / "regions-gap", "switchlora", *TRACED)
    clip = trainer.stepper.clip_gradients

    def clip_after_a_gap(loss: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return clip(loss)

    monkeypatch.setattr(trainer.stepper, "clip_gradients", clip_after_a_gap)
    trace = trained(trainer).profiler.trace
    assert trace is not None
    assert uncovered_share(trace) > 0.03


def times_reported(trainer: Trainer) -> dict[int, dict[str, float]]:
    reported: dict[int, dict[str, float]] = {}
    report = trainer.reporter.report

    def record(step, values):
        times = {tag: value for tag, value in values.items() if tag.startswith("time/")}
        reported.setdefault(step, {}).update(times)
        report(step, values)

    trainer.reporter.report = record
    trainer.train()
    return reported


def test_times_of_all_regions_are_reported_at_the_interval(corpora):
    keys = ("--training.steps", "8", "--metrics.interval", "4", "--evaluation.interval", "5")
    reported = times_reported(tiny_trainer(corpora / "region-times", "switchlora", *keys))
    of_step = {f"time/{name}_ms" for name in (*INSIDE_STEP, "other", STEP)}
    assert {step for step, times in reported.items() if of_step <= set(times)} == {1, 4, 8}
    of_interval = reported[4]
    parts = sum(of_interval[tag] for tag in of_step - {"time/step_ms"})
    assert parts == pytest.approx(of_interval["time/step_ms"])
    # The last evaluation and save come after the last report of a step.
    assert {"time/evaluate_ms", "time/save_ms"} <= set(reported[8])


def test_no_times_are_reported_without_the_key(corpora):
    keys = ("--training.steps", "2", "--metrics.region_times", "false")
    reported = times_reported(tiny_trainer(corpora / "no-region-times", "full_rank", *keys))
    assert not any(reported.values())


def test_regions_of_a_step_cost_less_than_two_thousandths_of_it(corpora):
    trainer = tiny_trainer(corpora / "region-cost", "switchlora")
    step = trainer.stepper.step
    step()

    class Count:
        calls = 0

        def begin(self, name: str) -> None:
            self.calls += 1

        def end(self) -> None: ...

    count = Count()
    observe_regions(count)
    step()
    stop_observing_regions(count)
    began = time.perf_counter()
    for _ in range(5):
        step()
    step_s = (time.perf_counter() - began) / 5
    trainer.stepper.close()

    def cost(repetitions: int = 2000) -> float:
        began = time.perf_counter()
        for _ in range(repetitions):
            with region("any"):
                pass
        return (time.perf_counter() - began) / repetitions

    unobserved = min(cost() for _ in range(5)) * count.calls / step_s
    with RegionTimes(torch.device("cpu")):
        timed = min(cost() for _ in range(5)) * count.calls / step_s
    print(
        f"{count.calls} regions take {unobserved:.4%} of {1000 * step_s:.1f} ms, timed {timed:.4%}"
    )
    assert 0 < unobserved < 0.002
    assert 0 < timed < 0.005
