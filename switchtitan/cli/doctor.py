"""Says what this machine has and lacks for training.

    switchtitan doctor [--json] [--network] [--output-dir FOLDER]

Each line is `ok`, `optional` (an extra that is not installed), `warning` (training works, perhaps
slowly) or `missing`, with what to do. Exit status 1 if training could not work at all, else 0."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from switchtitan.cli.doctor_checks import MISSING, Finding, all_findings


def main(argv: Sequence[str]) -> None:
    """Prints the findings.

    Raises:
        SystemExit: with status 1 if training could not work.
    """
    options = read_options(argv)
    findings = []
    for finding in all_findings(options.output_dir, options.network):
        findings.append(finding)
        if not options.json:
            print("\n".join(describe(finding)), flush=True)
    can_train = not any(finding.is_required and finding.status == MISSING for finding in findings)
    if options.json:
        record = {"can_train": can_train, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(record, indent=2))
    elif can_train:
        print("training works here")
    else:
        print("training cannot work here: see what is missing above")
    if not can_train:
        raise SystemExit(1)


def describe(finding: Finding) -> list[str]:
    """Returns the lines of a finding."""
    lines = [f"{finding.status:<8} {finding.name:<15} {finding.detail}"]
    if finding.fix is not None:
        lines.append(f"{'':<25}-> {finding.fix}")
    return lines


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan doctor",
        description="Says what this machine has and lacks for training.",
        epilog="Exit status 1 if training could not work, else 0.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument(
        "--network", action="store_true", help="also ask whether the Hugging Face hub answers"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where runs go; need not exist (default: outputs)",
    )
    return parser.parse_args(argv)
