"""Checks that tests notice faults: plants each fault of mutations.toml in a copy of the project.

    ./scripts/test.sh --mutations                  all rows
    ./scripts/test.sh --mutations -k "resume"      rows whose file or property has this text

A row is `file`, `before` (occurs once in the file), `after`, `property` (what must not break) and
`tests` (arguments of pytest). First all tests run on the unchanged copy and must pass; then, for
each row, its tests must fail. Ends with status 1 if a mutation survives.
"""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli

PROJECT = Path(__file__).parents[2]
LEDGER = Path(__file__).with_name("mutations.toml")
TIMEOUT_S = 600
OUTCOMES = {0: "SURVIVED", 1: "killed"}
# Imported once; the processes that run tests are forked from this one.
PRELOADED = (
    "pydantic",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.nn.attention.flex_attention",
)


@dataclass
class Case:
    """Tests that run in a copy of the project, with the fault of a row or without one."""

    tests: list[str]
    row: dict[str, Any] | None = None
    status: int | None = None
    """How pytest ended; 124 after a timeout."""
    duration_s: float = 0.0
    output: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="text", default="", help="rows with this text only")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="another file of rows")
    parser.add_argument("--jobs", type=int, default=2, help="copies that run tests at a time")
    options = parser.parse_args()
    rows = tomli.loads(options.ledger.read_text())["mutation"]
    rows = [row for row in rows if options.text in row["file"] + " " + row["property"]]
    for row in rows:
        mutated(row)
    for module in PRELOADED:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_project(Path(folder, str(job))) for job in range(options.jobs)]
        sys.exit(0 if pass_unchanged(rows, copies) and are_killed(rows, copies) else 1)


def pass_unchanged(rows: list[dict[str, Any]], copies: list[Path]) -> bool:
    """Runs the tests of all rows without a fault, so that each row's failure has one cause."""
    files: dict[str, list[str]] = {}
    for test in sorted({test for row in rows for test in row["tests"]}):
        files.setdefault(test.partition("::")[0], []).append(test)
    failed = [
        case for case in run([Case(tests) for tests in files.values()], copies) if case.status
    ]
    for case in failed:
        print(f"error: {case.tests} fail unchanged, with status {case.status}:\n{case.output}")
    return not failed


def are_killed(rows: list[dict[str, Any]], copies: list[Path]) -> bool:
    """Runs each row's tests with its fault, and prints how they ended."""
    num_killed = 0
    for case in run([Case(row["tests"], row) for row in rows], copies):
        outcome = OUTCOMES.get(case.status, f"INVALID (pytest ended with status {case.status})")
        row = case.row
        print(f"{outcome:8} {case.duration_s:4.0f} s  {row['file']}: {row['property']}", flush=True)
        if outcome == "killed":
            num_killed += 1
        else:
            print(case.output)
    print(f"{num_killed} of {len(rows)} mutations killed")
    return num_killed == len(rows)


def run(cases: list[Case], copies: list[Path]) -> Iterator[Case]:
    """Runs cases, one in each copy at a time; yields each when it has ended."""
    waiting, free = list(reversed(cases)), list(copies)
    running: dict[int, tuple[Case, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            case, copy = waiting.pop(), free.pop()
            if case.row:
                (copy / case.row["file"]).write_text(mutated(case.row))
            running[fork_tests(copy, case.tests)] = case, copy, time.monotonic()
        time.sleep(0.1)
        for pid, (case, copy, start) in list(running.items()):
            case.status = status_of(pid, start)
            if case.status is None:
                continue
            case.duration_s = time.monotonic() - start
            case.output = log_of(copy).read_text(errors="replace")[-3000:]
            if case.row:
                shutil.copy2(PROJECT / case.row["file"], copy / case.row["file"])
            del running[pid]
            free.append(copy)
            yield case


def fork_tests(copy: Path, tests: list[str]) -> int:
    """Starts pytest in the copy; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        log = os.open(log_of(copy), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
        # Not the folder of this script, which is of the unchanged project.
        sys.path[0] = str(copy)
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    finally:
        sys.stdout.flush()
        os._exit(status)


def log_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.log")


def status_of(pid: int, start: float) -> int | None:
    """Returns how a process ended, 124 if it was killed after TIMEOUT_S, None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() - start < TIMEOUT_S:
        return None
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


def mutated(row: dict[str, Any]) -> str:
    """Returns the row's file with the fault planted."""
    text = (PROJECT / row["file"]).read_text()
    if text.count(row["before"]) != 1:
        sys.exit(
            f"error: {row['file']}: {row['before']!r} occurs {text.count(row['before'])} times"
        )
    return text.replace(row["before"], row["after"])


def copy_project(folder: Path) -> Path:
    """Copies what git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name, follow_symlinks=False)
    return folder


if __name__ == "__main__":
    main()
