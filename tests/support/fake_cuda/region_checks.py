"""Checks of region times on fake CUDA events; each function runs in a new process."""

from pathlib import Path
from unittest.mock import patch

import torch

from support.fake_cuda import python_api
from support.fake_cuda.cases import CASES
from support.fake_cuda.step_checks import Observed, observe, observed_stepper
from switchtitan.observability.region_times import RegionTimes

TIMED = ("switchlora", "host candidates", "relora", "accumulation")
"""Cases of which steps 2 to 10 are timed."""
NUM_STEPS = 9


class LateEvent(python_api.FakeEvent):
    """An event that the device has not passed when the host asks, unless it `has_passed`."""

    has_passed = False

    def query(self) -> bool:
        return LateEvent.has_passed and super().query()


class WaitingEvent(python_api.FakeEvent):
    """A plant: asking waits for the device."""

    def query(self) -> bool:
        self.synchronize()
        return True


def timed_steps(folder: str) -> dict[str, tuple[list[Observed], dict[str, float]]]:
    """Returns what is observed in each timed step of a case, and the mean times at their end."""
    results = {name: _timed_steps(folder, name, LateEvent) for name in TIMED}
    results["plant"] = _timed_steps(folder, TIMED[0], WaitingEvent)
    return results


def _timed_steps(
    folder: str, name: str, event: type[python_api.FakeEvent]
) -> tuple[list[Observed], dict[str, float]]:
    LateEvent.has_passed = False
    with (
        observed_stepper(Path(folder), CASES[name], 0) as (stepper, races),
        patch.object(torch.cuda, "Event", event),
        RegionTimes(torch.device("cuda", 0)) as times,
    ):
        observed = [observe(stepper.step, races) for _ in range(NUM_STEPS)]
        too_early = times.means()
        assert event is WaitingEvent or not too_early
        LateEvent.has_passed = True
        return observed, too_early | times.means()


def elapsed_time_of_an_unfinished_event() -> str:
    """Returns the error of a time that is read before the device has passed the event."""
    began, ended = python_api.FakeEvent(), python_api.FakeEvent()
    began.record()
    python_api.current_stream().actor.advance()
    ended.record()
    try:
        began.elapsed_time(ended)
    except RuntimeError as error:
        return str(error)
    return "none"
