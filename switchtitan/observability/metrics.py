"""Outputs of a run: log lines, progress bar, TensorBoard, `results.json`."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from switchtitan.errors import OutputError
from switchtitan.files import write_atomically
from switchtitan.observability.config import MetricsConfig
from switchtitan.observability.console import (
    ConsoleTable,
    format_count,
    format_duration,
    format_summary,
)
from switchtitan.observability.event_files import TensorBoardWriter
from switchtitan.observability.sinks import HParam, Sink

if TYPE_CHECKING:
    from switchtitan.observability.profile_summary import ProfileSummary

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
COUNTED_STEP = 3
"""Step of a new or resumed run whose communication is counted; earlier steps compile."""
RESULTS_FILE = "results.json"
"""Machine-readable results of a finished run: final losses, speed, memory and environment."""

_OF_ONE_RUN = ("seed", "corpus")
"""Facts that a run cannot change when it is resumed."""


class Reporter:
    """Reports metrics on the main rank; does nothing on other ranks.

    Args:
        output_dir: folder of the run.
        num_steps: total training steps.
        start_step: steps done before this run.
        description: the run's configuration, shown in TensorBoard's text tab.
        facts: hardware, versions and sizes, added to `results.json`.
        first_validation: first validation metrics of a resumed run, shown in the summary.
        hparams: values of the configuration by which TensorBoard compares runs.
        trackers: what metrics are written to in addition to TensorBoard.
    """

    def __init__(
        self,
        config: MetricsConfig,
        output_dir: Path,
        *,
        num_steps: int,
        start_step: int = 0,
        is_main: bool,
        description: str = "",
        facts: Mapping[str, object] | None = None,
        first_validation: Mapping[str, float] | None = None,
        hparams: Mapping[str, HParam] | None = None,
        trackers: Sequence[Sink] = (),
    ) -> None:
        self._interval = config.interval
        self._num_steps = num_steps
        self._start_step = start_step
        self._is_main = is_main
        self._table = ConsoleTable(num_steps)
        self._folder = output_dir / TENSORBOARD_FOLDER
        self._results = output_dir / RESULTS_FILE
        self._facts = facts or {}
        self._has_tensorboard = is_main and config.tensorboard
        self._sinks = list(trackers)
        self._is_finished = False
        if self._has_tensorboard:
            writer = TensorBoardWriter(self._folder, start_step)
            writer.begin_run(description, hparams or {}, start_step)
            self._sinks.insert(0, writer)
        is_drawn = is_main and config.progress_bar and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            disable=not is_drawn,
            leave=False,
            unit="step",
            dynamic_ncols=True,
            # Its own estimate of the time left counts compilation.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._validation = [first_validation] if first_validation is not None else []
        self._train_loss: float | None = None

    def is_due(self, step: int) -> bool:
        """Whether to report training metrics of `step`: every `interval` steps, first and last."""
        return step % self._interval == 0 or step in (self._start_step + 1, self._num_steps)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`; call it after each step."""
        self._bar.update(step - self._bar.n)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values` to TensorBoard, and prints those for which the console has a column.

        Args:
            values: by TensorBoard tag, e.g. "loss/train"; finite or not.
        """
        if not self._is_main:
            return
        self._train_loss = values.get("loss/train", self._train_loss)
        if "loss/validation" in values:
            self._validation.append(dict(values))
        if "throughput/eta_s" in values:
            self._bar.set_postfix_str(
                f"ETA {format_duration(values['throughput/eta_s'])}", refresh=False
            )
        for sink in self._sinks:
            sink.write(step, values)
        for line in self._table.lines(step, values):
            logger.info("%s", line)

    def report_continuations(self, step: int, continuations: Iterable[tuple[str, str]]) -> None:
        """Shows texts that the model has continued, in the log and in TensorBoard's text tab.

        Args:
            continuations: pairs of a prompt and the text after it.
        """
        if not self._is_main:
            return
        for number, (prompt, text) in enumerate(continuations, start=1):
            logger.info("continuation %d at step %d: %r -> %r", number, step, prompt, text)
            # Markdown shows indented lines verbatim.
            shown = "\n".join(f"    {line}" for line in (prompt + text).split("\n"))
            for sink in self._sinks:
                sink.write_markdown(f"continuations/{number}", shown, step)

    def report_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Writes a histogram of each tensor to TensorBoard.

        Args:
            values: by TensorBoard tag; finite, of any shape.
        """
        for sink in self._sinks:
            sink.write_histograms(step, values)

    def report_profile(self, step: int, summaries: Sequence["ProfileSummary"]) -> None:
        """Writes tables and pictures of traces to TensorBoard, and as files next to them."""
        if not self._is_main:
            return
        # Imports matplotlib.
        from switchtitan.observability import profile_report

        try:
            profile_report.write_summary(self._folder, summaries)
        except OSError as error:
            logger.warning("could not write the profile's summary to %s (%s)", self._folder, error)
        for sink in self._sinks:
            for title, table in profile_report.tables(summaries).items():
                name = title.lower().replace(" ", "_")
                sink.write_markdown(f"profile/{name}", table, step)
            for name, figure in profile_report.pictures(summaries).items():
                sink.write_png(f"profile/{name}", *profile_report.as_png(figure), step)
        first = summaries[0]
        logger.info(
            "a step takes %.1f ms on rank %d in the trace: %s; more in %s",
            first.step_ms,
            first.rank,
            ", ".join(
                f"{name} {first.share(name):.0%}"
                for name in ("forward", "backward", "update", "switch")
                if name in first.regions
            ),
            self._folder / f"{profile_report.SUMMARY_FILE}.md",
        )

    def has_results(self, step: int, validation_loss: float | None) -> bool:
        """Whether the results file exists, and is of this run at `step` with this loss."""
        try:
            saved = json.loads(self._results.read_text(encoding="utf-8"))
            has_loss = (saved["step"], saved["loss/validation"]) == (step, validation_loss)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        # Earlier versions wrote fewer facts.
        facts = {key: self._facts[key] for key in _OF_ONE_RUN if key in self._facts.keys() & saved}
        return has_loss and facts == {key: saved[key] for key in facts}

    def summary(
        self,
        values: Mapping[str, float | None],
        *,
        checkpoint: Path | None = None,
        trace: Path | None = None,
    ) -> None:
        """Prints the final losses, speed and paths; writes `results.json`.

        Args:
            values: metrics of the run, by tag, for `results.json`; None if unknown.

        Raises:
            OutputError: on the main rank, after printing, if the file cannot be written.
        """
        if not self._is_main:
            return
        self._bar.close()
        self._is_finished = True
        failure = self._write_results(values)
        rows = self._validation_rows()
        if not rows and self._train_loss is not None:
            rows = [("training loss", f"{self._train_loss:.4f}")]
        test_loss = values.get("loss/test")
        if test_loss is not None:
            rows.append(("test loss", f"{test_loss:.4f}"))
        num_skipped = values.get("batches_skipped")
        if num_skipped:
            rows.append(("batches skipped", f"{num_skipped:.0f}, not finite"))
        speed, wall_time_s = (
            values.get("throughput/tokens_per_s"),
            values.get("throughput/wall_time_s"),
        )
        since = f" since step {self._start_step}" if self._start_step > 0 else ""
        if speed is not None:
            rows.append(("tokens/s", format_count(speed) + since))
        if wall_time_s is not None:
            rows.append(("wall time", format_duration(wall_time_s) + since))
        if checkpoint is not None:
            rows.append(("checkpoint", str(checkpoint)))
        rows.append(("results", "not written" if failure else str(self._results)))
        if self._has_tensorboard:
            rows.append(("logs", str(self._folder)))
        if trace is not None:
            rows.append(("profile trace", str(trace)))
        if self._has_tensorboard or trace is not None:
            rows.append(("view with", f"tensorboard --host localhost --logdir {self._folder}"))
        for line in format_summary(rows):
            logger.info("%s", line)
        if failure:
            raise OutputError(
                f"{self._results}: cannot be written ({failure}); free space, and give the same "
                "command again, which writes it"
            )

    def report_divergence(self, step: int, num_skipped: int) -> None:
        """Writes `results.json` of a run that stopped since its numbers were not finite.

        Args:
            num_skipped: batches whose update was skipped.
        """
        if not self._is_main:
            return
        values = {"step": step, "diverged": True, "batches_skipped": num_skipped}
        if failure := self._write_results(values):
            logger.error("%s: cannot be written (%s)", self._results, failure)

    def _write_results(self, values: Mapping[str, object]) -> OSError | None:
        """Returns the error if the file cannot be written."""
        contents = json.dumps(dict(values) | dict(self._facts), indent=2) + "\n"
        try:
            self._results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._results, contents)
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Releases the files and the terminal."""
        self._bar.close()
        for sink in self._sinks:
            sink.close(self._is_finished)
        self._sinks = []

    def _validation_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, tag, digits in (
            ("validation loss", "loss/validation", 4),
            ("perplexity", "perplexity/validation", 2),
        ):
            reached = [values[tag] for values in self._validation if tag in values]
            if reached:
                first = f"{reached[0]:.{digits}f} -> " if len(reached) > 1 else ""
                rows.append((name, f"{first}{reached[-1]:.{digits}f}"))
        return rows
