"""Reads the scalars that a run wrote for TensorBoard."""

import logging
from operator import itemgetter
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from switchtitan.errors import ConfigError
from switchtitan.observability.metrics import TENSORBOARD_FOLDER
from switchtitan.observability.tags import metric_of


def _is_not_about_restart(record: logging.LogRecord) -> bool:
    """Drops TensorBoard's warning about purged points, which every resumed run causes."""
    return "Detected out of order event.step" not in record.getMessage()


Curve = tuple[list[int], list[float]]
"""Steps and values."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Returns all scalars that a run wrote for TensorBoard, by metric, e.g. "loss/train".

    Also of runs that earlier versions began, with other tags.

    Raises:
        ConfigError: if there are none.
    """
    # Adding the same filter twice has no effect.
    logging.getLogger("tensorboard").addFilter(_is_not_about_restart)
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; expected the output folder of a run")
    folder = run / TENSORBOARD_FOLDER
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}) if folder.is_dir() else None
    tags = events.Reload().Tags()[SCALARS] if events else []
    if events is None or not tags:
        raise ConfigError(
            f"{run}: no TensorBoard scalars in {folder}; expected the output folder of a run with "
            "[metrics] tensorboard = true"
        )
    points: dict[str, list[tuple[int, float]]] = {}
    for tag in tags:
        of_tag = [(event.step, event.value) for event in events.Scalars(tag)]
        points.setdefault(metric_of(tag), []).extend(of_tag)
    return {
        metric: ([step for step, _ in of_metric], [value for _, value in of_metric])
        for metric, of_metric in (
            (metric, sorted(found, key=itemgetter(0))) for metric, found in points.items()
        )
    }
