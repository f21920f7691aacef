"""Errors that a user can fix: printed without a traceback, with exit status 2 unless they say otherwise."""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

USER_ERROR_STATUS = 2
_NUM_NAMED = 4
_LAUNCHER_FILE = "TORCHELASTIC_ERROR_FILE"
"""The variable by which torchrun tells a rank where to leave the reason of its failure."""
EXIT_STATUS_KEY = "exit_status"
"""The key that marks a user's mistake there, next to torchrun's own keys."""


class UserError(Exception):
    """What was given, what was expected and how to fix it, in one message."""

    exit_status = USER_ERROR_STATUS


class ConfigError(UserError):
    """A key, a value or a combination of values in the configuration is wrong."""


class CorpusError(UserError):
    """A corpus or a tokenizer is missing, damaged, too small, or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or weights file is missing, damaged, or belongs to another model, method or corpus."""


class EnvironmentMismatchError(UserError):
    """The machine, the launcher or an optional package does not allow what the configuration asks for."""


class RanksDisagreeError(UserError):
    """Ranks no longer train one model. What was saved before is valid, and the run can resume from it."""

    exit_status = 4
    """Tells programs that run training that the configuration was sound."""


def abbreviate(names: Iterable[str]) -> str:
    """The first four names, and how many more there are."""
    names = list(names)
    num_more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {num_more} more" if num_more > 0 else "")


def exit_for(error: UserError) -> NoReturn:
    """Ends the program for a user's mistake, with the error's status (2 unless it says otherwise) and without a traceback.

    Prints the message; or, in one of several ranks, leaves it for the launcher, which prints the first one.
    """
    from switchtitan.files import (
        write_atomically,
    )  # here, because `files` raises errors of this module

    launcher_file = os.environ.get(_LAUNCHER_FILE)
    if launcher_file:
        reason = {
            "message": str(error),
            "timestamp": int(time.time()),
            EXIT_STATUS_KEY: error.exit_status,
        }
        # The launcher ends this rank at any time once another has failed, and then reads the file.
        write_atomically(Path(launcher_file), json.dumps(reason))
    else:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_status)
