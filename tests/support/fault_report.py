"""Records what fault tests did; `scripts/reliability_report.py` sums it for docs/RELIABILITY.md."""

import json
import os
import time
from functools import lru_cache

import torch

from switchtitan.observability.environment import commit, versions

IS_LONG = os.environ.get("SWITCHTITAN_FAULTS") == "long"
"""Whether fault tests run in full, as `./scripts/test.sh --faults` does."""


def record(fault: str, **facts: str | int | float) -> None:
    """Appends a JSON line to the file that SWITCHTITAN_FAULTS_REPORT names; nothing if it is unset.

    Call it after the test's checks: what is recorded has passed.

    Args:
        fault: the name of the table that the line belongs to.
        facts: strings, and numbers named `num_ranks`, tell rows of the table apart; other integers
            are counts, which are summed; of other numbers, which are measured, the greatest counts.
    """
    if report := os.environ.get("SWITCHTITAN_FAULTS_REPORT"):
        line = {"fault": fault, **facts, "at": time.time(), "environment": _environment()}
        # One write of less than a page: several processes append to the file.
        with open(report, "a") as file:
            file.write(json.dumps(line) + "\n")


@lru_cache(1)
def _environment() -> dict[str, str | None]:
    return {
        "torch": versions()["torch"],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
        "form": "long" if IS_LONG else "short",
    }
