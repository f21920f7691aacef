"""What a finished run left."""

import json
from dataclasses import dataclass
from typing import Any

from switchtitan.comparison.plan import Run
from switchtitan.config import ConfigError
from switchtitan.job_config import parse_arguments
from switchtitan.observability import RESULTS_FILE

DIVERGED_FILE = "diverged.txt"
"""Left by the comparison in the folder of a run whose gradients ceased to be finite; holds the run's message."""


@dataclass(frozen=True)
class RunResult:
    """The figures of a run. Losses are inf where it diverged."""

    run: Run
    validation_loss: float
    test_loss: float
    figures: dict[str, Any]
    """All of the run's `results.json`; empty where it diverged."""

    @property
    def has_diverged(self) -> bool:
        return not self.figures


def read_result(run: Run) -> RunResult | None:
    """The result of a run, or None if it is not finished.

    Raises:
        ConfigError: if the folder holds a run with another configuration.
    """
    saved = run.folder / "config.toml"
    if not saved.exists():
        return None
    _check_same(run)
    if (run.folder / DIVERGED_FILE).exists():
        return RunResult(run, float("inf"), float("inf"), {})
    file = run.folder / RESULTS_FILE
    if not file.exists():
        return None
    figures = json.loads(file.read_text(encoding="utf-8"))
    if figures["step"] != run.config().training.steps:
        return None
    return RunResult(run, figures["loss/validation"], figures["loss/test"], figures)


def _check_same(run: Run) -> None:
    saved = run.folder / "config.toml"
    wanted, found = run.config(), parse_arguments(["--config", str(saved)], num_ranks=1)
    differing = [
        section
        for section in type(wanted).model_fields
        if getattr(wanted, section) != getattr(found, section, None)
    ]
    if differing:
        raise ConfigError(
            f"{run.folder}: this run was made with another {', '.join(f'[{section}]' for section in differing)} than is "
            "declared now; choose another output_dir, or delete the folder to run it again"
        )
