"""Command-line arguments are parsed as values that the key accepts."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from switchtitan.config.command_line import split_arguments
from switchtitan.config.fields import interpret
from switchtitan.config.section import Section


class Everything(Section):
    flag: bool = False
    count: int = 1
    ratio: float = Field(default=0.5, ge=0)
    limit: float | None = None
    text: str = ""
    maybe_text: str | None = None
    place: Path = Path(".")
    mode: Literal["none", "full"] = "full"
    maybe_mode: Literal["none", "full"] | None = None
    names: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    resume: Literal["auto"] | int = "auto"


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        ("flag", ["true"], True),
        ("flag", ["false"], False),
        ("flag", ["False"], False),
        ("count", ["-3"], -3),
        ("count", ["1_000"], 1000),
        ("ratio", ["1e-3"], 1e-3),
        ("ratio", [".5"], 0.5),
        ("ratio", ["2"], 2),
        ("limit", ["none"], None),
        ("text", ["none"], "none"),
        ("text", ["123"], "123"),
        ("text", ['"quoted"'], "quoted"),
        ("text", ["a = b # c"], "a = b # c"),
        ("maybe_text", ["none"], None),
        ("place", ["with space/file"], "with space/file"),
        ("mode", ["none"], "none"),
        ("maybe_mode", ["none"], "none"),
        ("names", ["q_proj,v_proj"], ["q_proj", "v_proj"]),
        ("names", ['["q_proj", "v_proj"]'], ["q_proj", "v_proj"]),
        ("names", ["[q_proj, v_proj]"], ["q_proj", "v_proj"]),
        ("names", ["q_proj"], ["q_proj"]),
        ("names", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("names", ["1,2"], ["1", "2"]),
        ("pair", ["0.9,0.95"], [0.9, 0.95]),
        ("pair", ["0.9", "0.95"], [0.9, 0.95]),
        ("resume", ["auto"], "auto"),
        ("resume", ["7"], 7),
    ],
)
def test_words_are_parsed_as_a_value_that_the_key_accepts(
    key: str, words: list[str], value: object
) -> None:
    result = interpret(Everything.model_fields[key], words)
    assert result == value
    assert type(result) is type(value)


def test_words_that_the_key_does_not_accept_are_returned_for_validation() -> None:
    assert interpret(Everything.model_fields["count"], ["many"]) == "many"
    assert interpret(Everything.model_fields["count"], ["1.0"]) == 1.0
    assert interpret(None, ["1.0"]) == 1.0


def test_arguments_are_split() -> None:
    arguments = split_arguments(
        ["--a.x", "-1", "--config", "my file.toml", "--a.y=--odd", "--b.local-key", "1", "2", "-h"]
    )
    assert arguments.config_file == "my file.toml"
    assert arguments.wants_help
    words = {path: override.words for path, override in arguments.overrides.items()}
    assert words == {("a", "x"): ["-1"], ("a", "y"): ["--odd"], ("b", "local_key"): ["1", "2"]}
    assert arguments.mistakes == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--a.x"], "--a.x: expected a value; write --a.x VALUE"),
        (["--config"], "--config: expected a value; write --config FILE"),
        (["--hlep"], "--hlep: unknown option; did you mean --help?"),
        (["--confg", "a.toml"], "--confg: unknown option; did you mean --config?"),
        (["--steps"], "--steps: expected a value; write --steps VALUE"),
        (["--config", "a", "b"], "--config a b: expected one file, given once"),
        (["--config=a", "--config=b"], "--config b: expected one file, given once"),
        (["--a.x", "1", "--a.x=2"], "--a.x 2: given twice; keep one"),
        (["train.toml"], "train.toml: expected --section.key value"),
        (["-x"], "-x: expected --section.key value"),
        (["--help-al"], "--help-al: unknown option; did you mean --help-all?"),
        (["--help-all=1"], "--help-all 1: --help-all has no value; remove it"),
        (["--wet-run"], "--wet-run: expected a value; write --wet-run VALUE"),
    ],
)
def test_malformed_arguments_become_mistakes(argv: list[str], expected: str) -> None:
    assert [mistake.message for mistake in split_arguments(argv).mistakes] == [expected]


def test_keys_of_a_given_section_may_omit_it() -> None:
    arguments = split_arguments(["--path", "a", "--data.seq-len", "8"], section="data")
    assert {path: str(given) for path, given in arguments.overrides.items()} == {
        ("data", "path"): "--path a",
        ("data", "seq_len"): "--data.seq-len 8",
    }
    twice = split_arguments(["--path", "a", "--data.path", "b"], section="data")
    assert [mistake.message for mistake in twice.mistakes] == [
        "--data.path b: given twice; keep one"
    ]


def test_flags_have_no_value_and_exist_only_where_a_command_has_them() -> None:
    arguments = split_arguments(["--dry-run", "--a.x", "1", "--help-all"], flags=["--dry-run"])
    assert arguments.flags == {"--dry-run", "--help-all"}
    assert arguments.wants_help
    assert not split_arguments(["--dry-run"], flags=["--dry-run"]).wants_help
    assert arguments.mistakes == []
    (mistake,) = split_arguments(["--dryrun"], flags=["--dry-run"]).mistakes
    assert mistake.message == "--dryrun: unknown option; did you mean --dry-run?"
    assert split_arguments(["--dry-run"]).mistakes
