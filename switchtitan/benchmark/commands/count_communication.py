"""`switchtitan benchmark communication`: bytes that each rank sends in a training step."""

import argparse

from pydantic import JsonValue

from switchtitan.benchmark.commands.command import Command, Measurement, Overrides, add_configs
from switchtitan.benchmark.estimate import communication_of_a_step
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.tables import communication_record, communication_table
from switchtitan.config.command_line import positive_int
from switchtitan.job.checks import checks_without_device


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser)
    parser.add_argument("--num-ranks", type=positive_int, required=True, help="ranks of the run")
    parser.add_argument(
        "--step", type=positive_int, default=2, help="step of the run, from 1 (default: 2)"
    )


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    checks = checks_without_device(options.num_ranks)
    configs = load_sides(options.configs, overrides, options.num_ranks, checks)
    counts = {
        name: communication_of_a_step(config, options.num_ranks, options.step)
        for name, config in configs.items()
    }
    title = (
        f"sent by each of {options.num_ranks} ranks in step {options.step}, in MiB (number of "
        "collectives), with ring algorithms"
    )
    record: dict[str, JsonValue] = {
        "num_ranks": options.num_ranks,
        "step": options.step,
        "bytes": "sent by each rank with ring algorithms",
        "communication": communication_record(counts),
    }
    return Measurement([title, *communication_table(counts)], record)


COMMUNICATION = Command(
    name="communication",
    summary="count the bytes that each rank sends in a training step",
    description="Counts the bytes that each rank sends in a training step with ring algorithms. "
    "Requires neither the ranks nor memory for the model.",
    add_arguments=_add_arguments,
    measure=_measure,
)
