"""TensorBoard's event files of a run: written, and read back.

Written without torch's SummaryWriter, whose thread prints a traceback if the disk is full.
"""

import io
import logging
import os
import socket
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from switchtitan.errors import ConfigError
from switchtitan.observability import TENSORBOARD_FOLDER

logger = logging.getLogger(__name__)

Curve = tuple[list[int], list[float]]
"""Steps and values."""
FIRST_CARDS = {
    "loss/train": "basics/loss_train",
    "loss/validation": "basics/loss_validation",
    "optimizer/lr": "basics/lr",
    "throughput/tokens_per_s": "basics/tokens_per_s",
}
"""Metric -> its tag, for those that tell a run's state: TensorBoard sorts groups by name. The tags
of other metrics are their names."""


class TensorBoardWriter:
    """Appends to an event file in `folder`, which is complete after each call.

    While that fails, for example on a full disk, points are dropped, with one warning. What begins
    a run is kept until it is written.

    Args:
        start_step: steps done before this run. TensorBoard drops later points of an interrupted
            run, so that no step has two points.
        description: the configuration, shown as text.
    """

    def __init__(self, folder: Path, start_step: int, description: str = "") -> None:
        # Readers take the files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = folder / name
        self._has_failed = False
        purge = SessionLog(status=SessionLog.START)
        # Lines that Markdown finds indented are shown verbatim.
        text = summary.text("configuration", textwrap.indent(description, "    "))
        self._unwritten = [
            Event(file_version="brain.Event:2"),
            Event(step=start_step + 1 if start_step else 0, session_log=purge),
            Event(step=start_step, summary=text),
        ]
        self._add()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per metric."""
        points = [
            Summary.Value(tag=FIRST_CARDS.get(metric, metric), simple_value=value)
            for metric, value in values.items()
        ]
        self._add(Event(step=step, summary=Summary(value=points)))

    def _add(self, *events: Event) -> None:
        contents = io.BytesIO()
        records = RecordWriter(contents)
        for event in (*self._unwritten, *events):
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        size = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                size = file.tell()
                file.write(contents.getvalue())
        except OSError as error:
            if size is not None:
                with suppress(OSError):  # readers stop at an incomplete record
                    os.truncate(self._file, size)
            if not self._has_failed:
                logger.warning(
                    "could not write to %s (%s); TensorBoard lacks points until that succeeds",
                    self._file.parent,
                    error,
                )
            self._has_failed = True
        else:
            self._unwritten, self._has_failed = [], False


def read_curves(run: Path) -> dict[str, Curve]:
    """Returns all scalars that a run wrote for TensorBoard, by metric, e.g. "loss/train"; a
    ConfigError if there are none."""
    # It warns about purged points, which every resumed run causes.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    folder = run / TENSORBOARD_FOLDER
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    tags = events.Reload().Tags()[SCALARS] if folder.is_dir() else []
    if not tags:
        raise ConfigError(
            f"{run}: no TensorBoard scalars in {folder}; expected the output folder of a run with "
            "[metrics] tensorboard = true"
        )
    metrics = {tag: metric for metric, tag in FIRST_CARDS.items()}
    points = {metrics.get(tag, tag): events.Scalars(tag) for tag in tags}
    return {
        metric: ([point.step for point in series], [point.value for point in series])
        for metric, series in points.items()
    }
