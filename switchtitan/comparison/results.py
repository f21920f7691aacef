"""The results of finished runs."""

import json
import math
from dataclasses import dataclass
from typing import Any

from switchtitan.comparison.plan import Run
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.observability import RESULTS_FILE
from switchtitan.training.description import CONFIG_FILE


@dataclass(frozen=True)
class RunResult:
    """The results of a run. Losses are inf if it diverged."""

    run: Run
    validation_loss: float
    test_loss: float
    figures: dict[str, Any]
    """The contents of the run's `results.json`."""

    @property
    def has_diverged(self) -> bool:
        """Whether its gradients or its loss are not finite."""
        return not math.isfinite(self.test_loss)


def read_result(run: Run) -> RunResult | None:
    """Returns the result of a run, None if it is not finished.

    Raises:
        ConfigError: if the folder contains a run with another configuration.
    """
    if not (run.folder / CONFIG_FILE).exists():
        return None
    config = run.config()
    _check_same(run, config)
    file = run.folder / RESULTS_FILE
    if not file.exists():
        return None
    figures = json.loads(file.read_text(encoding="utf-8"))
    if figures.get("diverged"):
        return RunResult(run, math.inf, math.inf, figures)
    if figures["step"] != config.training.steps:
        return None
    return RunResult(
        run, _or_inf(figures["loss/validation"]), _or_inf(figures["loss/test"]), figures
    )


def _or_inf(loss: float) -> float:
    """Replaces nan by inf, which is worse than any loss."""
    return math.inf if math.isnan(loss) else loss


def _check_same(run: Run, expected: JobConfig) -> None:
    found = parse_arguments(["--config", str(run.folder / CONFIG_FILE)], num_ranks=1)
    differing = [
        section
        for section in type(expected).model_fields
        if getattr(expected, section) != getattr(found, section, None)
    ]
    if differing:
        raise ConfigError(
            f"{run.folder}: this run has another "
            f"{', '.join(f'[{section}]' for section in differing)} than the comparison; "
            "choose another output_dir, or delete the folder to train it again"
        )
