"""Measures the geometry of runs' dense weights (after arXiv 2605.13652).

    switchtitan geometry outputs/RUN [outputs/RUN ...] [--against outputs/OTHER]

Ranks and gaps of every linear layer's weight and of its updates between checkpoints, sharpness of
the loss, barriers between checkpoints, and, with --against, the similarity of activations. The
run needs several checkpoints: [checkpoint] interval and keep_latest say which it keeps."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from switchtitan.cli.plot_run import labelled
from switchtitan.cli.record import check_json_option, write_json
from switchtitan.config.command_line import positive_int
from switchtitan.errors import ConfigError, UserError, exit_for, exit_for_interrupt
from switchtitan.geometry.measure import (
    DEFAULT_NUM_PRINCIPAL,
    FORWARD_PARTS,
    PARTS,
    Options,
    measure,
    prepare,
)
from switchtitan.geometry.plots import draw
from switchtitan.geometry.report import as_json, tables
from switchtitan.geometry.runs import open_run
from switchtitan.observability.pictures import check_picture_option, write_picture

PARTS_OF = {
    "layers": ("weights", "updates"),
    "tokens": FORWARD_PARTS,
    "random": ("sharpness",),
    "principal": ("sharpness",),
    "offsets": ("sharpness",),
    "seed": ("sharpness",),
    "points": ("barriers",),
    "against": ("barriers", "activations"),
}
"""Option -> the parts that it affects."""


def main(argv: Sequence[str]) -> None:
    """Measures the given runs and prints tables."""
    given = read_options(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_json_option(given.json)
        check_picture_option(given.output)
        options = options_of(given)
        runs = [open_run(label, path, given.steps) for label, path in labelled(given.runs).items()]
        other = None
        if given.against is not None:
            _check_other(given.runs, given.against)
            other = open_run("against", given.against, given.steps)
        # A list: all mistakes in all runs before hours of measuring.
        prepared = [prepare(run, other, options) for run in runs]
        measured = [measure(of_run) for of_run in prepared]
        if given.json is not None:  # first: it has all numbers
            record = as_json(measured, options)
            write_json(given.json, {"against": given.against and str(given.against), **record})
        if given.json != Path("-"):
            print(tables(measured))
        if given.output is not None:
            write_picture(draw(measured), given.output)
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt as stop:
        exit_for_interrupt(stop, "\nstopped; nothing was written")


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan geometry",
        description="Measures ranks, sharpness, barriers and activations of runs' checkpoints.",
        epilog="parts: " + "; ".join(f"{part}: {what}" for part, what in PARTS.items()),
        allow_abbrev=False,
    )
    defaults = Options(parts=None)
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's output folder, or one of its checkpoints",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="the run to compare each RUN with at the same steps, such as a full-rank one",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        metavar="PART",
        help=f"what to measure: {', '.join(PARTS)} (default: all that the given runs allow)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        nargs="+",
        metavar="STEP",
        help="only the checkpoints of these steps (default: all)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help="kinds of layers (q_proj) or name patterns ('model.layers.3.*'); default: all",
    )
    parser.add_argument(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="tokens of the validation split on which losses and activations are computed "
        f"(default: {defaults.num_tokens})",
    )
    parser.add_argument(
        "--random",
        type=positive_int,
        metavar="N",
        help=f"random directions of sharpness (default: {defaults.num_random})",
    )
    parser.add_argument(
        "--principal",
        type=positive_int,
        metavar="N",
        help="principal directions of sharpness, of at least 3 checkpoints (default: "
        f"{DEFAULT_NUM_PRINCIPAL} if there are 3)",
    )
    parser.add_argument(
        "--offsets",
        type=_positive,
        nargs="+",
        metavar="SHARE",
        help="how far to move the weights, as shares of their norm (default: "
        f"{' '.join(map(str, defaults.offsets))})",
    )
    parser.add_argument(
        "--points",
        type=positive_int,
        metavar="N",
        help=f"points between two checkpoints of a barrier (default: {defaults.num_points})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"of the random directions (default: {defaults.seed})",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write all numbers, by layer and block, to FILE; - prints them instead",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also draw a picture; the extension selects the format (png, svg, pdf)",
    )
    options = parser.parse_args(argv)
    for option, parts in PARTS_OF.items():
        if getattr(options, option) is None or options.parts is None:
            continue
        if not set(parts) & set(options.parts):
            parser.error(
                f"--{option} has no effect with --parts {' '.join(options.parts)}; leave it out, "
                f"or add {' or '.join(parts)}"
            )
    return options


def options_of(given: argparse.Namespace) -> Options:
    """Returns what to measure, with the defaults of `Options`."""
    chosen = {
        "layers": given.layers and tuple(given.layers),
        "num_tokens": given.tokens,
        "num_random": given.random,
        "num_principal": given.principal,
        "offsets": given.offsets and tuple(given.offsets),
        "num_points": given.points,
        "seed": given.seed,
    }
    parts = None if given.parts is None else tuple(dict.fromkeys(given.parts))
    return Options(parts, **{key: value for key, value in chosen.items() if value is not None})


def _check_other(runs: Sequence[Path], other: Path) -> None:
    for run in runs:
        if run.resolve() == other.resolve():
            raise ConfigError(f"--against {other}: is the run itself; choose another run")


def _positive(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{word}: expected a number above 0")
    return number
