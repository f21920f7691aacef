"""What a subcommand of `switchtitan benchmark` consists of."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from switchtitan.config.command_line import positive_int

Overrides = dict[str, list[str]]
"""`--section.key value ...` of the command line: dotted key -> words of its value."""


@dataclass(frozen=True)
class Measurement:
    """What a subcommand has found."""

    table: list[str]
    """Lines for people."""
    record: dict[str, JsonValue]
    """The same for programs; hardware, versions and command are added to it."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, its arguments and what it does."""

    name: str
    summary: str
    """One line for the list of subcommands."""
    description: str
    """What the subcommand's own help begins with."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Overrides], Measurement]
    """May raise `UserError`; every rank that a launcher started calls it alike."""
    reads_configs: bool = True
    """Whether `--section.key value` has an effect; where it has none, it is an error."""


def add_configs(parser: argparse.ArgumentParser) -> None:
    """The configurations to put side by side, for `sides.load_sides`."""
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="FILE or FILE:section.key=value,section.key=value",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The one configuration to measure, for `sides.load_sides`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="FILE or FILE:section.key=value,section.key=value"
    )


def add_rounds(
    parser: argparse.ArgumentParser,
    *,
    rounds: int,
    per_round: int,
    unit: str,
    meaning: str | None = None,
) -> None:
    """How long to measure: `--rounds` and `--<unit>-per-round`.

    Args:
        rounds, per_round: defaults.
        unit: what is timed, in the plural: "calls" or "steps".
        meaning: what one of them does, in the plural, where `unit` does not say it.
    """
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=rounds,
        help=f"how often each side has its turn; an even number is fair to all (default: {rounds})",
    )
    parser.add_argument(
        f"--{unit}-per-round",
        type=positive_int,
        default=per_round,
        help=f"{meaning or unit} that a turn consists of (default: {per_round})",
    )
