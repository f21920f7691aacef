"""Reads the scalars that a run wrote for TensorBoard."""

import logging
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from switchtitan.errors import ConfigError
from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.tensorboard import FIRST_CARDS

Curve = tuple[list[int], list[float]]
"""Steps and values."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Returns all scalars that a run wrote for TensorBoard, by metric, e.g. "loss/train".

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
    metrics = {tag: metric for metric, tag in FIRST_CARDS.items()}
    points = {metrics.get(tag, tag): events.Scalars(tag) for tag in tags}
    return {
        metric: ([point.step for point in of_metric], [point.value for point in of_metric])
        for metric, of_metric in points.items()
    }


def _is_not_about_restart(record: logging.LogRecord) -> bool:
    """Drops TensorBoard's warning about purged points, which every resumed run causes."""
    return "Detected out of order event.step" not in record.getMessage()
