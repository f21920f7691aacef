"""TensorBoard's event files of a run.

Written without torch's SummaryWriter, whose thread prints a traceback if the disk is full, and
whose `add_hparams` makes a run folder of its own.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

logger = logging.getLogger(__name__)

FIRST_CARDS = {
    "loss/train": "basics/loss_train",
    "loss/validation": "basics/loss_validation",
    "optimizer/lr": "basics/lr",
    "throughput/tokens_per_s": "basics/tokens_per_s",
}
"""Tags of the metrics that tell a run's state, by metric: TensorBoard sorts groups by name. The
tags of all other metrics are their names."""
_POSITIVE_EDGES = np.geomspace(1e-12, 1e20, 775)
_BIN_EDGES = [*-_POSITIVE_EDGES[::-1], 0.0, *_POSITIVE_EDGES]
"""Edges of histograms: 10 % apart, as in torch's SummaryWriter."""


class TensorBoardWriter:
    """Appends to the event files in `folder`, and flushes after each call.

    While that fails, for example on a full disk, points are dropped, with one warning. A new file
    is begun then, because readers stop at an incomplete record. What begins a run is kept until it
    is written.

    Args:
        start_step: steps done before this run. TensorBoard drops later points of an interrupted
            run, so that no step has two points.
        description: the configuration, shown as text.
        hparams: values by which the HParams page compares runs.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        description: str = "",
        hparams: Mapping[str, bool | float | str] | None = None,
    ) -> None:
        self._folder = folder
        self._records: RecordWriter | None = None
        self._file: Path | None = None
        self._has_failed = False
        self._pending: list[Event] = []
        """What begins the run, until it is written."""
        purge = SessionLog(status=SessionLog.START)
        self._pending.append(Event(step=start_step + 1 if start_step else 0, session_log=purge))
        if description:
            shown = summary.text("configuration", _verbatim(description))
            self._pending.append(Event(step=start_step, summary=shown))
        # Not the experiment, whose keys would be those of the page: other methods have others.
        _, begin, self._end = summary.hparams(dict(hparams or {}), {})
        self._pending.append(Event(summary=begin))
        self._add()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per metric."""
        points = [
            Summary.Value(tag=FIRST_CARDS.get(metric, metric), simple_value=value)
            for metric, value in values.items()
        ]
        self._add(Event(step=step, summary=Summary(value=points)))

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds one histogram per tag, of all values of its tensor, with exponential bins."""
        for tag, tensor in values.items():
            self._add(Event(step=step, summary=summary.histogram(tag, tensor, _BIN_EDGES)))

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Shows `text` verbatim, in a fixed-width font: lines that Markdown finds indented."""
        self._add(Event(step=step, summary=summary.text(tag, _verbatim(text))))

    def close(self, is_finished: bool = False) -> None:
        """Ends the run."""
        if is_finished:
            self._add(Event(summary=self._end))
        if self._records is not None:
            self._records.close()

    def _add(self, *events: Event) -> None:
        try:
            is_new = self._records is None
            if self._records is None:
                self._records = self._new_file()
            for event in (*self._pending, *events):
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()
            self._pending, self._has_failed = [], False
        except OSError as error:
            self._drop_file(is_empty=is_new)
            if not self._has_failed:
                logger.warning(
                    "could not write to %s (%s); TensorBoard lacks points until that succeeds",
                    self._folder,
                    error,
                )
            self._has_failed = True

    def _new_file(self) -> RecordWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = self._folder / name
        records = RecordWriter(self._file.open("xb"))
        begin = Event(wall_time=time.time(), file_version="brain.Event:2")
        records.write(begin.SerializeToString())
        return records

    def _drop_file(self, is_empty: bool) -> None:
        records, self._records = self._records, None
        with suppress(OSError):  # of what is buffered
            if records is not None:
                records.close()
        with suppress(OSError):
            if is_empty and self._file is not None:
                self._file.unlink(missing_ok=True)


def _verbatim(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
