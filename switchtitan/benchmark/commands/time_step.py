"""`switchtitan benchmark step`: training steps of several configurations."""

import argparse

from pydantic import JsonValue

from switchtitan.benchmark.commands.command import (
    Command,
    Measurement,
    Overrides,
    add_configs,
    add_rounds,
)
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS, time_steps_side_by_side
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.tables import step_record, step_table
from switchtitan.distributed.launcher import num_ranks_from_launcher


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser)
    add_rounds(parser, rounds=10, per_round=5, unit="steps")


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    configs = load_sides(options.configs, overrides)
    times = time_steps_side_by_side(configs, options.rounds, options.steps_per_round)
    record: dict[str, JsonValue] = {
        "num_ranks": num_ranks_from_launcher(),
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": step_record(times),
    }
    return Measurement(step_table(times), record)


STEP = Command(
    name="step",
    summary="time training steps in alternation",
    description="Times training steps of several configurations in alternation, in one process.",
    add_arguments=_add_arguments,
    measure=_measure,
)
