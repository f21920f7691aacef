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
from typing import Any, NamedTuple

import torch

from switchtitan.cli.lm_eval_results import (
    Place,
    check_place,
    place_of,
    print_table,
    write_results,
)
from switchtitan.cli.lm_eval_tasks import Questions, ask
from switchtitan.cli.record import check_json_option, write_json
from switchtitan.cli.target import add_target_options
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.world import device_type
from switchtitan.errors import (
    EnvironmentMismatchError,
    UserError,
    exit_for,
    exit_for_interrupt,
)
from switchtitan.generation.saved_config import load_for_evaluation
from switchtitan.generation.trained import (
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)
from switchtitan.training.describe import compute_dtype_of

_DEFAULT_LENGTH = 2048
"""Tokens of the longest sequence, of a model that does not say it."""


def main(argv: Sequence[str]) -> None:
    """Runs the tasks, writes their results and prints a table."""
    options = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_package()
        check_json_option(options.json)
        put_results(run_tasks(options), options.json)
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "\nstopped; nothing was written")


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
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="FOLDER",
        help="where results go, without TensorBoard (default: `lm_eval` in the run's folder or "
        "next to the weights)",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        "--confirm_run_unsafe_code",
        action="store_true",
        help="allow tasks that run code written by the model, such as humaneval",
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


class Results(NamedTuple):
    """What the harness found."""

    place: Place
    """Where it is to be written."""
    weights: Path
    tasks: dict[str, dict[str, Any]]
    """Metrics and settings by task."""

    def as_record(self) -> dict[str, Any]:
        """Returns the contents of `--json FILE`."""
        return {
            "weights": str(self.weights),
            "fingerprint": self.place.fingerprint,
            "step": self.place.step,
            "tasks": self.tasks,
            "file": str(self.place.file),
        }


def run_tasks(options: argparse.Namespace) -> Results:
    """Runs the tasks; returns their results and where they are to be written.

    Raises:
        UserError: if the model or a task cannot be read, or results could not be written.
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
    place = place_of(trained, options.folder)
    check_place(place)

    from switchtitan.generation.harness_model import HarnessModel

    found = ask(
        HarnessModel(
            trained.load(device, compute_dtype.dtype),
            documents,
            stops=stop_tokens(trained, documents),
            max_length=trained.max_positions or _DEFAULT_LENGTH,
            batch_size=options.batch_size,
            device=device,
        ),
        Questions(
            options.tasks,
            options.include_path,
            options.num_fewshot,
            options.limit,
            options.confirm_run_unsafe_code,
        ),
    )
    settings = {
        "limit": options.limit,
        "compute_dtype": compute_dtype.name,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
    }
    # Of a part of the questions, which must not replace the result of all.
    suffix = "" if options.limit is None else f"-limit-{options.limit}"
    tasks = {
        task + suffix: {
            **metrics,
            "version": found.get("versions", {}).get(task),
            "num_fewshot": found.get("n-shot", {}).get(task),
            **settings,
        }
        for task, metrics in found["results"].items()
    }
    return Results(place, trained.source, tasks)


def put_results(results: Results, json_file: Path | None) -> None:
    """Prints the results, and writes them to `--json FILE` and to their place.

    Raises:
        UserError: if a file cannot be written. The others are.
    """
    is_table = json_file != Path("-")
    if is_table:
        print_table(results.tasks)
    try:
        if json_file is not None:
            write_json(json_file, results.as_record())
    finally:
        write_results(results.place, results.weights, results.tasks)
    if is_table:
        print(f"results: {results.place.file}")


def _names(word: str) -> list[str]:
    names = [name for name in word.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{word!r}: expected names of tasks, joined by commas")
    return names


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word}: expected an integer >= 0")
    return int(word)
