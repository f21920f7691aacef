"""Runs or resumes declared comparisons of methods and reports the finished runs.

    switchtitan compare train_configs/comparisons/rank_16.toml [FILE ...] --jobs 2

Writes report.md, runs.csv and loss.png to `<output_dir>/reports/<name of the file>`,
and updates them after every run. The same command resumes a stopped or killed comparison. Several
files are run one after the other."""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from switchtitan.cli.main import positive_int
from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.plan import Run, check_corpus, check_plan
from switchtitan.comparison.report import write_report
from switchtitan.comparison.runner import Runner
from switchtitan.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = "a TOML file that declares a comparison"
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=files)
    jobs = "concurrent runs, each on its own GPU or on an equal share of the cores; default: 1"
    parser.add_argument("--jobs", type=positive_int, default=1, help=jobs)
    report_only = "do not train; report the finished runs"
    parser.add_argument("--report-only", action="store_true", help=report_only)


def run(options: argparse.Namespace) -> dict[str, list[str]]:
    """Runs the comparisons one after the other; returns their reports."""
    # Otherwise tensorboard logs every event file that it reads.
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    # Spectra for a report must not compete with the runs for cores.
    torch.set_num_threads(1)
    # All files are checked before the first run of any.
    comparisons = load_all(options.files)
    for folder, config in comparisons.items():
        with _lock(folder):
            if options.report_only:
                comparison = Comparison(config, folder)
            else:
                comparison = Comparison(config, folder, check_corpus(config))
                _train(comparison, Runner(options.jobs))
            write_report(folder, comparison.state())
        print(folder / "report.md", flush=True)
    return {"reports": [str(folder / "report.md") for folder in comparisons]}


def load_all(files: Sequence[Path]) -> dict[Path, ComparisonConfig]:
    """Reads and checks comparisons; returns them by the folder of their reports.

    Raises:
        ConfigError: if one is invalid, or two have the same folder.
    """
    loaded: dict[Path, ComparisonConfig] = {}
    for file in files:
        config = load_comparison(file)
        check_plan(config)
        folder = config.output_dir / "reports" / file.stem
        if folder in loaded:
            raise ConfigError(
                f"{file}: another of these files has the same name and output_dir, so both would "
                f"report to {folder}; rename one"
            )
        loaded[folder] = config
    return loaded


def _lock(folder: Path) -> AbstractContextManager[object]:
    """Locks a report's folder until the context ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "lock").acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"{folder}: another process is running this comparison; wait for it, or stop it"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: cannot be written: {error.strerror}") from error


def _train(comparison: Comparison, runner: Runner) -> None:
    """Trains the remaining runs, with a progress bar, and reports after each one."""
    # None: no bar unless standard error is a terminal.
    with logging_redirect_tqdm(), tqdm(unit="run", dynamic_ncols=True, disable=None) as bar:

        def show() -> None:
            state = comparison.state()
            bar.total = state.num_runs
            bar.update(state.num_finished - bar.n)

        def note(run: Run) -> None:
            show()
            bar.set_postfix_str(f"{run.name} finished")
            if bar.disable:
                print(f"{run.name} finished", file=sys.stderr, flush=True)
            write_report(comparison.folder, comparison.state())

        show()
        # Speed and remaining time count only the runs of this call.
        bar.unpause()
        bar.initial = bar.n
        comparison.run(lambda runs: runner.run_all(runs, comparison.is_finished, note))
