"""TensorBoard's event files of a run."""

import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.compat import tf
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from switchtitan.observability.hparams import end_summary, start_summary
from switchtitan.observability.sinks import HParam
from switchtitan.observability.tags import CHARTS, tag_of

logger = logging.getLogger(__name__)


_ALMOST_FULL_BYTES = 1 << 20
_WRITE_ERRORS = (OSError, tf.errors.OpError)
"""With TensorFlow, event files are written by it."""


class TensorBoardWriter:
    """Appends to the event files in `folder`.

    If that fails, for example on a full disk, an error of the disk or in a folder that was deleted,
    points are dropped, with one warning, until it succeeds again. A new file is begun then, because
    readers stop at an incomplete record.

    Args:
        start_step: steps done before this run. TensorBoard drops later points of an interrupted
            run, so that no step has two points.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._purge_step: int | None = start_step + 1 if start_step else 0
        self._writer: SummaryWriter | None = None
        self._has_failed = False
        self._has_session = False
        if not isinstance(threading.excepthook, _WithoutWriteErrors):
            threading.excepthook = _WithoutWriteErrors(threading.excepthook)
        self._attempt(lambda writer: None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per tag, and flushes."""

        def add(writer: SummaryWriter) -> None:
            for metric, value in values.items():
                writer.add_scalar(tag_of(metric), value, step)

        self._attempt(add)

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds one histogram per tag, of all values of its tensor, with exponential bins."""

        def add(writer: SummaryWriter) -> None:
            for tag, tensor in values.items():
                writer.add_histogram(tag, tensor, step)

        self._attempt(add)

    def begin_run(self, description: str, hparams: Mapping[str, HParam], step: int) -> None:
        """Writes what is shown of a run without its metrics.

        Args:
            description: the configuration, shown as text.
            hparams: values by which runs are compared.
        """
        if description:
            self.write_text("configuration", description, step)
        if hparams:
            self._write_summary(start_summary(hparams), None)
            self._has_session = True
        charts = {
            category: {chart: ["Multiline", patterns] for chart, patterns in of_category.items()}
            for category, of_category in CHARTS.items()
        }
        self._attempt(lambda writer: writer.add_custom_scalars(charts))

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Shows `text` verbatim, in a fixed-width font."""
        shown = "\n".join(f"    {line}" for line in text.splitlines())
        self._attempt(lambda writer: writer.add_text(tag, shown, step))

    def write_markdown(self, tag: str, text: str, step: int) -> None:
        """Shows `text` as Markdown, tables included."""
        self._attempt(lambda writer: writer.add_text(tag, text, step))

    def write_png(self, tag: str, picture: bytes, width: int, height: int, step: int) -> None:
        """Shows a picture, of this size in pixels."""
        image = Summary.Image(
            encoded_image_string=picture, width=width, height=height, colorspace=4
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._write_summary(summary, step)

    def _write_summary(self, summary: Summary, step: int | None) -> None:
        # torch's writer has no public method for a summary of its own.
        self._attempt(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def close(self, is_finished: bool = False) -> None:
        """Ends the run."""
        if self._has_session:
            self._write_summary(end_summary(is_finished), None)
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._attempt(lambda writer: writer.close(), is_flushed=False)

    def _attempt(self, add: Callable[[SummaryWriter], object], is_flushed: bool = True) -> None:
        try:
            self._check_writable()
        except OSError as error:
            self._fail(error)
            return
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            add(self._writer)
            if is_flushed:
                self._writer.flush()
        except _WRITE_ERRORS as error:
            self._writer = None
            self._fail(error)
            return
        self._purge_step = None
        if self._has_failed:
            logger.warning("TensorBoard's points are written again to %s", self._folder)
        self._has_failed = False

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            logger.warning(
                "could not write to %s (%s); TensorBoard lacks points until that succeeds",
                self._folder,
                error,
            )
        self._has_failed = True

    def _check_writable(self) -> None:
        """Writes a file after an error, and if the disk is almost full: what an event file lacks is
        known at the next write only."""
        if self._has_failed or _is_almost_full(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / ".writable"
            try:
                probe.write_bytes(bytes(1 << 16))
            finally:
                with suppress(OSError):
                    probe.unlink()


class _WithoutWriteErrors:
    """A `threading.excepthook` that prints no traceback for an event file that cannot be written.

    The thread that writes it passes the error on to the next call of its writer, which warns.
    """

    def __init__(self, hook: Callable[[threading.ExceptHookArgs], object]) -> None:
        self._hook = hook

    def __call__(self, error: threading.ExceptHookArgs) -> None:
        is_writer = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(error.exc_value, _WRITE_ERRORS)):
            self._hook(error)


def _is_almost_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _ALMOST_FULL_BYTES
    except OSError:  # for example no such folder yet
        return False
