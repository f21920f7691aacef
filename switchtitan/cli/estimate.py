"""Estimates size, memory, communication and operations of a training step on any number of ranks.

    switchtitan estimate CONFIG ... --world-size N [--section.key value ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. Further keys are for all sides. Prints tables. Needs
one process only."""

import argparse
import math
import sys
from dataclasses import asdict
from typing import Any

from switchtitan.cli.main import number, positive_int
from switchtitan.observability.environment import describe_environment
from switchtitan.workbench.benchmark import tables
from switchtitan.workbench.benchmark.estimate import estimate_step, largest_batch_sizes
from switchtitan.workbench.benchmark.sides import load_simulated_sides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="FILE or FILE:key=value,...")
    parser.add_argument("--world-size", type=positive_int, required=True, help="number of ranks")
    size = number(float, lambda gib: 0 < gib < math.inf, "GiB of memory, for example 24")
    fit = "estimate only the most sequences per micro-batch that fit on devices with this memory"
    parser.add_argument("--fit", nargs="+", type=size, metavar="GIB", help=fit)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Estimates a step of each given configuration."""
    num_ranks: int = options.world_size
    configs = load_simulated_sides(options.configs, options.keys, num_ranks)
    if sys.stderr.isatty():
        print("estimating: each operation of some steps runs without values", file=sys.stderr)
    if options.fit:
        fits = {
            name: largest_batch_sizes(config, num_ranks, options.fit)
            for name, config in configs.items()
        }
        title = f"the most sequences per micro-batch that fit on each of {num_ranks} ranks"
        lines = [title, *tables.fit_table(fits)]
        found = {"fits": {name: asdict(fit) for name, fit in fits.items()}}
    else:
        estimates = {name: estimate_step(config, num_ranks) for name, config in configs.items()}
        lines = tables.estimate_tables(estimates, configs, num_ranks)
        found = {"estimates": tables.estimate_record(estimates)}
    print("\n".join([*lines, 'assumptions: docs/PERFORMANCE.md, "How good are the estimates?"']))
    return {"environment": describe_environment(), "world_size": num_ranks, **found}
