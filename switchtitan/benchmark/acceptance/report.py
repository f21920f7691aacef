"""The page and the JSON of an acceptance."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from switchtitan.benchmark.acceptance.machine import Machine
from switchtitan.benchmark.acceptance.programs import FAILED, Result
from switchtitan.benchmark.acceptance.steps import STEPS
from switchtitan.files import write_atomically

_SUMMARIES = {step.name: step.summary for step in STEPS}


def write_report(
    folder: Path, machine: Machine, results: Sequence[Result], command: str
) -> tuple[Path, Path]:
    """Writes `<card>.md` and `<card>.json` into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / f"{machine.slug}.md", folder / f"{machine.slug}.json"
    date = datetime.now(timezone.utc).date().isoformat()
    contents = {
        "command": command,
        "date": date,
        "machine": asdict(machine),
        "steps": [asdict(result) for result in results],
    }
    write_atomically(record, json.dumps(contents, indent=1) + "\n")
    write_atomically(page, "\n".join(page_lines(machine, results, command, date)) + "\n")
    return page, record


def page_lines(machine: Machine, results: Sequence[Result], command: str, date: str) -> list[str]:
    """Returns the page's lines."""
    failed = [result for result in results if result.status == FAILED]
    outcome = f"{len(failed)} of {len(results)} steps failed." if failed else "No step failed."
    return [
        f"# {machine.num_gpus} x {machine.card}",
        "",
        f"`{command}`, {date}. {outcome}",
        "",
        "| | |",
        "|---|---|",
        f"| memory per GPU | {machine.memory_gib:.1f} GiB |",
        *(f"| {name} | {value} |" for name, value in machine.facts.items()),
        "",
        "| step | result | seconds |",
        "|---|---|---:|",
        *(f"| {result.name} | {_cell(result)} | {result.seconds:.0f} |" for result in results),
        *(line for result in results if result.tables for line in _tables(result)),
        *(line for result in failed for line in _failure(result)),
    ]


def _cell(result: Result) -> str:
    text = f"{result.status}: {result.reason}" if result.reason else result.status
    return " ".join(text.replace("|", "/").split())


def _tables(result: Result) -> list[str]:
    return ["", f"## {result.name}", "", _SUMMARIES.get(result.name, ""), "", *result.tables]


def _failure(result: Result) -> list[str]:
    # Four backticks: a log may contain three.
    return [
        *("", f"## {result.name} failed", ""),
        f"{result.reason}. The log, `{result.log}`, ends with:",
        *("", "````", *result.tail, "````"),
    ]
