"""Outputs of a run: log lines, progress bar, TensorBoard, `results.json`."""

import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from switchtitan.config import parse_toml
from switchtitan.errors import EnvironmentMismatchError, OutputError
from switchtitan.files import write_atomically
from switchtitan.observability import RESULTS_FILE, TENSORBOARD_FOLDER
from switchtitan.observability.config import MetricsConfig
from switchtitan.observability.log import ConsoleTable, perplexity_of
from switchtitan.observability.tensorboard import TensorBoardWriter

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Reporter:
    """Reports metrics on the main rank; does nothing on other ranks."""

    config: MetricsConfig
    output_dir: Path
    num_steps: int
    is_main: bool
    start_step: int = 0
    """Steps done before this run."""
    description: str = ""
    """The run's configuration in TOML, shown in TensorBoard's text tab."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Hardware, versions and sizes, added to `results.json`."""

    def __post_init__(self) -> None:
        self._table = ConsoleTable(self.num_steps)
        self._folder = self.output_dir / TENSORBOARD_FOLDER
        self._results = self.output_dir / RESULTS_FILE
        self._is_finished = False
        self._wandb: Any = None
        if self.is_main and "wandb" in self.config.trackers:
            self._wandb = _start_wandb(self.output_dir, self.description)
        self._tensorboard: TensorBoardWriter | None = None
        if self.is_main and self.config.tensorboard:
            self._tensorboard = TensorBoardWriter(self._folder, self.start_step, self.description)
        self._bar = tqdm(
            total=self.num_steps,
            initial=self.start_step,
            disable=not (self.is_main and self.config.progress_bar and sys.stderr.isatty()),
            leave=False,
            unit="step",
            dynamic_ncols=True,
            # Its own estimate of the time left counts compilation.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def is_due(self, step: int) -> bool:
        """Whether to report training metrics of `step`: every `interval` steps, first and last."""
        return step % self.config.interval == 0 or step in (self.start_step + 1, self.num_steps)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`; call it after each step."""
        self._bar.update(step - self._bar.n)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`, by name, to TensorBoard; prints those with a column on the console."""
        if not self.is_main:
            return
        if (eta_s := values.get("throughput/eta_s")) is not None:
            self._bar.set_postfix_str(f"ETA {tqdm.format_interval(eta_s)}", refresh=False)
        if self._tensorboard is not None:
            self._tensorboard.write(step, values)
        if self._wandb is not None:
            self._wandb.log({**values, "step": step})
        for line in self._table.lines(step, values):
            logger.info("%s", line)

    def has_results(self, step: int) -> bool:
        """Whether the results file exists, and is of this run at `step`."""
        expected: dict[str, object] = {"step": step, "diverged": None}
        expected |= {key: self.facts[key] for key in ("seed", "corpus") if key in self.facts}
        try:
            saved = json.loads(self._results.read_text(encoding="utf-8"))
            return {key: saved.get(key) for key in expected} == expected
        except (OSError, ValueError, AttributeError):
            return False

    def summary(
        self,
        values: Mapping[str, float | None],
        *,
        first_validation_loss: float | None = None,
        checkpoint: Path | None = None,
        trace: Path | None = None,
    ) -> None:
        """Prints the losses, speed and paths; writes `values`, by name, to `results.json`. Raises
        an OutputError on the main rank, after printing, if the file cannot be written."""
        if not self.is_main:
            return
        self._bar.close()
        self._is_finished = True
        failure = self._write_results(values)
        # One, if the first evaluation was the last.
        losses = dict.fromkeys((first_validation_loss, values.get("loss/validation")))
        known = [loss for loss in losses if loss is not None]
        test_loss, num_skipped = values.get("loss/test"), values.get("batches_skipped")
        speed, time_s = (values.get(f"throughput/{key}") for key in ("tokens_per_s", "wall_time_s"))
        since = f" since step {self.start_step}" if self.start_step > 0 else ""
        has_logs = self._tensorboard is not None or trace is not None
        rows = {
            "validation loss": " -> ".join(f"{loss:.4f}" for loss in known),
            "perplexity": " -> ".join(f"{perplexity_of(loss):.2f}" for loss in known),
            "test loss": test_loss is not None and f"{test_loss:.4f}",
            "batches skipped": num_skipped and f"{num_skipped:.0f}, not finite",
            "tokens/s": speed and tqdm.format_sizeof(speed) + since,
            "wall time": time_s and tqdm.format_interval(time_s) + since,
            "checkpoint": checkpoint,
            "results": "not written" if failure else self._results,
            "profile trace": trace,
            "logs": has_logs and self._folder,
            "view with": has_logs and f"tensorboard --host localhost --logdir {self._folder}",
        }
        shown = {name: value for name, value in rows.items() if value}
        width = max(map(len, shown))
        lines = [f"{name:<{width}}  {value}" for name, value in shown.items()]
        for line in ("-" * 80, *lines, "-" * 80):
            logger.info("%s", line)
        if failure:
            raise OutputError(
                f"{self._results}: cannot be written ({failure}); free space, and give the same "
                "command again, which writes it"
            )

    def report_divergence(self, step: int, num_skipped: int) -> None:
        """Writes `results.json` of a run that stopped since its numbers were not finite."""
        values = {"step": step, "diverged": True, "batches_skipped": num_skipped}
        if self.is_main and (failure := self._write_results(values)):
            logger.error("%s: cannot be written (%s)", self._results, failure)

    def close(self) -> None:
        """Releases the files and the terminal."""
        self._bar.close()
        if self._wandb is not None:
            # One that is not finished counts as failed.
            self._wandb.finish(exit_code=0 if self._is_finished else 1)
        self._tensorboard, self._wandb = None, None

    def _write_results(self, values: Mapping[str, object]) -> OSError | None:
        """Returns the error if the file cannot be written."""
        contents = json.dumps({**values, **self.facts}, indent=2) + "\n"
        try:
            self._results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._results, contents)
        except OSError as error:
            return error
        return None


def _start_wandb(output_dir: Path, description: str) -> Any:
    """Starts a run of the project `switchtitan`, or of `WANDB_PROJECT`; resumes `output_dir`'s.
    Raises an EnvironmentMismatchError if wandb does not start."""
    import wandb

    file = output_dir / "wandb_run.txt"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:8])
    run_id = file.read_text(encoding="utf-8").strip()
    config = parse_toml(description, "the configuration")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "switchtitan"),
            dir=str(output_dir),
            name=f"{config['job']['name']}-{run_id}",
            id=run_id,
            resume="allow",
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
    except Exception as error:
        raise EnvironmentMismatchError(
            f"[metrics] trackers: wandb did not start ({' '.join(str(error).split())}); "
            "log in, or work offline (WANDB_MODE=offline), or remove it from trackers"
        ) from error
    # Its own step cannot go back, as that of a resumed run does.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
