"""Says what a training step needs on any number of ranks, without them: memory, bytes sent, floating-point operations.

    switchtitan estimate CONFIG ... --world-size N [--section.key value ...]

CONFIG is a file, or a file and what is different on this side: `FILE:section.key=value,section.key=value`. Further keys go
over all of them. Prints tables, and the same as JSON: as the last line, or to --json FILE.
"""

import argparse
from collections.abc import Sequence

from switchtitan.benchmark.estimate import ASSUMPTIONS, estimate_step
from switchtitan.benchmark.memory_tracker import KINDS
from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.benchmark.tables import (
    communication_table,
    estimate_record,
    flops_table,
    memory_table,
)
from switchtitan.cli.record import add_json_option, check_json_option, put_record
from switchtitan.config.command_line import positive_int
from switchtitan.errors import UserError, exit_for


def main(argv: Sequence[str]) -> None:
    """Estimates what the command line asks for."""
    try:
        own, overrides = split_overrides(argv)
        options = read_options(own)
        check_json_option(options.json)
        configs = load_sides(options.configs, overrides, options.world_size)
        estimates = {
            name: estimate_step(config, options.world_size) for name, config in configs.items()
        }
    except UserError as error:
        exit_for(error)
    communication = {name: estimate.communication for name, estimate in estimates.items()}
    lines = [
        f"memory of each of {options.world_size} ranks in a step, at its peak and the most of each kind at any time",
        *memory_table(estimates),
        *(f"  {kind}: {meaning}" for kind, meaning in KINDS.items()),
        "sent by each rank in a step, in MiB (number of collectives), if carried out in a ring",
        *communication_table(communication),
        "floating-point operations of each rank in a step",
        *flops_table(estimates),
        "assumed:",
        *(f"- {assumption}" for assumption in ASSUMPTIONS),
    ]
    print("\n".join(lines), flush=True)
    record = {
        "world_size": options.world_size,
        "assumptions": list(ASSUMPTIONS),
        "estimates": estimate_record(estimates),
    }
    put_record(" ".join(["switchtitan estimate", *argv]), record, options.json)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The program's own words; argparse ends the program with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="switchtitan estimate",
        description="Says what a training step needs on any number of ranks, without them.",
        epilog="--section.key value overrides a key of all configurations, as in training.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="FILE or FILE:section.key=value,section.key=value",
    )
    parser.add_argument("--world-size", type=positive_int, required=True, help="ranks of the run")
    add_json_option(parser)
    return parser.parse_args(argv)
