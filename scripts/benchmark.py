"""Measures what a training step costs, several configurations side by side.

    python scripts/benchmark.py step CONFIG CONFIG ... [--rounds N] [--steps-per-round K] [--section.key value ...]
    python scripts/benchmark.py communication CONFIG ... --num-ranks N [--step S] [--section.key value ...]

CONFIG is a file, or a file and what is different on this side: `FILE:section.key=value,section.key=value`. Further keys go
over all of them. Prints a table, and last one line of JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from pydantic import JsonValue

from switchtitan.benchmark import communication_of_a_step, time_steps_side_by_side
from switchtitan.benchmark.report import communication_record, communication_table, step_record, step_table
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS
from switchtitan.benchmark.sides import load_sides, split_overrides
from switchtitan.config.arguments import positive_int
from switchtitan.config.errors import UserError, exit_for
from switchtitan.distributed.world import num_ranks_from_launcher
from switchtitan.observability.environment import describe_environment


def main(argv: Sequence[str]) -> None:
    """Measures what the command line asks for."""
    try:
        own, overrides = split_overrides(argv)
        options = read_options(own)
        table, record = options.measure(options, overrides)
    except UserError as error:
        exit_for(error)
    # Of several ranks that a launcher started, the first one speaks.
    if os.environ.get("RANK", "0") != "0":
        return
    command = " ".join(["scripts/benchmark.py", *argv])
    print("\n".join(table), flush=True)
    print(json.dumps({"command": command, "environment": describe_environment()} | record), flush=True)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The program's own words; argparse ends the program with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark.py",
        description="Measures what a training step costs, several configurations side by side.",
        epilog="--section.key value overrides a key of all configurations, as in training.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="step | communication")
    step = commands.add_parser("step", help="time whole training steps in alternation", allow_abbrev=False)
    step.set_defaults(measure=measure_steps)
    _add_configs(step)
    step.add_argument(
        "--rounds",
        type=positive_int,
        default=10,
        help="how often each configuration has its turn; an even number is fair to all (default: 10)",
    )
    step.add_argument(
        "--steps-per-round", type=positive_int, default=5, help="steps that a turn consists of (default: 5)"
    )
    communication = commands.add_parser(
        "communication",
        help="count the bytes that each rank sends in a training step",
        description="Counts the bytes that each rank sends in a training step if collectives are carried out in a ring; needs "
        "neither the ranks nor memory for the model.",
        allow_abbrev=False,
    )
    communication.set_defaults(measure=measure_communication)
    _add_configs(communication)
    communication.add_argument("--num-ranks", type=positive_int, required=True, help="ranks of the run")
    communication.add_argument(
        "--step", type=positive_int, default=2, help="which step of the run, from 1 (default: 2)"
    )
    return parser.parse_args(argv)


def measure_steps(
    options: argparse.Namespace, overrides: dict[str, list[str]]
) -> tuple[list[str], dict[str, JsonValue]]:
    """Table and record of the step times."""
    configs = load_sides(options.configs, overrides)
    times = time_steps_side_by_side(configs, options.rounds, options.steps_per_round)
    record: dict[str, JsonValue] = {
        "num_ranks": num_ranks_from_launcher(),
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": step_record(times),
    }
    return step_table(times), record


def measure_communication(
    options: argparse.Namespace, overrides: dict[str, list[str]]
) -> tuple[list[str], dict[str, JsonValue]]:
    """Table and record of the bytes communicated."""
    configs = load_sides(options.configs, overrides, options.num_ranks)
    counts = {
        name: communication_of_a_step(config, options.num_ranks, options.step)
        for name, config in configs.items()
    }
    title = (
        f"sent by each of {options.num_ranks} ranks in step {options.step}, in MiB (number of collectives), if carried out "
        "in a ring"
    )
    record: dict[str, JsonValue] = {
        "num_ranks": options.num_ranks,
        "step": options.step,
        "bytes": "sent by each rank, collectives carried out in a ring",
        "communication": communication_record(counts),
    }
    return [title, *communication_table(counts)], record


def _add_configs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="FILE or FILE:section.key=value,section.key=value"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
