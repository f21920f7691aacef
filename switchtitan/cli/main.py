"""The console script `switchtitan`. A command's module, and with it torch, is imported only when it is chosen."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from switchtitan import __version__

COMMANDS = {
    "train": "Train a model from a TOML configuration, or resume its run. One process is one rank.",
    "launch": "Start one process per rank with torchrun: `switchtitan launch --nproc_per_node 8 train ...`.",
    "prepare": "Tokenize a corpus once, before the runs that train on it.",
    "evaluate": "Compute loss and perplexity of a checkpoint, or of other weights, on held-out tokens.",
    "export": "Write a checkpoint as a folder that transformers loads.",
    "compare": "Run a declared comparison of methods, or resume it, and report the results.",
    "benchmark": "Measure what training costs: steps, layers, optimizer, loader, checkpoints, start-up.",
    "estimate": "Estimate memory, communication and operations of a step on any number of ranks.",
    "plot": "Draw the curves of runs (`plot run`) or the rank of what they learned (`plot spectrum`).",
}
"""Command -> its line in `switchtitan --help`. The module `switchtitan.cli.<command>` has its `main(argv)`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: the command and its arguments; by default those of the process.

    Raises:
        SystemExit: as the command does; with status 2 for an unknown command.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(help_text("switchtitan", COMMANDS))
    elif command == "--version":
        print(f"switchtitan {__version__}")
    else:
        run_command("switchtitan", command, COMMANDS, arguments, "switchtitan.cli.{}")


def run_command(
    program: str, command: str, commands: dict[str, str], arguments: Sequence[str], modules: str
) -> None:
    """Imports the module of `command`, which `modules` names, and calls its `main`.

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
    """What `--help` prints for a program that consists of commands."""
    width = max(len(command) for command in commands)
    return "\n".join(
        [
            f"usage: {program} COMMAND [ARGUMENTS ...]",
            "",
            *(f"  {command:<{width}}  {sentence}" for command, sentence in commands.items()),
            "",
            f"{program} COMMAND --help lists the arguments of one.",
        ]
    )
