"""Where the results of the harness go: a file next to the weights, TensorBoard and a table."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.errors import OutputError
from switchtitan.files import write_atomically
from switchtitan.generation.trained import TrainedModel
from switchtitan.hub.initial_weights import fingerprint
from switchtitan.observability import TENSORBOARD_FOLDER

RESULTS_FOLDER = "lm_eval"
_FINGERPRINT = "fingerprint"
_NUM_DIGITS = 8
"""Of a fingerprint, in the name of a file."""


class Place(NamedTuple):
    """Where results go."""

    file: Path
    """It has no results of other weights."""
    tensorboard: Path | None
    """A folder of event files; None for weights that are of no run."""
    step: int | None
    fingerprint: str
    """Of the weights."""


def place_of(trained: TrainedModel, folder: Path | None) -> Place:
    """Returns where the results of a model go.

    Args:
        folder: of the results, without TensorBoard; None for one next to the weights.
    """
    source = trained.source.resolve()
    is_in_run = trained.metadata is not None and source.parent.name == CHECKPOINTS_FOLDER
    if is_in_run:
        home = source.parent.parent
    else:
        home = source if trained.metadata is None and source.is_dir() else source.parent
    step = None if trained.metadata is None else trained.metadata.step
    name = "results" if trained.metadata is None else source.name
    own = fingerprint(source)
    file = (folder or home / RESULTS_FOLDER) / f"{name}.json"
    if file.exists() and _read(file).get(_FINGERPRINT) != own:
        # Results of other or unknown weights: they stay as they are.
        file = file.with_stem(f"{name}-{own[:_NUM_DIGITS]}")
    # A folder of its own: TensorBoard reads the newest file of a folder, and a run may be writing.
    events = home / TENSORBOARD_FOLDER / RESULTS_FOLDER
    return Place(file, events if is_in_run and folder is None else None, step, own)


def check_place(place: Place) -> None:
    """Creates the folders of the results and writes to them, before hours of work.

    Raises:
        OutputError: if that fails.
    """
    for folder in (place.file.parent, place.tensorboard):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OutputError(
                f"{folder}: the results cannot be written there ({error}); pass --folder FOLDER, "
                "or change its permissions"
            ) from error


def write_results(place: Place, weights: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Writes tasks to the file of results, which keeps those of earlier calls, and to TensorBoard.

    Raises:
        OutputError: if a file cannot be written.
    """
    result = {
        "weights": str(weights),
        _FINGERPRINT: place.fingerprint,
        "step": place.step,
        "tasks": _read(place.file).get("tasks", {}) | tasks,
    }
    try:
        write_atomically(place.file, json.dumps(result, indent=2) + "\n")
        if place.tensorboard is not None:
            _write_tensorboard(place.tensorboard, place.step or 0, tasks)
    except OSError as error:
        raise OutputError(
            f"{place.file.parent}: the results cannot be written ({error}); free space or change "
            "its permissions, and run again"
        ) from error


def print_table(tasks: dict[str, dict[str, Any]]) -> None:
    """Prints task, metric, value and standard error."""
    rows = _rows(tasks)
    width = max((len(task) for task, *_ in rows), default=4)
    for task, metric, value, error in rows:
        spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
        print(f"{task:<{width}}  {metric:<16} {value:.4f}{spread}", flush=True)


def _read(file: Path) -> dict[str, Any]:
    """Returns the contents of a file of results; empty if it cannot be read."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_known = isinstance(contents, dict) and isinstance(contents.get("tasks"), dict)
    return contents if is_known else {}


def _write_tensorboard(folder: Path, step: int, tasks: dict[str, dict[str, Any]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for task, metric, value, _ in _rows(tasks):
            writer.add_scalar(f"lm_eval/{task}/{metric}", value, step)


def _rows(tasks: dict[str, dict[str, Any]]) -> list[tuple[str, str, float, object]]:
    """Returns task, metric, value and standard error, for all metrics.

    The harness calls them "acc,none" and "acc_stderr,none": the second word is a filter of answers.
    """
    rows = []
    for task, values in tasks.items():
        for key, value in values.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = metric if answers == "none" else f"{metric} ({answers})"
            rows.append((task, name, float(value), values.get(f"{metric}_stderr,{answers}")))
    return rows
