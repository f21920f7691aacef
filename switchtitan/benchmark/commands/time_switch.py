"""`switchtitan benchmark switch`: costs of SwitchLoRA's switches in a training run."""

import argparse
from collections.abc import Mapping

from pydantic import JsonValue

from switchtitan.benchmark.commands.command import (
    Command,
    Measurement,
    Overrides,
    add_configs,
    add_rounds,
)
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.switch_costs import SwitchCosts, time_switches_side_by_side
from switchtitan.benchmark.tables import aligned, milliseconds, ratio_cells
from switchtitan.distributed.launcher import num_ranks_from_launcher


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configs(parser)
    add_rounds(parser, rounds=10, per_round=10, unit="steps")


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    configs = load_sides(options.configs, overrides)
    costs = time_switches_side_by_side(configs, options.rounds, options.steps_per_round)
    record: dict[str, JsonValue] = {
        "num_ranks": num_ranks_from_launcher(),
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "switches": {name: _record(side_costs) for name, side_costs in costs.items()},
    }
    return Measurement(_table(costs), record)


def _table(costs: Mapping[str, SwitchCosts]) -> list[str]:
    """Formats one line per configuration; ratios are to the same run without switches."""
    rows: list[tuple[str, ...]] = [
        (
            "ms/switch", "99 %", "99 %/median", "% of step", "ms/step", "ratio", "95 % interval",
            "vectors", "operations", "collectives", "",
        )
    ]  # fmt: skip
    for name, side_costs in costs.items():
        ratio, interval = ratio_cells(side_costs.ratio_to_without)
        rows.append(
            (
                milliseconds(side_costs.median_s),
                milliseconds(side_costs.percentile_99_s),
                f"{side_costs.percentile_99_s / side_costs.median_s:.2f}",
                f"{100 * side_costs.share:.3f}",
                milliseconds(side_costs.median_step_s),
                ratio,
                interval,
                f"{side_costs.num_vectors:.0f}",
                f"{side_costs.num_operations}",
                f"{side_costs.num_collectives}",
                name,
            )
        )
    return aligned(rows)


def _record(costs: SwitchCosts) -> dict[str, JsonValue]:
    ratio = costs.ratio_to_without
    return {
        "switch_s": costs.median_s,
        "round_switches_s": costs.switch_s.tolist(),
        "switch_percentile_99_s": costs.percentile_99_s,
        "share_of_step": costs.share,
        "step_s": costs.median_step_s,
        "ratio_to_without": ratio.value,
        "ratio_interval_95": [ratio.low, ratio.high],
        "vectors_switched": costs.num_vectors,
        "num_operations": costs.num_operations,
        "num_collectives": costs.num_collectives,
    }


SWITCH = Command(
    name="switch",
    summary="time SwitchLoRA's switches inside training steps",
    description="Times SwitchLoRA's switches inside training steps, and the same runs without "
    "switches (the fixed work of each step remains), in alternation in one process. Counts "
    "vectors, operations and collectives of the switches in the last warm-up step.",
    add_arguments=_add_arguments,
    measure=_measure,
)
