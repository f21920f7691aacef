"""Experiment trackers that a run's scalars can be sent to, next to TensorBoard."""

import contextlib
import io
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from switchtitan.errors import EnvironmentMismatchError


class Tracker(NamedTuple):
    """A run in a tracker."""

    write: Callable[[int, Mapping[str, float]], object]
    """Sends the metrics of a step."""
    close: Callable[[bool], object]
    """Ends the run; with whether it is finished."""


def build_tracker(
    tracker: str, output_dir: Path, run_name: str, hparams: Mapping[str, bool | float | str]
) -> Tracker:
    """Starts a run of the project `switchtitan` in a tracker, or continues that of `output_dir`.

    Args:
        tracker: "wandb" or "trackio"; its package is installed.

    Raises:
        EnvironmentMismatchError: if the tracker does not start.
    """
    file = output_dir / f"{tracker}_run.txt"
    with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
        new.write(uuid.uuid4().hex[:8])
    run_id = file.read_text(encoding="utf-8").strip()
    options = {
        "project": os.environ.get(f"{tracker.upper()}_PROJECT", "switchtitan"),
        "name": f"{run_name}-{run_id}",
        "resume": "allow",
        "config": dict(hparams),
    }
    try:
        if tracker == "wandb":
            return _start_wandb(options | {"dir": str(output_dir), "id": run_id})
        return _start_trackio(options)
    except Exception as error:
        raise EnvironmentMismatchError(
            f"[metrics] trackers: {tracker} did not start ({' '.join(str(error).split())}); "
            "log in, or work offline (WANDB_MODE=offline, or without TRACKIO_SPACE_ID), or remove "
            "it from trackers"
        ) from error


def _start_wandb(options: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(**options, settings=wandb.Settings(console="off", silent=True))
    # Its own step cannot go back, as that of a resumed run does.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker(
        lambda step, values: run.log({**values, "step": step}),
        lambda is_finished: run.finish(exit_code=0 if is_finished else 1),
    )


def _start_trackio(options: dict[str, Any]) -> Tracker:
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
        run = trackio.init(**options, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    return Tracker(
        lambda step, values: run.log(dict(values), step=step), lambda is_finished: trackio.finish()
    )
