"""Sums what fault tests recorded, and fills the tables of docs/RELIABILITY.md from it.

    python scripts/reliability_report.py outputs/faults.jsonl [FILE ...]

writes docs/measurements/faults.json. `python scripts/generate_docs.py --check` checks the page."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RELIABILITY = ROOT / "docs" / "RELIABILITY.md"
SUMS = ROOT / "docs" / "measurements" / "faults.json"

NOT_MEASURED = "*Not measured yet.*\n"
_TABLE = re.compile(r"<!-- faults (\S[^>]*?) -->\n.*?<!-- end -->", re.DOTALL)
_COMMON = {"fault", "at", "environment"}
_ADDED = {"seconds"}
"""Measured numbers that are summed all the same."""

_ROUNDING = 1e-9

Fact = str | int | float
Row = dict[str, Fact]


def main(argv: Sequence[str]) -> None:
    """Sums the lines of all files and writes the sums and the page."""
    parser = argparse.ArgumentParser(
        prog="scripts/reliability_report.py", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    files = parser.parse_args(argv).files
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}; run ./scripts/test.sh --faults")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    SUMS.write_text(json.dumps(sums_of(lines), indent=1) + "\n")
    RELIABILITY.write_text(with_tables(RELIABILITY.read_text(), SUMS))


def sums_of(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows of each fault's table, and the environments in which they were measured.

    Strings, and numbers named `num_ranks`, tell rows apart. Other integers and seconds are summed;
    of other numbers the greatest is kept.
    """
    tables: dict[str, dict[tuple, Row]] = {}
    environment: dict[str, set[str]] = {}
    for line in lines:
        facts = {name: fact for name, fact in line.items() if name not in _COMMON}
        labels = {name: fact for name, fact in facts.items() if _is_label(name, fact)}
        rows = tables.setdefault(line["fault"], {})
        row = rows.setdefault(tuple(labels.items()), dict(labels))
        for name, fact in facts.items():
            if name not in labels:
                row[name] = _combined(name, row.get(name), fact)
        for name, value in line["environment"].items():
            environment.setdefault(name, set()).add(str(value))
    return {
        "environment": {name: sorted(values) for name, values in environment.items()},
        "faults": {fault: list(rows.values()) for fault, rows in sorted(tables.items())},
    }


def _is_label(name: str, fact: Fact) -> bool:
    return isinstance(fact, str) or name == "num_ranks"


def _combined(name: str, before: Any, fact: Any) -> Fact:
    if before is None:
        return fact
    if isinstance(fact, int) or name in _ADDED:
        return before + fact
    return max(before, fact)


def with_tables(text: str, file: Path) -> str:
    """Returns `text` with every table between `<!-- faults NAME -->` and `<!-- end -->` made from
    the sums in `file`."""
    sums = json.loads(file.read_text()) if file.exists() else {"faults": {}}

    def table(match: re.Match[str]) -> str:
        rows = _rows(match[1], sums["faults"])
        body = _markdown(rows, sums["environment"]) if rows else NOT_MEASURED
        return f"<!-- faults {match[1]} -->\n\n{body}\n<!-- end -->"

    return _TABLE.sub(table, text)


def _rows(name: str, faults: dict[str, list[Row]]) -> list[Row]:
    """The rows of the table `name`; `tests` has one for each file, `tests/FILE` for each test."""
    kind, _, file = name.partition("/")
    if kind != "tests":
        return faults.get(name, [])
    totals: dict[str, dict[str, Any]] = {}
    for row in faults.get("tests", []):
        if file in ("", row["file"]):
            test = str(row["test"]).removeprefix("test_").replace("_", " ")
            title = test if file else str(row["file"])
            first: dict[str, Any] = {"test" if file else "file": title}
            total = totals.setdefault(title, first)
            for key in ("passed", "failed", "seconds"):
                total[key] = total.get(key, 0) + row[key]
    return list(totals.values())


def _markdown(rows: list[Row], environment: dict[str, list[str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    labels = [name for name in names if any(_is_label(name, row.get(name, 0)) for row in rows)]
    counts = [name for name in names if name not in labels]
    header = [name.replace("_", " ").replace("num ranks", "ranks") for name in (*labels, *counts)]
    cells = [header, [*["---"] * len(labels), *["---:"] * len(counts)]]
    cells += [[_cell(row.get(name)) for name in (*labels, *counts)] for row in rows]
    totals = {
        name: sum(row.get(name, 0) for row in rows)  # type: ignore[misc]
        for name in counts
        if name in _ADDED or all(isinstance(row.get(name, 0), int) for row in rows)
    }
    if totals and len(rows) > 1:
        end = ["all", *[""] * (len(labels) - 1), *(_cell(totals.get(name)) for name in counts)]
        cells.append(end)
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([*lines, "", _source(environment), ""])


def _source(environment: dict[str, list[str]]) -> str:
    form, torch, cpu = (", ".join(environment[name]) for name in ("form", "torch", "cpu"))
    commits = ", ".join(commit[:7] for commit in environment["commit"])
    return (
        f"{form.capitalize()} form, torch {torch}, CPU capability {cpu}:\n"
        f"[sums](measurements/faults.json), commit {commits}"
    )


def _cell(fact: Fact | None) -> str:
    if fact is None:
        return ""
    if isinstance(fact, float):
        fact = fact if abs(fact) > _ROUNDING else 0.0  # of a fit
        return f"{fact:.3g}" if abs(fact) < 100 else f"{fact:.0f}"
    return str(fact)


if __name__ == "__main__":
    main(sys.argv[1:])
