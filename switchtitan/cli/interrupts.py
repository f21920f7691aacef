"""End a command on SIGTERM or Ctrl-C: KeyboardInterrupt, then status 128 + n after signal n."""

import signal
import sys
from typing import NoReturn


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
