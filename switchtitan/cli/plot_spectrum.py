"""Draws the rank of the change of each linear layer's weight since step 0, for runs side by side.

    switchtitan plot spectrum outputs/RUN [outputs/RUN ...] --output spectra.png
    switchtitan plot spectrum --label lora=outputs/A,outputs/B --label full=outputs/C --output FILE

It compares each run's newest checkpoint with the run's initial weights, drawn again from the seed
or read from [checkpoint] initial_weights; the run needs no telemetry. For runs with [spectrum]
interval, it also draws the rank over training."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.observability.pictures import check_picture_option, write_picture
from switchtitan.spectra.plots import draw, measure, table


def main(argv: Sequence[str]) -> None:
    """Draws the given runs and prints a table."""
    options = read_options(argv)
    try:
        check_picture_option(options.output)
        groups = measure(labelled(options.runs, options.label), options.layers)
        if options.json is not None:
            try:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(groups, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--json: the file cannot be written: {error}") from error
        write_picture(draw(groups), options.output)
    except UserError as error:
        exit_for(error)
    print(table(groups))
    print(options.output)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan plot spectrum",
        description="Draws the rank of the weights' change since step 0, for runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="a run's output folder, or one of its checkpoints",
    )
    parser.add_argument(
        "--label",
        type=_labelled_runs,
        action="append",
        default=[],
        metavar="NAME=RUN[,RUN...]",
        help="runs that differ only in their seed, averaged under one name; can be repeated",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="kinds of layers (q_proj) or name patterns ('model.layers.3.*'); default: all",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the picture; the extension selects the format (png, svg, pdf)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args(argv)
    if not options.runs and not options.label:
        parser.error("expected at least one RUN or --label NAME=RUN")
    return options


def labelled(
    runs: Sequence[Path], labels: Sequence[tuple[str, list[Path]]]
) -> dict[str, list[Path]]:
    """Returns all runs by label; default: the folder's name if unique, otherwise the given path.

    Raises:
        ConfigError: if two labels are the same.
    """
    names = [run.resolve().name for run in runs]
    groups = [
        (name if names.count(name) == 1 else str(run), [run])
        for name, run in zip(names, runs, strict=True)
    ]
    groups += labels
    result = dict(groups)
    if len(result) < len(groups):
        raise ConfigError("two runs have the same label; use --label NAME=RUN")
    return result


def _labelled_runs(text: str) -> tuple[str, list[Path]]:
    name, separator, runs = text.partition("=")
    if not name or not separator or not all(runs.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=RUN[,RUN...]")
    return name, list(map(Path, runs.split(",")))
