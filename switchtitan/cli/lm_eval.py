"""Runs tasks of EleutherAI's lm-evaluation-harness on a trained model.

    switchtitan lm-eval TARGET --tasks hellaswag,lambada_openai
    switchtitan lm-eval TARGET --tasks mine --include-path FOLDER

Results of a run's checkpoint go to `lm_eval/` in the run's folder and into its TensorBoard; those
of other weights to `lm_eval/` next to the weights. Needs the package lm-eval."""

import argparse
import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from switchtitan.builders.saved_config import load_for_evaluation
from switchtitan.builders.trained_model import (
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)
from switchtitan.cli.lm_eval_results import (
    earlier_tasks,
    place_of,
    print_table,
    write_results,
)
from switchtitan.cli.record import check_json_option, write_json
from switchtitan.cli.target import add_target_options
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.compute_dtype import dtype_on
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.world import device_type
from switchtitan.errors import (
    ConfigError,
    EnvironmentMismatchError,
    UserError,
    exit_for,
)
from switchtitan.training.description import compute_dtype_of

_DEFAULT_LENGTH = 2048
"""Tokens of the longest sequence, of a model that does not say it."""


def main(argv: Sequence[str]) -> None:
    """Runs the tasks, writes their results and prints a table."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_package()
        check_json_option(options.json)
        result = run_tasks(options)
        if options.json is not None:
            write_json(options.json, result)
    except UserError as error:
        exit_for(error)
    if options.json != Path("-"):
        print_table(result)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan lm-eval",
        description="Runs tasks of the lm-evaluation-harness on a trained model.",
        allow_abbrev=False,
    )
    add_target_options(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        type=_names,
        metavar="A,B",
        help="tasks, groups or tags of the harness; `lm-eval ls tasks` lists them",
    )
    parser.add_argument(
        "--include-path",
        "--include_path",
        type=Path,
        metavar="FOLDER",
        help="a folder with the YAML files of further tasks",
    )
    parser.add_argument(
        "--num-fewshot",
        type=_count,
        metavar="N",
        help="examples before each question (default: as the task says)",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N questions of each task"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="sequences in one pass (default: 8)",
    )
    return parser.parse_args(argv)


def check_package() -> None:
    """Checks that the harness is installed.

    Raises:
        EnvironmentMismatchError: if it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EnvironmentMismatchError(
            "switchtitan lm-eval: the package lm-eval is not installed; run `pip install "
            "'switchtitan[lm-eval]'`"
        )


def run_tasks(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the tasks and writes their results; returns them.

    Raises:
        UserError: if the model or a task cannot be read, or the results cannot be written.
    """
    section = None if options.config is None else load_for_evaluation(options.config).model
    trained = open_trained_model(options.target, section)
    documents = open_tokenizer(trained, options.tokenizer)
    # As transformers does: a task's text may have special tokens, unlike a document.
    documents.tokenizer.encode_special_tokens = False
    device = torch.device(device_type())
    use_full_precision(device.type)
    saved = None if trained.metadata is None else compute_dtype_of(trained.metadata)
    compute_dtype = dtype_on(device, options.dtype, saved)
    place = place_of(trained)

    from switchtitan.builders.harness_model import HarnessModel

    found = _evaluate(
        HarnessModel(
            trained.load(device, compute_dtype.dtype),
            documents,
            stops=stop_tokens(trained, documents),
            max_length=trained.max_positions or _DEFAULT_LENGTH,
            batch_size=options.batch_size,
            device=device,
        ),
        options,
    )
    settings = {
        "limit": options.limit,
        "compute_dtype": compute_dtype.name,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
    }
    tasks = {
        task: {
            **metrics,
            "version": found.get("versions", {}).get(task),
            "num_fewshot": found.get("n-shot", {}).get(task),
            **settings,
        }
        for task, metrics in found["results"].items()
    }
    result = {
        "weights": str(trained.source),
        "step": place.step,
        "tasks": earlier_tasks(place.file) | tasks,
    }
    write_results(place, result, tasks)
    return {**result, "tasks": tasks, "file": str(place.file)}


def _evaluate(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Calls the harness; returns its results."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError(
            f"--include-path {options.include_path}: no such folder; expected one with the YAML "
            "files of tasks"
        )
    included = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=included)
    unknown = [task for task in options.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"--tasks {','.join(unknown)}: the harness has no such task; `lm-eval ls tasks` lists "
            "all, and --include-path FOLDER adds your own"
        )
    try:
        found: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    # Of `datasets` and the hub's client: files that are missing, and connections that fail.
    except OSError as error:
        raise ConfigError(
            f"--tasks {','.join(options.tasks)}: the data of a task cannot be read "
            f"({' '.join(str(error).split())}); download it once where the hub can be reached, or "
            "name a task of local files"
        ) from error
    return found


def _names(word: str) -> list[str]:
    names = [name for name in word.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{word!r}: expected names of tasks, joined by commas")
    return names


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word}: expected an integer >= 0")
    return int(word)
