"""A configuration written as TOML loads as an equal one."""

import math
from pathlib import Path

import pytest
import tomli
from pydantic import model_validator
from typing_extensions import Self

from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config
from switchtitan.config.section import Section
from switchtitan.config.toml_text import flatten, resolved_toml, toml_value


class Inner(Section):
    depth: int = 1


class Part(Section):
    text: str = "a"
    ratio: float = 1e-8
    maybe: float | None = 1.0
    place: Path = Path("out")
    names: tuple[str, ...] = ("x", "y")
    inner: Inner = Inner()


class Picky(Section):
    mode: str = "plain"
    speed: float = 1.0
    colour: str = "red"

    @model_validator(mode="after")
    def _check_speed(self) -> Self:
        if self.mode == "still" and "speed" in self.model_fields_set:
            raise ValueError("speed has no effect")
        return self


class Config(Section):
    part: Part = Part()
    picky: Picky = Picky()


@pytest.mark.parametrize(
    "value",
    ['quote " and \\ back', "line\nbreak", "tab\tbell\x07", "\x7f", "ünïcode ☃", "", "none so far"],
)
def test_any_string_reads_back(value: str) -> None:
    assert tomli.loads(f"key = {toml_value(value)}") == {"key": value}


@pytest.mark.parametrize(
    "value", [1, -3, True, 0.1, 1e-8, 1e300, math.inf, -math.inf, ["a", 1.5], []]
)
def test_any_value_reads_back(value: object) -> None:
    assert tomli.loads(f"key = {toml_value(value)}") == {"key": value}


def test_sections_in_a_list_read_back_as_tables() -> None:
    text = toml_value((Inner(depth=2), Inner(depth=3)))
    assert tomli.loads(f"value = {text}")["value"] == [{"depth": 2}, {"depth": 3}]


def test_nan_reads_back() -> None:
    assert math.isnan(tomli.loads(f"key = {toml_value(math.nan)}")["key"])


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            part=Part(
                text='say "no"',
                ratio=3,
                maybe=None,
                place=Path("a b"),
                names=(),
                inner=Inner(depth=4),
            )
        ),
        Config(picky=Picky(mode="still")),
    ],
)
def test_a_resolved_configuration_loads_as_an_equal_one(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "resolved.toml"
    file.write_text(resolved_toml(config))
    assert load_config(split_arguments([]), file, Config) == config


def test_only_a_default_that_may_not_be_set_becomes_a_comment() -> None:
    text = resolved_toml(Config(picky=Picky(mode="still")))
    assert '[picky]\nmode = "still"\n# speed = 1.0\ncolour = "red"\n' in text


def test_flatten_names_values_by_dotted_keys() -> None:
    table = {"a": {"b": {"c": 1}, "d": (2, 3)}, "e": "x"}
    assert flatten(table) == {"a.b.c": 1, "a.d": [2, 3], "e": "x"}
