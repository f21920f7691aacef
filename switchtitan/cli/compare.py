"""Runs or resumes a declared comparison of methods and reports the finished runs.

    switchtitan compare train_configs/comparisons/rank_16.toml --jobs 2

Writes report.md and runs.csv to `<output_dir>/reports/<name of the file>`, and updates them after
every run. The same command resumes a stopped or killed comparison."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from switchtitan.cli.main import positive_int
from switchtitan.errors import ConfigError
from switchtitan.workbench.comparison.comparison import Comparison, check_plan, prepare_corpus
from switchtitan.workbench.comparison.config import load_comparison
from switchtitan.workbench.comparison.report import write_report
from switchtitan.workbench.comparison.runner import Environment, environments, train_all
from switchtitan.workbench.comparison.runs import Run

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    file = "a TOML file that declares a comparison"
    parser.add_argument("file", type=Path, metavar="FILE", help=file)
    jobs = "concurrent runs, each on its own GPU or on an equal share of the cores; default: 1"
    parser.add_argument("--jobs", type=positive_int, default=1, help=jobs)
    report_only = "do not train; report the finished runs"
    parser.add_argument("--report-only", action="store_true", help=report_only)


def run(options: argparse.Namespace) -> dict[str, str]:
    """Runs the comparison; returns its report. Raises a ConfigError if it is invalid."""
    # Spectra for a report must not compete with the runs for cores.
    torch.set_num_threads(1)
    config = load_comparison(options.file)
    check_plan(config)
    jobs = environments(options.jobs)
    folder = config.output_dir / "reports" / options.file.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(
            f"{folder}: another process is running this comparison; wait for it, or stop it"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: cannot be written: {error.strerror}") from error
    with lock:
        if options.report_only:
            comparison = Comparison(config, folder)
        else:
            comparison = Comparison(config, folder, prepare_corpus(config))
            _train(comparison, jobs)
        write_report(folder, comparison.state())
    print(folder / "report.md", flush=True)
    return {"report": str(folder / "report.md")}


def _train(comparison: Comparison, jobs: Sequence[Environment]) -> None:
    """Trains the remaining runs, stage by stage, and reports after each one."""
    num_runs = comparison.config.num_runs

    def report(run: Run) -> bool:
        if comparison.result(run) is None:
            return False
        state = comparison.state()
        logger.info("%s is finished, %d of %d runs", run.folder, len(state.finished), num_runs)
        write_report(comparison.folder, state)
        return True

    while due := comparison.state().due:
        logger.info("training %d run(s)", len(due))
        train_all(due, jobs, report)
