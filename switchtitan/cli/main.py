"""The console script `switchtitan`. Imports only the module of the chosen command."""

import atexit
import difflib
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from switchtitan import __version__
from switchtitan.cores import num_cores, set_thread_defaults
from switchtitan.errors import CLOSED_OUTPUT_STATUS, discard_output, is_output_closed

COMMANDS = {
    "train": "Train a model from a TOML configuration, or resume its run. One process is one rank.",
    "launch": "Start one process per rank: `switchtitan launch --nproc_per_node 8 train ...`.",
    "prepare": "Tokenize a corpus before training on it.",
    "inspect": "Show a corpus as the model sees it: counts, and sequences of tokens as text.",
    "evaluate": "Compute loss, perplexity and bits per byte of weights on held-out text.",
    "generate": "Continue a text with a trained model.",
    "export": "Write a checkpoint as a folder that transformers loads.",
    "compare": "Run or resume a declared comparison of methods and report the results.",
    "benchmark": "Time training steps of several configurations side by side.",
    "estimate": "Estimate memory, communication and operations of a step on any number of ranks.",
    "report": "Draw runs: curves, or the rank of their change, as a picture or one HTML page.",
    "doctor": "Say what this machine has and lacks for training, and how to fix it.",
}
"""Command -> its line in `switchtitan --help`. `switchtitan.cli.<command>` defines `main(argv)`."""
_STARTERS = ("launch", "compare")
"""Commands whose work is done by processes that they start. They choose threads for those, unless
the user has."""


def run(argv: Sequence[str] | None = None) -> None:
    """The console script `switchtitan`: `main`, whose exit status is kept in any case.

    If the reader of its output has gone, it ends without a message, with `CLOSED_OUTPUT_STATUS`.
    """
    try:
        try:
            main(argv)
        except SystemExit as stop:
            if isinstance(stop.code, int) and stop.code != 0:
                _exit(stop.code)
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not is_output_closed():
            raise
        discard_output()
        _exit(CLOSED_OUTPUT_STATUS)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: the command and its arguments; default: `sys.argv[1:]`.

    Raises:
        SystemExit: as the command does; with status 2 for an unknown command.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(help_text("switchtitan", COMMANDS))
    elif command == "--version":
        print(f"switchtitan {__version__}")
    else:
        if command not in _STARTERS:
            set_thread_defaults(os.environ, num_cores())  # before the command imports torch
        run_command("switchtitan", command, COMMANDS, arguments, "switchtitan.cli.{}")


def _exit(status: int) -> NoReturn:
    """Ends the process as Python does, but destroys no objects.

    An error leaves process groups behind. Their destruction aborts the process (status 134) if one
    of gloo's threads still runs.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def run_command(
    program: str, command: str, commands: dict[str, str], arguments: Sequence[str], modules: str
) -> None:
    """Imports the module of `command`, named by the pattern `modules`, and calls its `main`.

    Raises:
        SystemExit: with status 2 if there is no such command.
    """
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(commands)}"
        print(f"error: {program} {command}: unknown command; {hint}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(modules.format(command)).main(arguments)


def help_text(program: str, commands: dict[str, str]) -> str:
    """Returns the `--help` of a program with commands."""
    width = max(len(command) for command in commands)
    return "\n".join(
        [
            f"usage: {program} COMMAND [ARGUMENTS ...]",
            "",
            *(f"  {command:<{width}}  {sentence}" for command, sentence in commands.items()),
            "",
            f"`{program} COMMAND --help` lists the arguments of a command.",
        ]
    )
