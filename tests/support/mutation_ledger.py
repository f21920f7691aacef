"""Checks that tests notice faults: plants each fault of mutations.toml in a copy of the project.

    ./scripts/test.sh --mutations                  all rows
    ./scripts/test.sh --mutations -k "resume"      rows whose file or property has this text

A row is `file`, `before` (occurs once in the file), `after`, `property` (what must not break) and
`tests` (arguments of pytest). First all tests run on the unchanged copy and must pass; then, for
each row, its tests must fail. Ends with status 1 if a mutation survives.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
        copies = [copy_project(Path(folder, str(job))) for job in range(options.jobs)]
        sys.exit(0 if pass_unchanged(rows, copies) and are_killed(rows, copies) else 1)


def pass_unchanged(rows, copies):
    """Runs the tests of all rows without a fault, so that each row's failure has one cause."""
    files = {}
    for test in sorted({test for row in rows for test in row["tests"]}):
        files.setdefault(test.partition("::")[0], []).append(test)
    all_pass = True
    for case, status, _, output in run([{"tests": tests} for tests in files.values()], copies):
        if status:
            all_pass = False
            print(f"error: {case['tests']} fail unchanged, with status {status}:\n{output}")
    return all_pass


def are_killed(rows, copies):
    """Runs each row's tests with its fault, and prints how they ended."""
    num_killed = 0
    for row, status, duration_s, output in run(rows, copies):
        outcome = OUTCOMES.get(status, f"INVALID (pytest ended with status {status})")
        print(f"{outcome:8} {duration_s:4.0f} s  {row['file']}: {row['property']}", flush=True)
        if status == 1:
            num_killed += 1
        else:
            print(output)
    print(f"{num_killed} of {len(rows)} mutations killed")
    return num_killed == len(rows)


def run(cases, copies):
    """Runs the tests of rows, or of what has no fault to plant, one in each copy at a time.

    Yields each: with pytest's status, negative after a timeout, the seconds that it took, and the
    end of what it printed.
    """
    free = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def run_one(case):
        copy, start = free.get(), time.monotonic()
        if "file" in case:
            (copy / case["file"]).write_text(mutated(case))
        status, output = run_tests(copy, case["tests"])
        if "file" in case:
            shutil.copy2(PROJECT / case["file"], copy / case["file"])
        free.put(copy)
        return case, status, time.monotonic() - start, output[-3000:]

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(run_one, cases)


def run_tests(copy, tests):
    """Runs pytest in the copy; returns its status, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # Not the folder of this script, which is of the unchanged project.
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return process.returncode, output


def mutated(row):
    """Returns the row's file with the fault planted."""
    text = (PROJECT / row["file"]).read_text()
    if (num_found := text.count(row["before"])) != 1:
        sys.exit(f"error: {row['file']}: {row['before']!r} occurs {num_found} times")
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


if __name__ == "__main__":
    main()
