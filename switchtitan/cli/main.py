"""The console script `switchtitan`: one frame for all commands.

A command is a module with `add_arguments(parser)` and `run(options)`, which prints for people and
returns what `--json` writes. Only the module of the chosen command is imported.
"""

import argparse
import atexit
import difflib
import importlib
import io
import json
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from switchtitan import __version__, errors
from switchtitan.cores import num_cores, set_thread_defaults
from switchtitan.files import write_atomically

COMMANDS = {
    "train": "Train a model from a TOML configuration, or resume its run. One process is one rank.",
    "launch": "Start one process per rank: `switchtitan launch --nproc_per_node 8 train ...`.",
    "prepare": "Tokenize a corpus before training on it, or show it as the model sees it.",
    "evaluate": "Compute loss, perplexity and bits per byte of weights on held-out text.",
    "generate": "Continue a text with a trained model.",
    "export": "Write a checkpoint as a folder that transformers loads.",
    "compare": "Run or resume a declared comparison of methods and report the results.",
    "benchmark": "Compare steps of several configurations: times, or bounds on a GPU without one.",
    "estimate": "Estimate memory, communication and operations of a step on any number of ranks.",
    "report": "Draw runs: curves, or the rank of their change, as a picture or one HTML page.",
    "doctor": "Say what this machine has and lacks for training, and how to fix it.",
}
"""Command -> its line in `switchtitan --help`."""
_STARTERS = ("launch", "compare")
"""Commands whose work is done by processes that they start. They choose threads for those, unless
the user has."""
_WITHOUT_OPTIONS = ("train", "launch")
"""Commands whose `run` takes the words themselves: keys of the configuration, or torchrun's."""
_WITH_KEYS = ("prepare", "benchmark", "estimate")
"""Commands that also take keys of the configuration: `options.keys` are their words."""
_TELLING = ("prepare", "compare")
"""Commands whose log is shown."""
_STDOUT = "-"
_RESULT_START = b'{\n  "command": "switchtitan '
"""How a file that `--json` wrote begins."""

T = TypeVar("T")


def run(argv: Sequence[str] | None = None) -> None:
    """The console script `switchtitan`: `main`, whose exit status is kept in any case.

    If the reader of its output has gone, it ends without a message, with `CLOSED_OUTPUT_STATUS`.
    """
    try:
        try:
            main(argv)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                raise
            if stop.code:
                _exit(stop.code)
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # fails again if it is this pipe, and not, say, that of a tracker
        except BrokenPipeError:
            errors.discard_output()
            _exit(errors.CLOSED_OUTPUT_STATUS)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command `argv[0]`; default: that of `sys.argv`. Raises SystemExit with the status of
    a user's mistake, or 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else argv
    command, words = _parse_command(argv[:1] or ["--help"]), argv[1:]
    try:
        if command not in _STARTERS:
            set_thread_defaults(os.environ, num_cores())  # before the command imports torch
        module = importlib.import_module(f"switchtitan.cli.{command}")
        if command in _WITHOUT_OPTIONS:
            module.run(words)
        else:
            _run(module, command, words)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("switchtitan"):
            raise
        problem = (
            f"the package {error.name!r} is missing; run pip install '.[train]' in the checkout"
        )
        errors.exit_for(errors.ConfigError(problem))
    except (errors.UserError, KeyboardInterrupt) as end:
        errors.exit_for(end)


def _run(module: ModuleType, command: str, words: Sequence[str]) -> None:
    """Parses the words, runs the command, and writes its result."""
    parser = argparse.ArgumentParser(
        prog=f"switchtitan {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_json(parser)
    module.add_arguments(parser)
    options, keys = parser.parse_known_args(words)
    if keys and command not in _WITH_KEYS:
        parser.error(f"unrecognized arguments: {' '.join(keys)}")
    if options.json is not None:
        _check_json(Path(options.json))
    options.keys, options.command = keys, shlex.join(["switchtitan", command, *words])
    handler = logging.StreamHandler()
    handler.set_name("switchtitan")  # `configure_logging` replaces it
    logging.basicConfig(format="%(message)s", handlers=[handler])
    if command in _TELLING:
        logging.getLogger("switchtitan").setLevel(logging.INFO)
    errors.interrupt_on_sigterm()
    with redirect_stdout(io.StringIO()) if options.json == _STDOUT else nullcontext():
        result: dict[str, Any] | None = module.run(options)
    if result is None:  # on other ranks than the main one
        return
    status = result.pop("exit_status", 0)
    if options.json is not None:
        text = json.dumps({"command": options.command, **result}, indent=2)
        if options.json == _STDOUT:
            print(text, flush=True)
        else:
            try:
                write_atomically(Path(options.json), f"{text}\n")
            except OSError as error:
                problem = f"--json {options.json}: cannot be written: {error.strerror}"
                raise errors.ConfigError(problem) from error
    if status != 0:
        raise SystemExit(status)


def _check_json(file: Path) -> None:
    """Checks `--json FILE` before hours of measuring. Only an earlier result is overwritten."""
    if not os.path.exists(file.absolute().parent) or (os.path.exists(file) and file.is_dir()):
        raise errors.ConfigError(f"--json {file}: expected a file in a folder that exists")
    if not os.path.isfile(file):
        return
    start = b"of a file that cannot be read"
    with suppress(OSError), file.open("rb") as stream:
        start = stream.read(len(_RESULT_START))
    if start not in (b"", _RESULT_START):
        raise errors.ConfigError(
            f"--json {file}: exists and is no result of --json, so it is not overwritten; name "
            "another file, or print the result with --json=-"
        )


def _exit(status: int) -> NoReturn:
    """Ends the process as Python does, but destroys no objects: process groups that an error leaves
    behind would abort it if a thread of gloo still runs."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def _parse_command(argv: Sequence[str]) -> str:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="switchtitan",
        usage="switchtitan COMMAND [ARGUMENTS ...]",
        description="\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
        epilog="`switchtitan COMMAND --help` lists the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"switchtitan {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    if argv[0] not in COMMANDS and (near := difflib.get_close_matches(argv[0], COMMANDS, n=1)):
        parser.error(f"{argv[0]}: no such command; did you mean {near[0]}?")
    command: str = parser.parse_args(argv).command
    return command


# Arguments of several commands.
def add_json(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds `--json`; to the parser of a sub-command with `default = argparse.SUPPRESS`."""
    where = "also write the result to FILE; without FILE, or with -, print it instead of the text"
    parser.add_argument(
        "--json", nargs="?", const=_STDOUT, default=default, metavar="FILE", help=where
    )


def number(
    convert: Callable[[str], T], is_valid: Callable[[T], bool], expected: str
) -> Callable[[str], T]:
    """Returns an argparse type that accepts valid numbers, and names what it expected."""

    def parse(word: str) -> T:
        with suppress(ValueError):
            value = convert(word)
            if is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{word}: expected {expected}")

    return parse


positive_int = number(int, lambda value: value >= 1, "an integer >= 1")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the weights of `evaluate` and `generate`, and how to read them."""
    weights = "a run, a checkpoint, a Hugging Face folder, a LoRA adapter or a safetensors file"
    parser.add_argument("target", type=Path, metavar="TARGET", help=weights)
    tokenizer = "a tokenizer.json or a folder with one (default: the run's, or next to the weights)"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=tokenizer)
    model = "a configuration with the model (default: that of the checkpoint, or of config.json)"
    parser.add_argument("--config", metavar="FILE", help=model)
    dtype = "of the computation (default: the checkpoint's; for other weights bfloat16 if native)"
    parser.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=dtype
    )
