"""Times training steps of several configurations side by side.

    switchtitan benchmark step CONFIG ... [--rounds N] [--steps-per-round K] [--KEY VALUE ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. KEY is a `section.key` and overrides all sides. Prints a
table of the first rank's times."""

import argparse
from typing import Any

from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.step_times import WARM_UP_STEPS, time_steps_side_by_side
from switchtitan.benchmark.tables import step_record, step_table
from switchtitan.cli.main import positive_int
from switchtitan.distributed.world import num_ranks_from_launcher, rank_from_launcher
from switchtitan.observability.environment import describe_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=["step"], help="training steps, in alternation")
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="FILE or FILE:key=value,...")
    rounds = "turns of each side; an even number is fair (default: 10)"
    parser.add_argument("--rounds", type=positive_int, default=10, help=rounds)
    steps = "steps per turn (default: 5)"
    parser.add_argument("--steps-per-round", type=positive_int, default=5, help=steps)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Times steps; prints on the main rank."""
    is_main = rank_from_launcher() == 0
    configs = load_sides(options.configs, options.keys)
    times = time_steps_side_by_side(configs, options.rounds, options.steps_per_round)
    if not is_main:
        return None
    print("\n".join(step_table(times)), flush=True)
    return {
        "environment": describe_environment(),
        "num_ranks": num_ranks_from_launcher(),
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": step_record(times),
    }
