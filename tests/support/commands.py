"""Runs a command of switchtitan in this process, as a user would."""

import contextlib
import io
import json
import logging
import re
import signal
from typing import NamedTuple

from switchtitan.cli.main import main
from switchtitan.distributed.world import stop_world

_ERROR = re.compile(r"^(?:switchtitan[\w -]*: )?error: ", re.MULTILINE)
"""The start of a message: of the product, or of argparse."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    errors: str
    """Standard error."""

    def check_refused(self, *parts):
        """Checks that the command ended with status 2 and one message with all `parts`."""
        assert self.status == 2, (self.status, self.output[-2000:], self.errors[-2000:])
        assert "Traceback (most recent call last)" not in self.errors
        messages = list(_ERROR.finditer(self.errors))
        assert len(messages) == 1, self.errors
        text = self.errors[messages[0].start() :]
        assert all(part in text for part in parts), (parts, text)


def run(*words):
    """Runs `switchtitan` with these arguments. Its exceptions other than an exit are raised."""
    output, errors = io.StringIO(), io.StringIO()
    status = 0
    root, own = logging.getLogger(), logging.getLogger("switchtitan")
    handlers, levels = list(root.handlers), (root.level, own.level)
    actions = {number: signal.getsignal(number) for number in _SIGNALS}
    # Runs of earlier tests have left handlers and a level, and would print; a process has none.
    own.handlers.clear()
    own.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        stop_world()
        for number, action in actions.items():
            signal.signal(number, action)
        root.handlers[:] = handlers
        for logger, level in zip((root, own), levels, strict=True):
            logger.setLevel(level)
    return Outcome(status, output.getvalue(), errors.getvalue())


def succeed(*words):
    """Runs a command that must succeed; returns its outcome."""
    outcome = run(*words)
    assert outcome.status == 0, (outcome.output[-3000:], outcome.errors[-3000:])
    return outcome


def result_of(*words):
    """Runs a command that must succeed; returns what it prints with `--json -`."""
    return json.loads(succeed(*words, "--json", "-").output)
