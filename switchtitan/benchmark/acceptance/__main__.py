"""The program of `scripts/gpu_acceptance.sh`."""

import argparse
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import switchtitan
from switchtitan.benchmark.acceptance.machine import Machine, read_machine
from switchtitan.benchmark.acceptance.programs import FAILED, Result, run_step
from switchtitan.benchmark.acceptance.report import write_report
from switchtitan.benchmark.acceptance.steps import STEPS, Place, Step
from switchtitan.config.command_line import positive_int
from switchtitan.errors import ConfigError, EnvironmentMismatchError, UserError, exit_for

logger = logging.getLogger(__name__)

PROGRAM = "scripts/gpu_acceptance.sh"


def main(argv: Sequence[str], machine: Callable[[], Machine | None] | None = None) -> None:
    """Runs the chosen steps and writes the report.

    Args:
        machine: finds the GPUs, by default in a process of its own, since this one must not hold
            a GPU while steps use it.

    Raises:
        SystemExit: with status 1 if a step failed; 2 for a user's mistake, or without a GPU.
    """
    options = read_options(argv)
    if options.list:
        print("\n".join(f"{step.name:<16} {step.summary}" for step in STEPS))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    project = Path(switchtitan.__file__).parents[1]
    try:
        steps = chosen_steps(STEPS, options.steps)
        found = (machine or _find_machine)()
        if found is None:
            raise EnvironmentMismatchError(
                f"{PROGRAM}: no GPU that torch can use is visible; run it on a machine with a GPU, "
                "or, if there is one, check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
            )
    except UserError as error:
        exit_for(error)
    if options.time_limit_s is not None:
        steps = [replace(step, timeout_s=options.time_limit_s) for step in steps]
    place = Place(found, project, (options.logs / found.slug).absolute())
    results = accept(steps, place, options.output, shlex.join([PROGRAM, *argv]))
    if any(result.status == FAILED for result in results):
        raise SystemExit(1)


def accept(steps: Sequence[Step], place: Place, output: Path, command: str) -> list[Result]:
    """Runs all steps, also after one has failed; writes the report after each.

    Args:
        output: the folder of the report.
        command: named in the report.
    """
    results: list[Result] = []
    for step in steps:
        results.append(run_step(step, place))
        page, record = write_report(output, place.machine, results, command)
    logger.info("wrote %s and %s", page, record)
    return results


def chosen_steps(steps: Sequence[Step], names: str | None) -> list[Step]:
    """Returns the steps in the comma-separated `names`, all for None, in their usual order.

    Raises:
        ConfigError: if a name is unknown.
    """
    if names is None:
        return list(steps)
    wanted = [name.strip() for name in names.split(",")]
    known = [step.name for step in steps]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(
            f"--steps {names}: no step {unknown[0]!r}; expected some of {', '.join(known)}"
        )
    return [step for step in steps if step.name in wanted]


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tests and measures training on the visible GPUs, and writes the results to "
        "docs/gpu/<card>.md and .json. A step that fails is reported, and the others still run.",
        epilog="Exit status: 0 if no step failed, 1 if one did, 2 without a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", metavar="NAME,NAME", help="only these steps; default: all")
    parser.add_argument("--list", action="store_true", help="list the steps, and run nothing")
    parser.add_argument(
        "--time-limit-s",
        type=positive_int,
        metavar="SECONDS",
        help="the longest time of a step; default: 1800",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/gpu"), help="default: %(default)s"
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("outputs/gpu_acceptance"),
        help="the folder of logs and runs; default: %(default)s",
    )
    return parser.parse_args(argv)


def _find_machine() -> Machine | None:
    command = [sys.executable, "-m", "switchtitan.benchmark.acceptance.machine"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode != 0:
        raise EnvironmentMismatchError(
            f"{PROGRAM}: looking for GPUs failed (see above); check the driver and torch"
        )
    return read_machine(answer.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
