"""Times training steps of several configurations side by side.

    switchtitan benchmark step CONFIG ... [--rounds N] [--steps-per-round K] [--KEY VALUE ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. KEY is a `section.key` and overrides all sides. Prints a
table, and the same as JSON: as the last line, or to --json FILE."""

import argparse
from collections.abc import Sequence

from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.benchmark.step_times import WARM_UP_STEPS, time_steps_side_by_side
from switchtitan.benchmark.tables import step_record, step_table
from switchtitan.cli.record import add_json_option, check_json_option, put_record
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.world import num_ranks_from_launcher, rank_from_launcher
from switchtitan.errors import UserError, exit_for


def main(argv: Sequence[str]) -> None:
    """Times steps, and prints the first rank's times."""
    try:
        is_main = rank_from_launcher() == 0
        own, overrides = split_overrides(argv)
        options = read_options(own)
        check_json_option(options.json)
        configs = load_sides(options.configs, overrides)
        times = time_steps_side_by_side(configs, options.rounds, options.steps_per_round)
    except UserError as error:
        exit_for(error)
    if not is_main:
        return
    print("\n".join(step_table(times)), flush=True)
    record = {
        "num_ranks": num_ranks_from_launcher(),
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": step_record(times),
    }
    put_record("switchtitan benchmark", argv, record, options.json)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options."""
    parser = argparse.ArgumentParser(prog="switchtitan benchmark", allow_abbrev=False)
    step = parser.add_subparsers(required=True, metavar="step").add_parser(
        "step",
        help="time training steps in alternation",
        description="Times training steps of several configurations in alternation, in one "
        "process.",
        epilog="--section.key value overrides a key in all configurations.",
        allow_abbrev=False,
    )
    step.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="FILE or FILE:section.key=value,section.key=value",
    )
    step.add_argument(
        "--rounds",
        type=positive_int,
        default=10,
        help="turns of each side; an even number is fair (default: 10)",
    )
    step.add_argument(
        "--steps-per-round", type=positive_int, default=5, help="steps per turn (default: 5)"
    )
    add_json_option(step)
    return parser.parse_args(argv)
