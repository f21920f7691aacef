"""Where the results of the harness go: a file next to the weights, TensorBoard and a table."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from switchtitan.builders.trained_model import TrainedModel
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.errors import OutputError
from switchtitan.files import write_atomically
from switchtitan.observability import TENSORBOARD_FOLDER

RESULTS_FOLDER = "lm_eval"


class Place(NamedTuple):
    """Where results go."""

    file: Path
    tensorboard: Path | None
    """A folder of event files; None for weights that are of no run."""
    step: int | None


def place_of(trained: TrainedModel) -> Place:
    """Returns where the results of a model go."""
    source = trained.source.resolve()
    if trained.metadata is None:
        folder = source if source.is_dir() else source.parent
        return Place(folder / RESULTS_FOLDER / "results.json", None, None)
    is_in_run = source.parent.name == CHECKPOINTS_FOLDER
    run = source.parent.parent if is_in_run else source.parent
    # A folder of its own: TensorBoard reads the newest file of a folder, and a run may be writing.
    tensorboard = run / TENSORBOARD_FOLDER / RESULTS_FOLDER if is_in_run else None
    return Place(run / RESULTS_FOLDER / f"{source.name}.json", tensorboard, trained.metadata.step)


def earlier_tasks(file: Path) -> dict[str, Any]:
    """Returns the tasks in a results file, which is written again with further ones."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return earlier if isinstance(earlier, dict) else {}


def write_results(place: Place, result: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    try:
        place.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place.file, json.dumps(result, indent=2) + "\n")
        if place.tensorboard is not None:
            _write_tensorboard(place.tensorboard, place.step or 0, tasks)
    except OSError as error:
        raise OutputError(
            f"{place.file.parent}: the results cannot be written ({error}); free space or change "
            "its permissions, and run again"
        ) from error


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


def print_table(result: dict[str, Any]) -> None:
    rows = _rows(result["tasks"])
    width = max((len(task) for task, *_ in rows), default=4)
    for task, metric, value, error in rows:
        spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
        print(f"{task:<{width}}  {metric:<16} {value:.4f}{spread}")
    print(f"{'results':<{width}}  {result['file']}")
