"""What a measurement found, as JSON."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.observability.environment import describe_environment


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option `--json FILE`, for `put_record`."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the JSON there instead of printing it as the last line",
    )


def check_json_option(file: Path | None) -> None:
    """Check, before hours of measuring, that `--json FILE` can be written.

    Raises:
        ConfigError: if its folder does not exist.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: there is no folder {file.absolute().parent}; create it")


def put_record(command: str, found: Mapping[str, object], file: Path | None) -> None:
    """Write command, environment and what was found to `file`, or print them as one line of JSON."""
    record = {"command": command, "environment": describe_environment(), **found}
    if file is None:
        print(json.dumps(record), flush=True)
    else:
        write_atomically(file, json.dumps(record, indent=1) + "\n")
