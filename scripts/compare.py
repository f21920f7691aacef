"""Runs a declared comparison of methods, or goes on with it, and reports what is finished.

python scripts/compare.py train_configs/comparisons/rank_16.toml --jobs 2
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from switchtitan.comparison.comparison import Comparison
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import Run, check_plan
from switchtitan.comparison.runner import Runner
from switchtitan.config.errors import UserError, exit_for


def main(argv: Sequence[str]) -> None:
    """Carries out what the command line asks for."""
    options = read_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = load_comparison(options.file)
        check_plan(config)
        comparison = Comparison(config)
        runner = Runner(options.jobs)
        with tqdm(total=comparison.standing().num_runs, unit="run", dynamic_ncols=True) as bar:

            def advance(run: Run) -> None:
                standing = comparison.standing()
                bar.total = standing.num_runs
                bar.update(len(standing.selection) + len(standing.report) - bar.n)
                bar.set_postfix_str(run.name)

            bar.update(len(comparison.standing().selection) + len(comparison.standing().report))
            comparison.carry_out(lambda runs: runner.run_all(runs, advance))
    except UserError as error:
        exit_for(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse ends the program with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/compare.py", description="Runs a declared comparison of methods.", allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the TOML file that declares it")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; each on its own GPU or share of the cores"
    )
    return parser.parse_args(argv)


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])
