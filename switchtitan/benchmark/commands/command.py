"""The interface of a subcommand of `switchtitan benchmark`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from pydantic import JsonValue

from switchtitan.config.command_line import positive_int
from switchtitan.distributed.dtype import DtypeKey

Overrides = dict[str, list[str]]
"""`--section.key value ...` of the command line: dotted key -> arguments of its value."""


@dataclass(frozen=True)
class Measurement:
    """The result of a subcommand."""

    table: list[str]
    """Lines to print."""
    record: dict[str, JsonValue]
    """The same for JSON; the caller adds hardware, versions and command."""


@dataclass(frozen=True)
class Command:
    """A subcommand: name, help, arguments and function."""

    name: str
    summary: str
    """One line for the list of subcommands."""
    description: str
    """First paragraph of the subcommand's help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Overrides], Measurement]
    """May raise `UserError`; collective over the launcher's ranks."""
    reads_configs: bool = True
    """Whether `--section.key value` has an effect; if not, it is an error."""


def add_configs(parser: argparse.ArgumentParser) -> None:
    """Adds the configurations to compare, for `sides.load_sides`."""
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="FILE or FILE:section.key=value,section.key=value",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds one configuration to measure, for `sides.load_sides`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="FILE or FILE:section.key=value,section.key=value"
    )


def add_dtype(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=get_args(DtypeKey),
        default="auto",
        help=f"dtype of {meaning}; auto is bfloat16 if the device multiplies it natively, else "
        "float32 (default: auto)",
    )


def add_rounds(
    parser: argparse.ArgumentParser,
    *,
    rounds: int,
    per_round: int,
    unit: str,
    meaning: str | None = None,
) -> None:
    """Adds `--rounds` and `--<unit>-per-round`.

    Args:
        rounds, per_round: defaults.
        unit: timed unit in the plural: "calls" or "steps".
        meaning: plural noun for the help, if `unit` is unclear.
    """
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=rounds,
        help=f"turns of each side; an even number is fair (default: {rounds})",
    )
    parser.add_argument(
        f"--{unit}-per-round",
        type=positive_int,
        default=per_round,
        help=f"{meaning or unit} per turn (default: {per_round})",
    )
