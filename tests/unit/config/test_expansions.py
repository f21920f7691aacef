"""A key that stands for other keys of its section, and what contradicts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest

from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config
from switchtitan.config.section import NamedSection, Section
from switchtitan.errors import ConfigError
from switchtitan.registry import Component, Registry


class Shape(NamedSection):
    source: str | None = None
    sides: int | None = None
    color: str = "red"


class Square(Shape):
    name: Literal["square"] = "square"


class Round(Shape):
    name: Literal["round"] = "round"


SHAPES: Registry[Shape, object] = Registry(
    "shape", {"square": Component(Square, object), "round": Component(Round, object)}
)


class Job(Section):
    shape: Annotated[Shape, SHAPES]


KEYS = {"square.txt": {"name": "square", "sides": 4}, "round.txt": {"name": "round", "sides": None}}


def keys_of(source: str) -> dict[str, object]:
    if source not in KEYS:
        raise ConfigError(f"no file {source}")
    return KEYS[source]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Shape]:
    def load(text: str, *words: str) -> Shape:
        file = tmp_path / "run.toml"
        file.write_text(text)
        arguments = split_arguments(list(words))
        expansions = {("shape", "source"): keys_of}
        return load_config(arguments, file, Job, expansions=expansions).shape

    return load


def test_the_key_gives_class_and_keys_and_is_not_kept(load: Callable[..., Shape]) -> None:
    text = '[shape]\nsource = "square.txt"\ncolor = "blue"'
    assert load(text) == Square(sides=4, color="blue")
    assert load("[shape]", "--shape.source", "round.txt") == Round()
    assert load(text, "--shape.source", "round.txt") == Round(color="blue")
    assert load("", "--shape.source", "round.txt") == Round()


def test_keys_that_agree_are_accepted(load: Callable[..., Shape]) -> None:
    text = '[shape]\nname = "square"\nsource = "square.txt"\nsides = 4'
    assert load(text, "--shape.sides", "4") == Square(sides=4)
    assert load('[shape]\nsource = "round.txt"\nsides = "none"') == Round()


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            '[shape]\nsource = "square.txt"\nsides = 5',
            [],
            '[shape] sides = 5: contradicts source = "square.txt", which says 4',
        ),
        (
            '[shape]\nsource = "square.txt"',
            ["--shape.sides", "5"],
            '--shape.sides 5: contradicts source = "square.txt", which says 4',
        ),
        (
            '[shape]\nname = "round"\nsource = "square.txt"',
            [],
            '[shape] name = "round": contradicts source = "square.txt", which says "square"',
        ),
        ('[shape]\nsource = "lost.txt"', [], '[shape] source = "lost.txt": no file lost.txt'),
        ("", ["--shape.source", "lost.txt"], "--shape.source lost.txt: no file lost.txt"),
        ("[shape]\nsource = 3", [], "[shape] name: missing"),
        ('[shape]\nname = "round"\nsource = 3', [], "[shape] source = 3: expected a string"),
        ("shape = 3", ["--shape.source", "round.txt"], "shape = 3: expected a table"),
    ],
)
def test_contradictions_and_failures_are_mistakes(
    load: Callable[..., Shape], text: str, words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, *words)
    assert message in str(caught.value)


def test_no_value_expands_nothing(load: Callable[..., Shape]) -> None:
    text = '[shape]\nname = "square"\nsource = "none"'
    assert load(text) == Square()
    assert load('[shape]\nname = "round"\nsource = "lost.txt"', "--shape.source", "none") == Round()


def test_the_section_takes_no_keys_from_a_base(load: Callable[..., Shape], tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[shape]\nname = "round"\nsides = 7\ncolor = "green"')
    assert load('base = "base.toml"\n[shape]\nsource = "square.txt"') == Square(sides=4)
    assert load('base = "base.toml"\n[shape]\nsides = 3') == Round(sides=3, color="green")


def test_the_command_line_s_key_wins_over_keys_of_the_file(
    load: Callable[..., Shape], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = '[shape]\nname = "round"\nsides = 7\ncolor = "blue"'
    assert load(text, "--shape.source", "square.txt") == Square(sides=4, color="blue")
    assert capsys.readouterr().err.splitlines() == [
        'note: --shape.source square.txt: kept shape.color = "blue", meant for name = "round"',
        f"note: --shape.source square.txt: dropped shape.sides = 7 of {tmp_path / 'run.toml'}: "
        "--shape.source sets it",
    ]
    with pytest.raises(ConfigError, match=r"--shape.sides 7: contradicts source"):
        load(text, "--shape.source", "square.txt", "--shape.sides", "7")
    with pytest.raises(ConfigError, match=r"--shape.name round: contradicts source"):
        load(text, "--shape.source", "square.txt", "--shape.name", "round")
