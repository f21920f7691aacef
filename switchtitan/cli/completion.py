"""Prints a script with which a shell completes commands, options and keys.

    source <(switchtitan completion bash)          bash, in ~/.bashrc
    source <(switchtitan completion zsh)           zsh, in ~/.zshrc after compinit
    switchtitan completion fish > ~/.config/fish/completions/switchtitan.fish

The script holds all words, so that completing starts no Python. Print it again after an update."""

import argparse
import importlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field

from switchtitan.benchmark.commands import COMMANDS as BENCHMARKS
from switchtitan.cli.main import COMMANDS
from switchtitan.cli.plot import PICTURES
from switchtitan.config.fields import choices, dotted_keys, is_section_type
from switchtitan.config.load import section_types
from switchtitan.config.section import Section
from switchtitan.job.config import DRY_RUN, JobConfig

SHELLS = ("bash", "zsh", "fish")
_OPTION = re.compile(r"^ +(?:-\w, )?(--[\w-]+)", re.MULTILINE)
"""An option in a help of argparse."""
_CHOICES = re.compile(r"(--[\w-]+) \{([\w.,-]+)\}")


@dataclass
class Words:
    """What can stand after a command."""

    subcommands: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    """Option -> its allowed values, if there are few."""
    takes_files: bool = True
    """Whether a word that is not an option may be a file."""


def main(argv: Sequence[str]) -> None:
    """Prints the script."""
    parser = argparse.ArgumentParser(
        prog="switchtitan completion",
        description="Prints a script with which a shell completes commands, options and keys.",
        epilog="For bash: source <(switchtitan completion bash)",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    shell = parser.parse_args(argv).shell
    words = all_words()
    print({"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[shell](words), end="")


def all_words() -> dict[str, Words]:
    """Returns what can stand after each command."""
    words = {command: _words_of_help([command]) for command in COMMANDS if command != "completion"}
    words["completion"] = Words(list(SHELLS), ["--help"])
    keys, values = _keys()
    words["train"] = Words(
        [], ["--config", DRY_RUN, "--help", "--help-all", *keys], values, takes_files=False
    )
    own = [f"--{key.partition('.')[2]}" for key in keys if key.startswith("--data.")]
    words["prepare"] = Words(
        [],
        ["--config", "--help", "--help-all", *own],
        {
            f"--{key.partition('.')[2]}": allowed
            for key, allowed in values.items()
            if key.startswith("--data.")
        },
        takes_files=False,
    )
    words["doctor"].takes_files = False
    words["launch"].subcommands = ["train", "benchmark"]
    words["plot"] = _with_subcommands("plot", PICTURES)
    words["benchmark"] = _with_subcommands("benchmark", [command.name for command in BENCHMARKS])
    for command in ("estimate", "benchmark"):  # keys override those of all configurations
        words[command].options += keys
        words[command].values |= values
    return words


def _keys() -> tuple[list[str], dict[str, list[str]]]:
    """Returns every key of every section class as an option, and the values of those with few."""
    keys: dict[str, None] = {}
    values: dict[str, list[str]] = {}
    for section, types in section_types(JobConfig).items():
        classes = list(types.values()) if isinstance(types, Mapping) else [types]
        for section_type in classes:
            keys |= dict.fromkeys(f"--{key}" for key in dotted_keys({section: section_type}))
            for key, allowed in _values(section, section_type):
                values[key] = list(dict.fromkeys([*values.get(key, []), *allowed]))
        if isinstance(types, Mapping):
            values[f"--{section}.name"] = list(types)
    return list(keys), values


def _values(path: str, section_type: type[Section]) -> Iterator[tuple[str, list[str]]]:
    for key, key_field in section_type.model_fields.items():
        annotation = key_field.annotation
        if is_section_type(annotation):
            yield from _values(f"{path}.{key}", annotation)  # type: ignore[arg-type]
        elif annotation is bool:
            yield f"--{path}.{key}", ["true", "false"]
        elif allowed := choices(key_field):
            yield f"--{path}.{key}", allowed


def _with_subcommands(command: str, subcommands: Iterable[str]) -> Words:
    """The options of all subcommands, together."""
    words = Words(list(subcommands))
    for subcommand in subcommands:
        found = _words_of_help([command, subcommand])
        words.options += [option for option in found.options if option not in words.options]
        words.values |= found.values
    return words


def _words_of_help(arguments: Sequence[str]) -> Words:
    """Reads the options in a command's `--help`."""
    command, *rest = arguments
    module = importlib.import_module(f"switchtitan.cli.{command.replace('-', '_')}")
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        module.main([*rest, "--help"])
    shown = text.getvalue()
    return Words(
        options=list(dict.fromkeys([*_OPTION.findall(shown), "--help"])),
        values={option: allowed.split(",") for option, allowed in _CHOICES.findall(shown)},
    )


def bash_script(words: Mapping[str, Words]) -> str:
    """Returns the script for bash. Where it has no word, bash completes file names."""
    return f"""\
# Completion of switchtitan, made by `switchtitan completion bash`.
_switchtitan() {{
    local word="$2" previous="$3" command="" item options="" plain=""
    # What stands before the word, without `switchtitan`.
    for item in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command/$item" in
            launch/train | launch/benchmark | /*) command="$item" ;;
        esac
    done
    COMPREPLY=()
    case "$command" in
        "") options="{" ".join([*words, "--help", "--version"])}"; plain="$options" ;;
{_bash_cases(words)}
    esac
    case "$command $previous" in
{_bash_values(words)}
        *" --"*)
            # A value, such as a file: only a flag can be followed by an option.
            [[ "$word" == -* ]] || options=""
            ;;
        *) [[ "$word" == -* ]] || options="$plain" ;;
    esac
    COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _switchtitan switchtitan
"""


def zsh_script(words: Mapping[str, Words]) -> str:
    """Returns the script for zsh, which runs that for bash."""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash_script(words)}"


def fish_script(words: Mapping[str, Words]) -> str:
    """Returns the script for fish."""
    lines = ["# Completion of switchtitan, made by `switchtitan completion fish`."]
    for command in words:
        sentence = COMMANDS[command].replace("'", "\\'")
        lines.append(
            f"complete -c switchtitan -f -n __fish_use_subcommand -a {command} -d '{sentence}'"
        )
    for command, after in words.items():
        condition = f"-n '__fish_seen_subcommand_from {command}'"
        if after.subcommands:
            lines.append(f"complete -c switchtitan {condition} -a '{' '.join(after.subcommands)}'")
        for option in after.options:
            allowed = after.values.get(option)
            ending = f" -x -a '{' '.join(allowed)}'" if allowed else ""
            lines.append(f"complete -c switchtitan {condition} -l {option[2:]}{ending}")
    return "\n".join(lines) + "\n"


def _bash_cases(words: Mapping[str, Words]) -> str:
    """Sets `options` to all words, and `plain` to those that complete an empty word."""
    lines = []
    for command, after in words.items():
        plain = " ".join(after.subcommands)
        if not (after.takes_files or plain):
            plain = "$options"
        options = " ".join([*after.subcommands, *after.options])
        lines.append(f'        {command}) options="{options}"; plain="{plain}" ;;')
    return "\n".join(lines)


def _bash_values(words: Mapping[str, Words]) -> str:
    """Sets `options` to the values of an option, for each option that has few."""
    by_values: dict[str, list[str]] = {}
    for command, after in words.items():
        for option, allowed in after.values.items():
            by_values.setdefault(" ".join(allowed), []).append(f'"{command} {option}"')
    return "\n".join(
        f'        {" | ".join(patterns)}) options="{allowed}" ;;'
        for allowed, patterns in by_values.items()
    )
