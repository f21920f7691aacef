"""Times of regions on fake CUDA: no step waits for the events that measure them."""

from pathlib import Path

import pytest
from support.fake_cuda import region_checks
from support.fake_cuda.expected import unexpected_in
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.step_checks import Observed

pytestmark = needs_compiler


# One test for all findings: pytest-xdist would take the steps in every process that runs a test.
def test_steps_2_to_10_wait_for_no_event_and_all_regions_are_timed(tmp_path: Path) -> None:
    found = run_check(region_checks.timed_steps, str(tmp_path))
    steps = {name: [Observed(*step) for step in observed] for name, (observed, _) in found.items()}
    planted = steps.pop("plant")
    assert all(len(observed) == 9 for observed in steps.values())
    assert unexpected_in(steps) == {}
    # Shows that the check above can fail.
    assert all("Event.synchronize" in step.waits for step in planted)
    for name in region_checks.TIMED:
        times = found[name][1]
        assert {"time/data_ms", "time/forward_ms", "time/backward_ms", "time/step_ms"} <= set(times)
        # Every span takes 1 ms. A step has one region "clip".
        assert times["time/clip_ms"] == pytest.approx(1)
    assert found["switchlora"][1]["time/switch_ms"] == pytest.approx(1)
    # Resets follow every second step.
    assert found["relora"][1]["time/reset_ms"] == pytest.approx(5 / 9)


def test_the_time_of_an_event_that_may_not_have_ended_is_an_error() -> None:
    assert "must be completed" in run_check(region_checks.elapsed_time_of_an_unfinished_event)
