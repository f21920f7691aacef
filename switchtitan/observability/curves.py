"""The scalars that a run left for TensorBoard, read back."""

import logging
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from switchtitan.errors import ConfigError
from switchtitan.observability.metrics import TENSORBOARD_FOLDER


def _tells_no_restart(record: logging.LogRecord) -> bool:
    """TensorBoard warns that it drops what an interrupted run wrote twice, as every run asks of it at its start."""
    return "Detected out of order event.step" not in record.getMessage()


Curve = tuple[list[int], list[float]]
"""Steps and values."""


def read_curves(run: Path) -> dict[str, Curve]:
    """All scalars that a run left for TensorBoard, by tag.

    Raises:
        ConfigError: if there are none.
    """
    # A logger keeps a filter once, however often it is added.
    logging.getLogger("tensorboard").addFilter(_tells_no_restart)
    folder = run / TENSORBOARD_FOLDER
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}) if folder.is_dir() else None
    tags = events.Reload().Tags()[SCALARS] if events else []
    if events is None or not tags:
        raise ConfigError(
            f"{run}: no TensorBoard scalars in {folder}; expected the output folder of a run with "
            "[metrics] tensorboard = true"
        )
    return {
        tag: (
            [event.step for event in events.Scalars(tag)],
            [event.value for event in events.Scalars(tag)],
        )
        for tag in tags
    }
