"""Write a measurement as JSON."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.observability.environment import describe_environment


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--json FILE`, for `put_record`."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the JSON to FILE instead of printing it as the last line",
    )


def check_json_option(file: Path | None) -> None:
    """Checks that `--json FILE` can be a file in its folder, before hours of measuring.

    Raises:
        ConfigError: if its folder does not exist, or it is a folder itself.
    """
    if file is None:
        return
    # Not Path.is_dir, which raises for a name that is too long.
    if not os.path.isdir(file.absolute().parent):
        raise ConfigError(f"--json {file}: no folder {file.absolute().parent}; create it")
    if os.path.isdir(file):
        raise ConfigError(f"--json {file}: is a folder; give a file, e.g. {file}/numbers.json")


def write_json(file: Path, result: Mapping[str, object]) -> None:
    """Writes a command's result to `--json FILE`, or prints it if that is `-`.

    Raises:
        ConfigError: if the file cannot be written.
    """
    text = json.dumps(result, indent=2) + "\n"
    if file == Path("-"):
        print(text, end="", flush=True)
        return
    try:
        write_atomically(file, text)
    except OSError as error:
        raise ConfigError(f"--json {file}: the file cannot be written: {error.strerror}") from error


def put_record(
    program: str, argv: Sequence[str], results: Mapping[str, object], file: Path | None
) -> None:
    """Writes command, environment and results to `file`, or prints them as one line of JSON.

    The command is `program` with `argv`, without `--json FILE`.
    """
    command = " ".join([program, *_without_json_option(argv)])
    record = {"command": command, "environment": describe_environment(), **results}
    if file is None:
        print(json.dumps(record), flush=True)
    else:
        write_atomically(file, json.dumps(record, indent=1) + "\n")


def _without_json_option(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_json_option(parser)
    return parser.parse_known_args(argv)[1]
