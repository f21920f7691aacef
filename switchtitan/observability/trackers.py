"""Experiment trackers that a run's metrics can be sent to, next to TensorBoard."""

import contextlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.files import write_atomically
from switchtitan.observability.sinks import HParam, Sink

logger = logging.getLogger(__name__)

PROJECT = "switchtitan"
"""The project of all runs, unless `WANDB_PROJECT` or `TRACKIO_PROJECT` names another."""


def build_tracker(
    tracker: str, output_dir: Path, run_name: str, hparams: Mapping[str, HParam]
) -> Sink:
    """Starts a run, or continues that of `output_dir`, in a tracker.

    Args:
        tracker: "wandb" or "trackio"; its package is installed.

    Raises:
        EnvironmentMismatchError: if the tracker does not start.
    """
    run_id = _run_id(output_dir / f"{tracker}_run.txt")
    try:
        return _BUILDERS[tracker](output_dir, f"{run_name}-{run_id}", run_id, dict(hparams))
    except Exception as error:
        raise EnvironmentMismatchError(
            f"[metrics] trackers: {tracker} did not start ({' '.join(str(error).split())}); "
            f"log in, or work offline ({_OFFLINE[tracker]}), or remove it from trackers"
        ) from error


class _Tracker:
    """A `Sink` of scalars; it has no place for the rest.

    Args:
        log: sends one point per metric, and the step.
        finish: ends the run; with whether it is finished.
    """

    def __init__(
        self, log: Callable[[int, dict[str, float]], object], finish: Callable[[bool], object]
    ) -> None:
        self._log = log
        self._finish = finish

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, dict(values))

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None: ...

    def write_markdown(self, name: str, text: str, step: int) -> None: ...

    def write_png(self, name: str, picture: bytes, width: int, height: int, step: int) -> None: ...

    def close(self, is_finished: bool) -> None:
        self._finish(is_finished)


def _start_wandb(folder: Path, name: str, run_id: str, config: dict[str, Any]) -> Sink:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder),
        name=name,
        id=run_id,
        resume="allow",
        config=config,
        settings=wandb.Settings(console="off", silent=True),
    )
    # Its own step cannot go back, as that of a resumed run does.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return _Tracker(
        lambda step, values: run.log({**values, "step": step}),
        lambda is_finished: run.finish(exit_code=0 if is_finished else 1),
    )


def _start_trackio(folder: Path, name: str, run_id: str, config: dict[str, Any]) -> Sink:
    import trackio

    # It prints where it writes.
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="allow",
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    logger.debug("%s", printed.getvalue())

    def finish(is_finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()

    return _Tracker(lambda step, values: run.log(values, step=step), finish)


_BUILDERS = {"wandb": _start_wandb, "trackio": _start_trackio}
_OFFLINE = {"wandb": "WANDB_MODE=offline", "trackio": "without TRACKIO_SPACE_ID"}


def _run_id(file: Path) -> str:
    """Returns the id in `file`, or writes a new one: a resumed run continues its own."""
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{run_id}\n")
    return run_id
