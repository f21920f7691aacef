"""Checks that tests notice faults: plants each fault of mutations.toml in a copy of the project.

    ./scripts/test.sh --mutations                  all rows
    ./scripts/test.sh --mutations -k "resume"      rows whose file or property has this text

A row is `file`, `before` (occurs once in the file), `after`, `property` (what must not break) and
`tests` (arguments of pytest). First all tests run on the unchanged copy and must pass; then, for
each row, its tests must fail. Ends with status 1 if a mutation survives.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    for module in PRELOADED:
        importlib.import_module(module)
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

    Yields each when it has ended: with pytest's status, negative after a timeout, the seconds that
    it took, and the end of what it printed.
    """
    context = multiprocessing.get_context("fork")
    waiting, free, running = list(reversed(cases)), list(copies), {}
    while waiting or running:
        while waiting and free:
            case, copy = waiting.pop(), free.pop()
            if "file" in case:
                (copy / case["file"]).write_text(mutated(case))
            process = context.Process(target=run_tests, args=(copy, case["tests"]))
            process.start()
            running[process] = case, copy, time.monotonic()
        time.sleep(0.1)
        for process, (case, copy, start) in list(running.items()):
            duration_s = time.monotonic() - start
            if process.is_alive() and duration_s < TIMEOUT_S:
                continue
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            if "file" in case:
                shutil.copy2(PROJECT / case["file"], copy / case["file"])
            del running[process]
            free.append(copy)
            output = log_of(copy).read_text(errors="replace")[-3000:]
            yield case, process.exitcode, duration_s, output


def run_tests(copy, tests):
    """Runs pytest in the copy, in a process and a session of its own."""
    os.setsid()
    log = os.open(log_of(copy), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    # Not the folder of this script, which is of the unchanged project.
    sys.path[0] = str(copy)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    # Without the handlers at the end of an interpreter, some of which are this fork's parent's.
    os._exit(status)


def log_of(copy):
    return copy.with_name(f"{copy.name}.log")


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
