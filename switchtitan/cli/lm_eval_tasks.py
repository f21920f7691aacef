"""Calls the harness, and turns its errors into errors that name the task."""

import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from switchtitan.errors import ConfigError, UserError

_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable without which the package evaluate does not run a model's code."""


class Questions(NamedTuple):
    """What the harness asks."""

    tasks: list[str]
    include_path: Path | None
    """A folder with YAML files of further tasks."""
    num_fewshot: int | None
    """Examples before each question; None for what the task says."""
    limit: int | None
    """The most questions of each task."""
    runs_unsafe_code: bool
    """Whether tasks may run code that the model writes."""


def ask(model: Any, questions: Questions) -> dict[str, Any]:
    """Calls the harness; returns its results.

    Raises:
        ConfigError: if a task is not known, or the harness cannot run it.
    """
    from lm_eval.evaluator import simple_evaluate

    manager = _task_manager(questions)
    if questions.runs_unsafe_code:
        os.environ[_ALLOW_CODE] = "1"
    names = ",".join(questions.tasks)
    try:
        found: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=questions.tasks,
            num_fewshot=questions.num_fewshot,
            limit=questions.limit,
            task_manager=manager,
            log_samples=False,
            confirm_run_unsafe_code=questions.runs_unsafe_code,
        )
    except UserError:
        raise
    # Of `datasets` and the hub's client: files that are missing, and connections that fail.
    except OSError as error:
        raise ConfigError(
            f"--tasks {names}: the data of a task cannot be read ({_one_line(error)}); download it "
            "once where the hub can be reached, or name a task of local files"
        ) from error
    # A task is code of others: templates, functions and metrics raise errors of all kinds.
    except Exception as error:
        if _is_of_the_model(error):
            raise
        what = f"{type(error).__name__}: {_one_line(error)}"
        is_unsafe = "unsafe" in what or _ALLOW_CODE in what
        if is_unsafe and not questions.runs_unsafe_code:
            raise ConfigError(
                f"--tasks {names}: a task runs code that the model writes ({what}); pass "
                "--confirm-run-unsafe-code to allow that, best in a container"
            ) from error
        raise ConfigError(
            f"--tasks {names}: the harness cannot run a task ({what}); fix the task, or leave it "
            "out"
        ) from error
    return found


def _task_manager(questions: Questions) -> Any:
    """Returns the harness's list of tasks, which has all that are asked."""
    from lm_eval.tasks import TaskManager

    folder = questions.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"--include-path {folder}: no such folder; expected one with the YAML files of tasks"
        )
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in questions.tasks if not manager.match_tasks([task])]
    if unknown:
        # The harness leaves out files that it cannot read.
        damaged = [] if folder is None else list(_damaged_files(folder))
        raise ConfigError(
            f"--tasks {','.join(unknown)}: the harness has no such task; "
            + (
                f"fix {damaged[0]}"
                if damaged
                else "`lm-eval ls tasks` lists all, and --include-path FOLDER adds your own"
            )
        )
    return manager


def _damaged_files(folder: Path) -> Iterator[str]:
    """Yields the files that are no YAML, and why."""
    import yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            # Without building objects, so that tags such as !function are of no matter.
            for _ in yaml.parse(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader):
                pass
        except (OSError, ValueError, yaml.YAMLError) as error:
            yield f"{file} ({_one_line(error)})"


def _is_of_the_model(error: Exception) -> bool:
    """Whether the model raised the error, when the harness called it: that is no task's mistake."""
    frames = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(name.startswith("switchtitan.builders") for name in frames)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
