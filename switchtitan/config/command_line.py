"""The command line: the configuration file, flags, and `--section.key value` overrides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from switchtitan.config.explain import COMMAND_LINE, Mistake, Override, nearest
from switchtitan.config.fields import KeyPath

HELP, HELP_ALL = "--help", "--help-all"

_OPTION = re.compile(r"--?[A-Za-z]")
"""Start of an option; does not match the values `-1` and `-1e-3`."""


@dataclass
class Arguments:
    """The command line, split but not interpreted."""

    config_file: str | None = None
    flags: set[str] = field(default_factory=set)
    """Options without a value."""
    overrides: dict[KeyPath, Override] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def wants_help(self) -> bool:
        """Whether a help is printed instead of the command's work."""
        return bool(self.flags & {HELP, HELP_ALL})


def split_arguments(
    argv: Sequence[str], section: str | None = None, flags: Sequence[str] = ()
) -> Arguments:
    """Split `--config FILE`, flags, `--section.key value ...` and `--section.key=value`.

    Args:
        section: keys of this section may be given without it, e.g. `--path` for `--data.path`.
        flags: options without a value, other than `--help` and `--help-all`.
    """
    arguments = Arguments()
    flags = (HELP, HELP_ALL, *flags)
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in (*flags, "-h"):
            arguments.flags.add(HELP if word == "-h" else word)
            continue
        if not word.startswith("--") or not _OPTION.match(word):
            arguments.mistakes.append(_mistake(word, "expected --section.key value"))
            continue
        option, equals, value = word.partition("=")
        values = [value] if equals else []
        while not equals and words and not _OPTION.match(words[0]):
            values.append(words.pop(0))
        _add_option(arguments, Override(option, values), section, flags)
    return arguments


def _add_option(
    arguments: Arguments, given: Override, section: str | None, flags: Sequence[str]
) -> None:
    path = tuple(given.option.removeprefix("--").replace("-", "_").split("."))
    near = nearest(given.option, (*flags, "--config"), cutoff=0.82)
    if given.option in flags:
        arguments.mistakes.append(_mistake(str(given), f"{given.option} has no value; remove it"))
    elif near not in (None, given.option):
        arguments.mistakes.append(_mistake(given.option, f"unknown option; did you mean {near}?"))
    elif not given.words:
        example = "FILE" if path == ("config",) else "VALUE"
        arguments.mistakes.append(
            _mistake(given.option, f"expected a value; write {given.option} {example}")
        )
    elif path == ("config",):
        if len(given.words) > 1 or arguments.config_file is not None:
            arguments.mistakes.append(_mistake(str(given), "expected one file, given once"))
        arguments.config_file = given.words[0]
    else:
        if section is not None and path[0] != section:
            path = (section, *path)
        if path in arguments.overrides:
            arguments.mistakes.append(_mistake(str(given), "given twice; keep one"))
        arguments.overrides[path] = given


def _mistake(place: str, problem: str) -> Mistake:
    return Mistake(COMMAND_LINE, f"{place}: {problem}")
