"""Checks that tests notice faults: plants each fault of mutations.toml in a copy of the project.

    ./scripts/test.sh --mutations                  all rows
    ./scripts/test.sh --mutations -k "resume"      rows whose file or property has this text

A row is `file`, `before` (occurs once in the file), `after`, `property` (what must not break) and
`tests` (arguments of pytest). First all tests run on the unchanged copy and must pass; then, for
each row, its tests must fail. Ends with status 1 if a mutation survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import tomli

PROJECT = Path(__file__).parents[2]
LEDGER = Path(__file__).with_name("mutations.toml")
TIMEOUT_S = 600
OUTCOMES = {0: "SURVIVED", 1: "killed"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="text", default="", help="rows with this text only")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="another file of rows")
    parser.add_argument("--jobs", type=int, default=2, help="copies that run tests at a time")
    options = parser.parse_args()
    rows = tomli.loads(options.ledger.read_text())["mutation"]
    rows = [row for row in rows if options.text in row["file"] + " " + row["property"]]
    for row in rows:
        mutated(row)
    with tempfile.TemporaryDirectory() as folder:
        copies = Queue()
        for job in range(options.jobs):
            copies.put(copy_project(Path(folder, str(job))))
        sys.exit(0 if check_unchanged(rows, copies) and check_rows(rows, copies) else 1)


def mutated(row):
    """Returns the row's file with the fault planted."""
    text = (PROJECT / row["file"]).read_text()
    if text.count(row["before"]) != 1:
        sys.exit(
            f"error: {row['file']}: {row['before']!r} occurs {text.count(row['before'])} times"
        )
    return text.replace(row["before"], row["after"])


def copy_project(folder):
    """Copies what git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name, follow_symlinks=False)
    return folder


def run_tests(copy, tests):
    """Returns how pytest ended (see OUTCOMES; 124 for a timeout), and the end of its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status = 124
        output.seek(0)
        return status, output.read()[-3000:]


def check_unchanged(rows, copies):
    """Runs the tests of all rows without a fault; each row's failure then has one cause."""
    tests = sorted({test for row in rows for test in row["tests"]})
    shares = [share for job in range(copies.qsize()) if (share := tests[job :: copies.qsize()])]

    def run_share(share):
        copy = copies.get()
        try:
            return run_tests(copy, share)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(len(shares)) as pool:
        ends = list(pool.map(run_share, shares))
    for status, output in ends:
        if status != 0:
            print(f"error: the unchanged project fails (status {status}):\n{output}")
    return all(status == 0 for status, _ in ends)


def check_rows(rows, copies):
    with ThreadPoolExecutor(copies.qsize()) as pool:
        outcomes = list(pool.map(lambda row: check_row(row, copies), rows))
    print(f"{outcomes.count('killed')} of {len(rows)} mutations killed")
    return outcomes == ["killed"] * len(rows)


def check_row(row, copies):
    copy = copies.get()
    file = copy / row["file"]
    original = file.read_text()
    start = time.monotonic()
    try:
        file.write_text(mutated(row))
        status, output = run_tests(copy, row["tests"])
    finally:
        file.write_text(original)
        copies.put(copy)
    outcome = OUTCOMES.get(status, f"INVALID (pytest ended with status {status})")
    duration_s = time.monotonic() - start
    print(f"{outcome:8} {duration_s:4.0f} s  {row['file']}: {row['property']}", flush=True)
    if outcome != "killed":
        print(output)
    return outcome


if __name__ == "__main__":
    main()
