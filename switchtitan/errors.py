"""How a command ends: by errors that a user can fix (status 2 by default), by a signal, or because
nobody reads its output."""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

USER_ERROR_STATUS = 2
SAVE_ABANDONED_STATUS = 5
"""A signal stopped the run, and its last save was not complete in time."""
CLOSED_OUTPUT_STATUS = 128 + signal.SIGPIPE
"""Of a command whose standard output was closed, as in `switchtitan train --help | head -3`."""
_LARGEST_ERROR_STATUS = 127
"""Above are statuses of signals."""
_NUM_NAMED = 4
_LAUNCHER_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file in which torchrun expects a rank's failure reason."""
EXIT_STATUS_KEY = "exit_status"
"""Key in that file that marks a known end, next to torchrun's own keys."""


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
    """Ranks no longer train the same model. Earlier checkpoints are valid to resume from."""

    exit_status = 4
    """Tells calling programs that the configuration was valid."""


def abbreviate(names: Iterable[str]) -> str:
    """Return the first four names, and the number of the others."""
    names = list(names)
    num_more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {num_more} more" if num_more > 0 else "")


def exit_for(error: UserError) -> NoReturn:
    """Exit with the error's status, without a traceback.

    Prints the message. On several ranks, leaves it for the launcher, which prints the first one.
    """
    record_end(str(error), error.exit_status)
    raise SystemExit(error.exit_status)


def exit_for_stop(signal_number: int) -> NoReturn:
    """Exit with the status of a run that a signal stopped; says so as `exit_for` does."""
    status = 128 + signal_number
    record_end(f"stopped by {signal.Signals(signal_number).name}", status)
    raise SystemExit(status)


def end_now(message: str, status: int) -> NoReturn:
    """Ends the process as `exit_for` does, also if threads or other processes have not ended."""
    try:
        record_end(message, status)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def record_end(message: str, status: int) -> None:
    """Prints why this process ends. On several ranks, leaves it for the launcher, which prints the
    first reason."""
    # Imported here because `files` imports this module.
    from switchtitan.files import write_atomically

    launcher_file = os.environ.get(_LAUNCHER_FILE)
    if launcher_file:
        reason = {"message": message, "timestamp": int(time.time()), EXIT_STATUS_KEY: status}
        # The launcher may kill this rank at any time after another has failed, then reads the file.
        write_atomically(Path(launcher_file), json.dumps(reason))
    else:
        print(final_line(message, status), file=sys.stderr)


def final_line(message: str, status: int) -> str:
    """Returns the last line of a command that ends with `status`."""
    return message if status > _LARGEST_ERROR_STATUS else f"error: {message}"


def is_output_closed() -> bool:
    """Whether standard output is a pipe or socket that nobody reads any more.

    Tells `| head` from a broken connection to another process, which is an error.
    """
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always reported
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # not a file of the system
        return False


def discard_output() -> None:
    """Sends standard output, and what is still in its buffer, to nowhere.

    Otherwise Python prints an error when it flushes the buffer at its end.
    """
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM raise KeyboardInterrupt, like Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)


def exit_for_interrupt(stop: KeyboardInterrupt, message: str) -> NoReturn:
    """Prints `message` on standard error and exits with the signal's status."""
    print(message, file=sys.stderr)
    raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None


def _interrupt(signum: int, frame: object) -> None:
    # A signal to the process group also ends the data loader's workers. torch's SIGCHLD handler
    # would raise for them in the middle of a save.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)
