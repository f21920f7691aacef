"""Measures the cost of training, for several configurations side by side.

    switchtitan benchmark step CONFIG ... [--rounds N] [--steps-per-round K] [--KEY VALUE ...]
    switchtitan benchmark communication CONFIG ... --num-ranks N [--step S] [--KEY VALUE ...]
    switchtitan benchmark layer [--model-size SIZE | --shape OUTxIN ...] [--rank R ...]
        [--tokens T ...] [--compile]
    switchtitan benchmark loader | checkpoint | startup CONFIG [--KEY VALUE ...]
    switchtitan benchmark switch CONFIG ... [--rounds N] [--steps-per-round K] [--KEY VALUE ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. KEY is a `section.key` and overrides all sides. Prints a
table, and the same as JSON: as the last line, or to --json FILE. `switchtitan.benchmark.commands`
lists the subcommands."""

import argparse
from collections.abc import Sequence

from switchtitan.benchmark.commands import COMMANDS, Command, Measurement, Overrides
from switchtitan.benchmark.sides import split_overrides
from switchtitan.cli.record import add_json_option, check_json_option, put_record
from switchtitan.distributed.launcher import rank_from_launcher
from switchtitan.errors import ConfigError, UserError, exit_for


def main(argv: Sequence[str]) -> None:
    """Runs the chosen benchmark."""
    try:
        is_main = rank_from_launcher() == 0
        own, overrides = split_overrides(argv)
        options = read_options(own)
        measurement = measure(options, overrides)
    except UserError as error:
        exit_for(error)
    if not is_main:
        return
    print("\n".join(measurement.table), flush=True)
    put_record("switchtitan benchmark", argv, measurement.record, options.json)


def measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    """Returns the subcommand's measurement.

    Raises:
        UserError: if a configuration is invalid, or keys are given to a subcommand that reads none.
    """
    check_json_option(options.json)
    command: Command = options.command
    if overrides and not command.reads_configs:
        keys = ", ".join(f"--{key}" for key in overrides)
        raise ConfigError(
            f"{keys}: switchtitan benchmark {command.name} reads no configuration; remove these "
            "keys"
        )
    return command.measure(options, overrides)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options; `command` is the subcommand."""
    parser = argparse.ArgumentParser(
        prog="switchtitan benchmark",
        description="Measures the cost of training, for several configurations side by side.",
        epilog="--section.key value overrides a key in all configurations.",
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
