"""Draws runs side by side: their curves as a picture, or a report as one HTML page.

    switchtitan report outputs/RUN [outputs/RUN ...] --output report.html
    switchtitan report outputs/RUN [outputs/RUN ...] --output curves.png

The page has results, curves, and the keys of the configurations that differ. It needs no server and
no network."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.observability.pictures import check_picture_option, write_picture
from switchtitan.report.curves import draw_curves
from switchtitan.report.page import read_run, write_page


def main(argv: Sequence[str]) -> None:
    """Writes the page or the picture."""
    options = read_options(argv)
    try:
        write(options.runs, options.output)
    except UserError as error:
        exit_for(error)
    print(options.output)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="switchtitan report",
        description="Draws runs side by side: curves as a picture, or a report as one HTML page.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output folder")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="a page (.html), or a picture of the curves (.png, .svg, .pdf); default: report.html",
    )
    return parser.parse_args(argv)


def write(folders: Sequence[Path], output: Path) -> None:
    """Writes the page or the picture, by the extension of `output`.

    Raises:
        ConfigError: if a folder is not a run's, or the file cannot be written.
    """
    is_page = output.suffix == ".html"
    if not is_page:
        check_picture_option(output)
    runs = {label: read_run(folder) for label, folder in labelled(folders).items()}
    curves = draw_curves({label: run.curves for label, run in runs.items()})
    if not is_page:
        write_picture(curves, output)
        return
    try:
        write_page(runs, {"Curves": curves}, output)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error


def labelled(runs: Sequence[Path]) -> dict[str, Path]:
    """Returns runs by label: the folder's name if it is unique, otherwise the path as given."""
    names = [run.resolve().name for run in runs]
    return {
        name if names.count(name) == 1 else str(run): run
        for name, run in zip(names, runs, strict=True)
    }
