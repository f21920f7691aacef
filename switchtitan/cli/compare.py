"""Runs a declared comparison of methods, or resumes it, and reports what is finished.

switchtitan compare train_configs/comparisons/rank_16.toml --jobs 2

The report lies in `<output_dir>/reports/<name of the file>`: report.md, results.json, runs.csv and pictures. It is brought up
to date after every run. The same command resumes a comparison that was stopped in any way.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from switchtitan.cli.interrupts import exit_for_interrupt, interrupt_on_sigterm
from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.measure import measure, read_measurements
from switchtitan.comparison.plan import Run, check_corpus, check_plan
from switchtitan.comparison.plots import write_pictures
from switchtitan.comparison.report import write_report
from switchtitan.comparison.runner import Runner
from switchtitan.comparison.table import report_gaps, report_rows
from switchtitan.config.command_line import positive_int
from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.files import try_lock


def main(argv: Sequence[str]) -> None:
    """Carries out what the command line asks for."""
    options = read_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Which event file it reads next is no part of the story.
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    interrupt_on_sigterm()
    # Decompositions for a report must not take the cores of the runs.
    torch.set_num_threads(1)
    try:
        config = load_comparison(options.file)
        check_plan(config)
        folder = config.output_dir / "reports" / options.file.stem
        with try_lock(folder / "lock") as lock:
            if lock is None:
                raise ConfigError(
                    f"{folder}: another process carries out this comparison; wait for it, or end it"
                )
            comparison = Comparison(config)
            if not options.report_only:
                check_corpus(config)
                with logging_redirect_tqdm():
                    train(comparison, Runner(options.jobs), folder, config)
                report(comparison, folder, config)
                measure(config, folder)
            report(comparison, folder, config)
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "interrupted; the same command resumes it")
    print(folder / "report.md")


def train(comparison: Comparison, runner: Runner, folder: Path, config: ComparisonConfig) -> None:
    """Trains all that is left, under a progress bar."""
    with tqdm(unit="run", dynamic_ncols=True) as bar:

        def show() -> None:
            state = comparison.state()
            bar.total = state.num_runs
            bar.update(len(state.selection) + len(state.report) - bar.n)

        def note(run: Run) -> None:
            show()
            bar.set_postfix_str(f"{run.name} finished")
            report(comparison, folder, config)

        show()
        # Speeds and times left are those of this call's runs.
        bar.unpause()
        bar.initial = bar.n
        comparison.run(lambda runs: runner.run_all(runs, comparison.is_finished, note))


def report(comparison: Comparison, folder: Path, config: ComparisonConfig) -> None:
    """Writes tables and pictures of what is finished."""
    state = comparison.state()
    rows = report_rows(state, read_measurements(config, folder))
    write_report(folder, state, rows, report_gaps(state))
    write_pictures(folder, state, rows)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse ends the program with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="switchtitan compare",
        description="Runs a declared comparison of methods.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the TOML file that declares it")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        help="runs at a time; each on a GPU of its own, or on its share of the cores",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; report what is finished"
    )
    return parser.parse_args(argv)
