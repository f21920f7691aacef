"""Errors that a user can fix (status 2 by default), and how a command ends."""

import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

USER_ERROR_STATUS = 2
SAVE_ABANDONED_STATUS = 5
"""A signal stopped the run, and its last save was not complete in time."""
CLOSED_OUTPUT_STATUS = 128 + signal.SIGPIPE
"""Of a command whose standard output was closed, as in `switchtitan train --help | head -3`."""
ENDED = "SWITCHTITAN_ENDED"
"""Variable with the file in which the first process of a run that knows why it ends leaves its
status and message, for the launcher or the batch script to print."""


class UserError(Exception):
    """An error whose message says what was given, what was expected and how to fix it."""

    exit_status = USER_ERROR_STATUS


class ConfigError(UserError):
    """The configuration has an invalid key, value or combination of values."""


class CorpusError(UserError):
    """A corpus or a tokenizer is missing, corrupted, too small, or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or weights file is missing, corrupted, or of another model, method or corpus."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint has a format that this version does not read. It may be intact."""


class OutputError(UserError):
    """A file of a run's results cannot be written."""


class EnvironmentMismatchError(UserError):
    """The machine, the launcher or the installed packages do not support the configuration."""


class RanksDisagreeError(UserError):
    """Ranks no longer train the same model; the configuration was valid, as are checkpoints."""

    exit_status = 4


# How a command ends.
def exit_for(end: UserError | KeyboardInterrupt) -> NoReturn:
    """Leaves the reason, and exits: with the error's status, or 128 + n after signal n."""
    if isinstance(end, UserError):
        record_end(str(end), end.exit_status)
        raise SystemExit(end.exit_status)
    number = end.args[0] if end.args else signal.SIGINT
    record_end(f"stopped by {signal.Signals(number).name}", 128 + number)
    raise SystemExit(128 + number)


def end_now(message: str, status: int) -> NoReturn:
    """Ends the process, also if threads have not ended."""
    try:
        record_end(message, status)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def record_end(message: str, status: int) -> None:
    """Leaves the reason in the file that `ENDED` names, if it is the first; prints it without."""
    line = message if status > 127 else f"error: {message}"  # above 127 are signals
    try:
        with open(os.environ[ENDED], "x", encoding="utf-8") as ended:
            ended.write(f"{status}\n{line}\n")
    except FileExistsError:
        pass
    except (KeyError, OSError):  # no launcher, or a full disk
        print(line, file=sys.stderr)


def recorded_end() -> tuple[int, str] | None:
    """Returns the status and the line that the first process to end has left in that file."""
    try:
        status, _, line = Path(os.environ[ENDED]).read_text(encoding="utf-8").partition("\n")
        return int(status), line
    except (KeyError, OSError, ValueError):
        return None


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM, and SIGHUP but for `nohup`, raise KeyboardInterrupt, like Ctrl-C. Sends a
    signal again that Python swallows in a destructor or the callback of a weak reference."""
    report_others = sys.unraisablehook

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    def send_again(swallowed: "sys.UnraisableHookArgs") -> None:
        if not isinstance(swallowed.exc_value, KeyboardInterrupt):
            return report_others(swallowed)
        (number,) = swallowed.exc_value.args or (signal.SIGINT,)
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)
    sys.unraisablehook = send_again


def discard_output() -> None:
    """Sends standard output to nowhere: Python would print an error when it flushes it at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def abbreviate(names: Iterable[str]) -> str:
    """Returns the first four names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
