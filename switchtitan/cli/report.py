"""Writes a report of runs, or of a comparison, as one HTML file.

    switchtitan report outputs/RUN [outputs/RUN ...] --output report.html
    switchtitan report outputs/COMPARISON/reports/NAME

The file needs no server and no network. The report says what a run does not have yet, and what is
damaged. An existing file is replaced only if it is a report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from switchtitan.cli.plot_run import labelled
from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.report.comparison_files import find_comparison, read_comparison
from switchtitan.report.comparison_report import comparison_report
from switchtitan.report.page import check_output, render, write_report
from switchtitan.report.run_files import read_run
from switchtitan.report.run_report import Contents, run_report


def main(argv: Sequence[str]) -> None:
    """Writes the report that the command line asks for."""
    options = read_options(argv)
    try:
        check_output(options.output)
        write_report(render(contents_of(options.runs)), options.output)
    except UserError as error:
        exit_for(error)
    print(options.output)


def contents_of(folders: Sequence[Path]) -> Contents:
    """Returns the contents of a report of runs, or of one comparison.

    Raises:
        ConfigError: if a folder is neither, or a comparison's is not the only one.
    """
    comparison = next((found for folder in folders if (found := find_comparison(folder))), None)
    if comparison is None:
        runs = {label: read_run(run) for label, run in labelled(folders).items()}
        return run_report(runs)
    if len(folders) > 1:
        raise ConfigError(
            f"{comparison} holds a comparison, which has a report of its own; give it alone, or "
            "folders of runs only"
        )
    return comparison_report(read_comparison(comparison))


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan report",
        description="Writes a report of runs, or of a comparison, as one HTML file.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's output folder, or the folder of one comparison's report",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the file; replaced only if it is a report; default: report.html",
    )
    return parser.parse_args(argv)
