"""Draws runs side by side: as one HTML page, or as a picture.

    switchtitan report outputs/RUN [outputs/RUN ...] --output report.html
    switchtitan report outputs/RUN [outputs/RUN ...] --output curves.png
    switchtitan report outputs/RUN [outputs/RUN ...] --spectrum --output spectra.png

The page has results, curves, and the keys of the configurations that differ. It needs no server and
no network. `--spectrum` draws singular values and ranks of the change of the runs' weights since
step 0, which are drawn again from the seed or read from [checkpoint] initial_weights, of each run's
newest checkpoint; curves have the ranks that [spectrum] interval has measured."""

import argparse
from pathlib import Path

from switchtitan.cli.main import number
from switchtitan.errors import ConfigError
from switchtitan.observability.tensorboard import read_curves
from switchtitan.workbench.report.page import Pictures, curve_panels, draw, draw_spectra, write_page

_FORMATS = (".html", ".png", ".svg", ".pdf")
_output = number(Path, lambda file: file.suffix in _FORMATS, f"a file {', '.join(_FORMATS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output folder")
    output = "a page (.html), or a picture (.png, .svg, .pdf); default: report.html"
    parser.add_argument("--output", type=_output, default="report.html", help=output)
    rank = "the rank of the weights' change: on the page next to the curves, else in their place"
    parser.add_argument("--spectrum", action="store_true", help=rank)


def run(options: argparse.Namespace) -> dict[str, str]:
    """Writes the page or the picture, by the extension of `--output`. Raises a ConfigError if a
    folder is not a run's, or the file cannot be written."""
    output: Path = options.output
    is_page = output.suffix == ".html"
    labels = [run.resolve().name for run in options.runs]
    if len(set(labels)) < len(labels):
        labels = [str(run) for run in options.runs]
    runs = dict(zip(labels, options.runs, strict=True))
    pictures: Pictures = {}
    if is_page or not options.spectrum:
        curves = {label: read_curves(folder) for label, folder in runs.items()}
        pictures["Curves"] = draw(curve_panels(curves)), None
    if options.spectrum:
        pictures["Change of the weights"] = draw_spectra(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if is_page:
            write_page(runs, pictures, output)
        else:
            ((figure, table),) = pictures.values()
            figure.savefig(output, dpi=120)
            if table is not None:
                print(table.to_string())
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error
    print(output)
    return {"output": str(output)}
