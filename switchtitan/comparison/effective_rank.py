"""The effective rank of a run's weight change, computed once, when the run is finished."""

import json
from pathlib import Path

from switchtitan.checkpoint import find_given
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER, step_folder_name
from switchtitan.comparison.results import RunResult
from switchtitan.files import write_atomically
from switchtitan.spectra.spectrum import summarize
from switchtitan.spectra.weight_change import checkpoint_spectra

EFFECTIVE_RANK_FILE = "effective_rank.json"
"""File in a run's folder with the effective rank after its last step."""


def effective_rank(result: RunResult) -> float | None:
    """Returns the effective rank of the linear layers' change since step 0, averaged over layers.

    It is read from the results of a CSV file or from the run's folder, or computed from the run's
    last checkpoint, and kept in the folder. None if the run diverged, or has none of them.
    """
    if result.has_diverged:
        return None
    if not result.has_folder:
        known: float | None = result.figures.get("effective_rank")
        return known
    step = result.figures["step"]
    file = result.run.folder / EFFECTIVE_RANK_FILE
    if (kept := _read(file, step)) is not None:
        return kept
    checkpoint = result.run.folder / CHECKPOINTS_FOLDER / step_folder_name(step)
    if not checkpoint.exists():
        return None
    computed = summarize(checkpoint_spectra(find_given(checkpoint))).effective
    write_atomically(file, json.dumps({"step": step, "effective_rank": computed}) + "\n")
    return computed


def _read(file: Path, step: int) -> float | None:
    """Returns the kept value; None if there is none of this step."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return float(kept["effective_rank"]) if kept["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
