"""Measures what training costs, several configurations or ways side by side.

    switchtitan benchmark step CONFIG CONFIG ... [--rounds N] [--steps-per-round K] [--section.key value ...]
    switchtitan benchmark communication CONFIG ... --num-ranks N [--step S] [--section.key value ...]
    switchtitan benchmark layer [--model-size SIZE | --shape OUTxIN ...] [--rank R ...] [--tokens T ...] [--compile]
    switchtitan benchmark optimizer | loader | checkpoint | startup CONFIG [--section.key value ...]
    switchtitan benchmark switch CONFIG ... [--rounds N] [--steps-per-round K] [--section.key value ...]

CONFIG is a file, or a file and what is different on this side: `FILE:section.key=value,section.key=value`. Further keys go
over all of them. Prints a table, and the same as JSON: as the last line, or to --json FILE. The subcommands are those of
`switchtitan.benchmark.commands`.
"""

import argparse
import os
from collections.abc import Sequence

from switchtitan.benchmark.commands import COMMANDS, Command, Measurement, Overrides
from switchtitan.benchmark.sides import split_overrides
from switchtitan.cli.record import add_json_option, check_json_option, put_record
from switchtitan.errors import ConfigError, UserError, exit_for


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for."""
    try:
        own, overrides = split_overrides(argv)
        options = read_options(own)
        measurement = measure(options, overrides)
    except UserError as error:
        exit_for(error)
    # Of several ranks that a launcher started, the first one speaks.
    if os.environ.get("RANK", "0") != "0":
        return
    print("\n".join(measurement.table), flush=True)
    put_record(" ".join(["switchtitan benchmark", *argv]), measurement.record, options.json)


def measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    """What the subcommand finds.

    Raises:
        UserError: if a configuration is wrong, or keys of one are given where none is read.
    """
    check_json_option(options.json)
    command: Command = options.command
    if overrides and not command.reads_configs:
        keys = ", ".join(f"--{key}" for key in overrides)
        raise ConfigError(
            f"{keys}: switchtitan benchmark {command.name} reads no configuration; leave it out"
        )
    return command.measure(options, overrides)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The program's own words, and as `command` the subcommand."""
    parser = argparse.ArgumentParser(
        prog="switchtitan benchmark",
        description="Measures what training costs, several configurations or ways side by side.",
        epilog="--section.key value overrides a key of all configurations, as in training.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(
        required=True, metavar=" | ".join(command.name for command in COMMANDS)
    )
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.description, allow_abbrev=False
        )
        command.add_arguments(subparser)
        add_json_option(subparser)
        subparser.set_defaults(command=command)
    return parser.parse_args(argv)
