"""The results of finished runs."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from switchtitan.comparison.plan import Run
from switchtitan.config.section import Section
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.observability import RESULTS_FILE
from switchtitan.training.describe import CONFIG_FILE

_KEYS_OF_A_MACHINE = {"job": {"name", "output_dir"}, "data": {"cache_dir"}}
"""Keys that change no result: names and folders."""
DEFAULTS_VERSION = 1
"""Increase it when the default of a key changes: earlier runs had the default of then."""


@dataclass(frozen=True)
class RunResult:
    """The results of a run. Losses are inf if it diverged."""

    run: Run
    validation_loss: float
    test_loss: float
    figures: dict[str, Any]
    """The contents of the run's `results.json`."""
    config_sha256: str
    """See the function of this name."""
    has_folder: bool = True
    """Whether the run's folder has its curves; False if the result is from a CSV file."""

    @property
    def has_diverged(self) -> bool:
        """Whether its gradients or its loss are not finite."""
        return not math.isfinite(self.test_loss)


def config_sha256(config: JobConfig) -> str:
    """Returns a checksum of a run's configuration, without its name and folders.

    Runs with the same checksum compute the same, on the same corpus and with the same code. It
    covers the keys that differ from their defaults, so that a later version with more keys knows
    the runs of an earlier one.
    """
    contents: dict[str, Any] = {
        section: {
            key: value
            for key, value in values.model_dump(mode="json").items()
            if key not in _KEYS_OF_A_MACHINE.get(section, ()) and _is_set(values, key)
        }
        for section, values in config
    }
    contents["defaults"] = DEFAULTS_VERSION
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _is_set(section: Section, key: str) -> bool:
    """Whether a key differs from its default, or names the section's class."""
    field = type(section).model_fields[key]
    return key == "name" or getattr(section, key) != field.get_default(call_default_factory=True)


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
    if not figures.get("diverged") and figures["step"] != config.training.steps:
        return None
    return result_of(run, figures, config_sha256(config))


def result_of(
    run: Run, figures: dict[str, Any], digest: str, *, has_folder: bool = True
) -> RunResult:
    """Returns the result of a finished run from the contents of its `results.json`.

    Args:
        digest: the checksum of its configuration.
    """
    if figures.get("diverged"):
        return RunResult(run, math.inf, math.inf, figures, digest, has_folder)
    validation_loss, test_loss = figures["loss/validation"], figures["loss/test"]
    return RunResult(run, _or_inf(validation_loss), _or_inf(test_loss), figures, digest, has_folder)


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
