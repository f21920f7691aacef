"""Runs the programs of a step, with a log and a time limit."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from switchtitan.benchmark.acceptance.steps import Place, Step

logger = logging.getLogger(__name__)

TAIL_LINES = 30
"""Lines of a failed program's log in the report."""
_TERMINATION_S = 20.0

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Result:
    """The result of a step."""

    name: str
    status: str
    """`PASSED`, `FAILED` or `SKIPPED`."""
    seconds: float = 0.0
    reason: str = ""
    """Why it failed or was skipped."""
    log: str = ""
    """The file with the output of its programs."""
    tail: list[str] = field(default_factory=list)
    """The last lines of a failed step's log."""
    figures: dict[str, JsonValue] = field(default_factory=dict)
    """What the step measured."""
    tables: list[str] = field(default_factory=list)
    """Lines of the tables that its programs printed."""


def run_step(step: Step, place: Place) -> Result:
    """Runs a step's programs one after the other, up to the first that fails.

    Never raises for a failure of the step: the result says what failed.
    """
    reason = step.obstacle(place)
    if reason is not None:
        logger.info("%s: skipped: %s", step.name, reason)
        return Result(step.name, SKIPPED, reason=reason)
    folder = place.folder / step.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    logger.info("%s: started, at most %d min; log: %s", step.name, step.timeout_s // 60, log)
    log.write_text("", encoding="utf-8")
    began_at = time.monotonic()
    reason = ""
    for command in step.commands(place):
        left_s = step.timeout_s - (time.monotonic() - began_at)
        reason = run_program(command, log, left_s, place.project)
        if reason:
            break
    figures, tables = dict[str, JsonValue](), list[str]()
    if not reason:
        try:
            figures, tables = step.read(place)
        # A program that ends well without its results is a failed step, whatever is missing.
        except Exception as error:
            reason = f"its results cannot be read: {type(error).__name__}: {error}"
    seconds = time.monotonic() - began_at
    status = FAILED if reason else PASSED
    logger.info("%s: %s after %.0f s%s", step.name, status, seconds, reason and f": {reason}")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Result(
        step.name,
        status,
        seconds,
        reason,
        str(log),
        lines[-TAIL_LINES:] if reason else [],
        figures,
        tables,
    )


def run_program(command: Sequence[str], log: Path, timeout_s: float, folder: Path) -> str:
    """Runs a program in `folder`, appending its output to `log`.

    Returns:
        Why it failed; an empty string if it ended with status 0 in time.
    """
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its own process group, so that its ranks are ended with it.
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n")
            return f"{command[0]} cannot be started: {error}"
        try:
            status = process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            _end(process)
            return "it ran past its time limit"
        except BaseException:
            _end(process)
            raise
    return f"exit status {status}" if status else ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a program and all processes that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(_TERMINATION_S)
        except subprocess.TimeoutExpired:
            continue
