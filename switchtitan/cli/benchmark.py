"""Compares training steps of several configurations side by side.

    switchtitan benchmark step|gpu|coordinates CONFIG ... [--KEY VALUE ...]

CONFIG is a file, or a file with overrides for this side:
`FILE:section.key=value,section.key=value`. KEY is a `section.key` for all sides.
`switchtitan benchmark step --help` lists further options."""

import argparse
import sys
from functools import partial
from typing import Any

from switchtitan.cli.main import add_json, positive_int
from switchtitan.distributed.gpus import ARCHS, card_of
from switchtitan.distributed.world import place_from_launcher
from switchtitan.errors import ConfigError
from switchtitan.observability.environment import describe_environment
from switchtitan.workbench.benchmark import tables
from switchtitan.workbench.benchmark.coordinates import at_hidden_size, changes_in_a_step, slopes
from switchtitan.workbench.benchmark.gpu.device import call_with_gpus
from switchtitan.workbench.benchmark.gpu.record import record_steps
from switchtitan.workbench.benchmark.sides import load_sides, load_simulated_sides
from switchtitan.workbench.benchmark.step_times import WARM_UP_STEPS, time_steps_side_by_side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="measure", required=True, metavar="step|gpu|coordinates")
    step = _add(commands, "step", "Time steps in turns; print a table of the first rank's times.")
    rounds = "turns of each side; an even number is fair (default: 10)"
    step.add_argument("--rounds", type=positive_int, default=10, help=rounds)
    steps = "steps per turn (default: 5)"
    step.add_argument("--steps-per-round", type=positive_int, default=5, help=steps)
    gpu = _add(
        commands,
        "gpu",
        "Compile steps for GPUs without one; print their launches, bytes and operations, "
        "and the least time of a step on some cards. Takes about a minute for each configuration.",
    )
    archs = "architectures to compile for (default: sm_90)"
    gpu.add_argument("--arch", nargs="+", choices=ARCHS, default=["sm_90"], help=archs)
    ranks = "number of ranks, of which the first is compiled (default: 1)"
    gpu.add_argument("--num-ranks", type=positive_int, default=1, help=ranks)
    coordinates = _add(
        commands,
        "coordinates",
        "Coordinate check (arXiv 2203.03466): take a few steps at several hidden sizes; print for "
        "each layer the exponent e of the change of its output in a step, about hidden_size^e, and "
        "that of the residual stream. LLaMA's family; other widths and the rank in proportion.",
    )
    sizes = "hidden sizes (default: 64 128 256 512 1024)"
    default = [64, 128, 256, 512, 1024]
    coordinates.add_argument("--sizes", nargs="+", type=positive_int, default=default, help=sizes)


def _add(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description, allow_abbrev=False
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="FILE or FILE:key=value,...")
    add_json(parser, default=argparse.SUPPRESS)
    return parser


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measures steps; prints on the main rank."""
    runs = {"gpu": _run_gpu, "step": _run_step, "coordinates": _run_coordinates}
    return runs[options.measure](options)


def _run_coordinates(options: argparse.Namespace) -> dict[str, Any]:
    if place_from_launcher()[1] > 1 or len(set(options.sizes)) < 2:
        raise ConfigError(f"--sizes {options.sizes}: expected two sizes or more, on one rank")
    sides = load_sides(options.configs, options.keys)
    changes = {
        name: {size: changes_in_a_step(at_hidden_size(config, size)) for size in options.sizes}
        for name, config in sides.items()
    }
    found = {name: slopes(by_size) for name, by_size in changes.items()}
    print("\n".join(tables.slope_table(found)), flush=True)
    return {"slopes": found, "changes": changes}


def _run_step(options: argparse.Namespace) -> dict[str, Any] | None:
    rank, num_ranks, _ = place_from_launcher()
    configs = load_sides(options.configs, options.keys)
    times = time_steps_side_by_side(configs, options.rounds, options.steps_per_round)
    if rank != 0:
        return None
    steps = tables.step_record(times, configs)
    print("\n".join(tables.step_table(steps)), flush=True)
    return {
        "environment": describe_environment(),
        "num_ranks": num_ranks,
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": steps,
    }


def _run_gpu(options: argparse.Namespace) -> dict[str, Any]:
    configs = load_simulated_sides(options.configs, options.keys, options.num_ranks)
    if sys.stderr.isatty():
        print("compiling: about a minute for each configuration", file=sys.stderr)
    take_steps = partial(record_steps, configs, options.num_ranks)
    found = call_with_gpus([(arch, take_steps) for arch in options.arch])
    by_arch = dict(zip(options.arch, found, strict=True))
    steps = {name: {arch: found[name] for arch, found in by_arch.items()} for name in configs}
    lines = []
    for name, by_arch in steps.items():
        for arch, step in by_arch.items():
            late = [function for functions in step.compiled[1:] for function in functions]
            lines += [
                f"{name}, {arch}, rank 0 of {options.num_ranks}; compiled after the first step: "
                f"{', '.join(late) or 'nothing'}",
                f"a step by region, and its bound on {card_of(arch).device_name}",
                *tables.launch_table(arch, step, "region"),
                "its operations with the highest bounds",
                *tables.launch_table(arch, step, "region", "kind", "name"),
            ]
    lines += [
        "bound of a step in milliseconds, and its ratio to the first configuration's",
        *tables.bound_table(steps),
        'assumptions: docs/measurements/GPU.md, "Bounds of a step on a GPU"',
    ]
    print("\n".join(lines), flush=True)
    return {
        "environment": describe_environment(),
        "num_ranks": options.num_ranks,
        "steps": tables.gpu_record(steps),
    }
