"""Estimates size, memory, communication and operations of a training step on any number of ranks.

    switchtitan estimate CONFIG ... --world-size N [--section.key value ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. Further keys override all sides. Prints tables, and the
same as JSON: as the last line, or to --json FILE. Needs one process only.

    switchtitan estimate CONFIG ... --world-size N --fit 24 80

prints instead the largest local batch size that fits on devices with 24 and 80 GiB."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence

from switchtitan.benchmark.estimate import ASSUMPTIONS, MEMORY_ASSUMPTIONS, estimate_step
from switchtitan.benchmark.fit import FIT_ASSUMPTIONS, largest_batch_sizes
from switchtitan.benchmark.memory_tracker import KINDS
from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.benchmark.tables import (
    communication_table,
    estimate_record,
    fit_record,
    fit_table,
    flops_table,
    memory_table,
    size_table,
)
from switchtitan.cli.record import add_json_option, check_json_option, put_record
from switchtitan.config.command_line import positive_int
from switchtitan.errors import UserError, exit_for
from switchtitan.job.checks import checks_without_device
from switchtitan.job.config import JobConfig


def main(argv: Sequence[str]) -> None:
    """Estimates a step of each given configuration."""
    try:
        own, overrides = split_overrides(argv)
        options = read_options(own)
        check_json_option(options.json)
        checks = checks_without_device(options.world_size)
        configs = load_sides(options.configs, overrides, options.world_size, checks)
        if sys.stderr.isatty():
            print("estimating: each operation of some steps runs without values", file=sys.stderr)
        if options.fit:
            _print_fit(configs, options, argv)
            return
        estimates = {
            name: estimate_step(config, options.world_size) for name, config in configs.items()
        }
    except UserError as error:
        exit_for(error)
    communication = {name: estimate.communication for name, estimate in estimates.items()}
    lines = [
        "values that train, that are frozen and in buffers; the run; a checkpoint",
        *size_table(estimates, configs),
        f"memory of each of {options.world_size} ranks in a step: the peak, and the maximum of "
        "each kind",
        *memory_table(estimates),
        *(f"  {kind}: {meaning}" for kind, meaning in KINDS.items()),
        "sent by each rank in a step with ring algorithms, in MiB (number of collectives)",
        *communication_table(communication),
        "floating-point operations of each rank in a step",
        *flops_table(estimates),
        "assumptions:",
        *(f"- {assumption}" for assumption in ASSUMPTIONS),
    ]
    print("\n".join(lines), flush=True)
    record = {
        "world_size": options.world_size,
        "assumptions": list(ASSUMPTIONS),
        "estimates": estimate_record(estimates),
    }
    put_record("switchtitan estimate", argv, record, options.json)


def _print_fit(
    configs: Mapping[str, JobConfig], options: argparse.Namespace, argv: Sequence[str]
) -> None:
    """Estimates and prints the largest micro-batch of each configuration that fits."""
    fits = {
        name: largest_batch_sizes(config, options.world_size, options.fit)
        for name, config in configs.items()
    }
    assumptions = [*FIT_ASSUMPTIONS, *MEMORY_ASSUMPTIONS]
    lines = [
        f"largest local_batch_size that fits on each of {options.world_size} ranks with this much "
        "memory",
        *fit_table(fits),
        "assumptions:",
        *(f"- {assumption}" for assumption in assumptions),
    ]
    print("\n".join(lines), flush=True)
    record = {
        "world_size": options.world_size,
        "assumptions": assumptions,
        "fits": fit_record(fits),
    }
    put_record("switchtitan estimate", argv, record, options.json)


def _memory_in_gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected GiB of memory, for example 24")
    return value


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan estimate",
        description="Estimates memory, communication and operations of a training step.",
        epilog="--section.key value overrides a key in all configurations.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="FILE or FILE:section.key=value,section.key=value",
    )
    parser.add_argument("--world-size", type=positive_int, required=True, help="number of ranks")
    parser.add_argument(
        "--fit",
        nargs="+",
        type=_memory_in_gib,
        metavar="GIB",
        help="only estimate the largest local_batch_size that fits on devices with this memory; "
        "replaces the batch sizes of the configurations",
    )
    add_json_option(parser)
    return parser.parse_args(argv)
