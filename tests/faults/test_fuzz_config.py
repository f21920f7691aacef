"""Damaged configuration files and command lines are refused by name, or are valid."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli
from support.fuzzing import FuzzError, fuzz, num_cases
from support.mutations import EXTREME_NUMBERS, STRANGE_STRINGS, mutate_bytes, mutate_json
from support.tiny import METHOD_KEYS, TINY

from switchtitan.config import toml_files
from switchtitan.config.toml_text import toml_value
from switchtitan.job.config import parse_arguments

VALID = [
    TINY.format(folder="here", method=method.removesuffix("_mini"), method_keys=keys)
    for method, keys in METHOD_KEYS.items()
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def read(file: Path) -> object:
    return parse_arguments(["--config", str(file)], num_ranks=1)


def test_the_files_are_valid_without_damage(file: Path) -> None:
    for text in VALID:
        file.write_text(text)
        read(file)


@pytest.mark.parametrize("part", range(4))
def test_damaged_bytes(file: Path, part: int, bounded_memory: None) -> None:
    def damage(draw: random.Random) -> bytes:
        data = mutate_bytes(draw.choice(VALID).encode(), draw)
        file.write_bytes(data)
        return data

    number = num_cases(1250, 25)
    cases = range(part * number, (part + 1) * number)
    fuzz("configuration: bytes", damage, lambda: read(file), cases)


@pytest.mark.parametrize("part", range(4))
def test_damaged_values(file: Path, part: int, bounded_memory: None) -> None:
    def damage(draw: random.Random) -> str:
        text = as_toml(json.loads(mutate_json(tomli.loads(draw.choice(VALID)), draw)))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return text

    number = num_cases(1250, 25)
    cases = range(part * number, (part + 1) * number)
    fuzz("configuration: values", damage, lambda: read(file), cases)


def test_damaged_command_lines(file: Path, bounded_memory: None) -> None:
    config = parse_arguments(["--config", str(write_valid(file))], num_ranks=1)
    keys = [f"--{section}.{key}" for section, values in config for key in type(values).model_fields]
    values = [
        *map(str, EXTREME_NUMBERS[:-6]),
        "inf",
        "nan",
        *STRANGE_STRINGS,
        "[[1]]",
        "1979-05-27",
    ]
    arguments: list[str] = []

    def damage(draw: random.Random) -> list[str]:
        arguments[:] = ["--config", str(file)]
        for _ in range(draw.choice((1, 1, 2))):
            arguments.extend(
                (draw.choice((*keys, "--", "-x", "--a", "--job.")), draw.choice(values))
            )
        return list(arguments)

    cases = range(num_cases(2500, 50))
    fuzz("command line", damage, lambda: parse_arguments(arguments, num_ranks=1), cases)


def test_a_planted_fault_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader without its handling of syntax errors."""

    def read_without_checks(path: Path) -> dict[str, Any]:
        return tomli.loads(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(toml_files, "read_toml", read_without_checks)

    def damage(draw: random.Random) -> bytes:
        data = mutate_bytes(VALID[0].encode(), draw)
        file.write_bytes(data)
        return data

    with pytest.raises(FuzzError, match=r"TOMLDecodeError|UnicodeDecodeError"):
        fuzz("planted", damage, lambda: read(file), range(25))


def write_valid(file: Path) -> Path:
    file.write_text(VALID[0])
    return file


def as_toml(table: Mapping[str, Any]) -> str:
    """Values at the top first: below a table's header they would belong to it."""
    values = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{toml_value(key)} = {_value(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(f"[{toml_value(key)}]")
            lines += [f"{toml_value(name)} = {_value(item)}" for name, item in value.items()]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{toml_value(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(items)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return toml_value(value)
