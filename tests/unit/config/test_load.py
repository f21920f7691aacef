"""Files and overrides become sections. All mistakes are reported in one message."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config, load_table
from switchtitan.config.section import NamedSection, Section
from switchtitan.config.shipped import FOLDER
from switchtitan.config.toml_files import read_toml, read_with_bases
from switchtitan.errors import ConfigError
from switchtitan.registry import Component, Registry


class Inner(Section):
    depth: int = 1


class Training(Section):
    steps: int = Field(ge=1)
    lr: float = 1.0
    clip: float | None = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    is_fast: bool = True
    folder: Path = Path("out")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tag: Annotated[str, Field(min_length=2)] = "ab"
    inner: Inner = Inner()

    @field_validator("tag")
    @classmethod
    def _check_tag(cls, tag: str) -> str:
        if " " in tag:
            raise ValueError("expected no spaces")
        return tag


class Lora(NamedSection):
    name: Literal["lora"] = "lora"
    rank: int = 4


class Switch(NamedSection):
    name: Literal["switch"] = "switch"
    rank: int = 4
    interval: int = 40
    freeze_steps: int = 5

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.interval < 2 * self.freeze_steps:
            raise ValueError(
                f"interval = {self.interval} is below 2 x freeze_steps = {2 * self.freeze_steps}"
            )
        return self


METHODS: Registry = Registry(
    "method", {"lora": Component(Lora, str), "switch": Component(Switch, str)}
)


class Job(Section):
    training: Training
    method: Annotated[NamedSection, METHODS]


GOOD = '[training]\nsteps = 3\n[method]\nname = "switch"\n'
Load = Callable[..., Job]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str, *argv: str, checks: tuple = ()) -> Job:
        file = tmp_path / "job.toml"
        file.write_text(text)
        return load_config(split_arguments(argv), file, Job, checks)

    return load_text


def message_of(load: Load, text: str, *argv: str, checks: tuple = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *argv, checks=checks)
    return str(caught.value)


def test_missing_keys_get_their_defaults(load: Load) -> None:
    assert load(GOOD) == Job(training=Training(steps=3), method=Switch())


def test_overrides_replace_values_of_the_file(load: Load) -> None:
    argv = [
        "--training.steps=7",
        "--training.clip",
        "none",
        "--training.inner.depth",
        "5",
        "--training.folder",
        "a b",
    ]
    expected = Training(steps=7, clip=None, inner=Inner(depth=5), folder=Path("a b"))
    assert load(GOOD, *argv).training == expected


def test_the_string_none_in_a_file_is_none(load: Load) -> None:
    training = load('[training]\nsteps = 3\nclip = "none"\n[method]\nname = "lora"').training
    assert training == Training(steps=3, clip=None)


def test_the_name_chooses_the_class(load: Load) -> None:
    assert load(GOOD, "--method.name", "lora").method == Lora()


def test_sections_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD).training.steps = 4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('steps = "8"', '[training] steps = "8": expected an integer >= 1; write 8'),
        ("steps = 8.0", "[training] steps = 8.0: expected an integer >= 1; write 8"),
        ("steps = 8.5", "[training] steps = 8.5: expected an integer >= 1"),
        ("steps = true", "[training] steps = true: expected an integer >= 1"),
        ("steps = 0", "[training] steps = 0: expected an integer >= 1"),
        ("", "[training] steps: missing; expected an integer >= 1"),
        ('steps = 1\nlr = "1e-3"', '[training] lr = "1e-3": expected a number; write 0.001'),
        ("steps = 1\nlr = false", "[training] lr = false: expected a number"),
        ("steps = 1\nclip = 0", '[training] clip = 0: expected a number > 0, or "none"'),
        (
            "steps = 1\nbetas = [0.9]",
            "[training] betas = [0.9]: expected a list of 2 items, each a number",
        ),
        (
            'steps = 1\nbetas = ["x", "y"]',
            '[training] betas = ["x", "y"]: expected a list of 2 items, each a number',
        ),
        ("steps = 1\nis_fast = 1", "[training] is_fast = 1: expected true or false"),
        ("steps = 1\nfolder = 7", '[training] folder = 7: expected a path; write "7"'),
        ('steps = 1\ntag = "a"', '[training] tag = "a": expected a string of length >= 2'),
        ('steps = 1\ntag = "a b"', '[training] tag = "a b": expected no spaces'),
        (
            "steps = 1\ntag = 2026-01-31",
            '[training] tag = 2026-01-31: expected a string of length >= 2; write "2026-01-31"',
        ),
        (
            'steps = 1\ndtype = "bf16"',
            '[training] dtype = "bf16": expected one of "bfloat16", "float32"; '
            'did you mean "bfloat16"?',
        ),
        ("steps = 1\nfoldre = 1", "[training] foldre = 1: unknown key; did you mean folder?"),
        ("steps = 1\nrank = 1", "[training] rank = 1: unknown key; did you mean [method] rank?"),
        (
            "steps = 1\ninner = 1",
            "[training] inner = 1: expected a table: [training.inner] and its keys below it",
        ),
        (
            "steps = 1\n[training.inner]\ndpth = 1",
            "[training.inner] dpth = 1: unknown key; did you mean depth?",
        ),
    ],
)
def test_a_wrong_value_is_reported_with_what_was_expected(
    load: Load, line: str, expected: str
) -> None:
    message = message_of(load, f'[method]\nname = "lora"\n[training]\n{line}\n')
    heading, where, *mistakes = message.splitlines()
    assert heading == "invalid configuration (1 error)"
    assert where.startswith("in ")
    assert where.endswith("job.toml:")
    assert mistakes == [f"  {expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "[trainig]\nsteps = 1", "[trainig]: unknown section; did you mean [training]?"),
        ("steps = 1\n" + GOOD, "steps = 1: unknown section; did you mean [training] steps?"),
        (
            "training = 3\n[method]\nname = 'lora'",
            "training = 3: expected a table: [training] and its keys below it",
        ),
        ("[training]\nsteps = 1", '[method] name: missing; expected one of "lora", "switch"'),
        (
            GOOD.replace("switch", "swich"),
            '[method] name = "swich": expected one of "lora", "switch"; did you mean "switch"?',
        ),
    ],
)
def test_a_wrong_section_is_reported_with_what_was_expected(
    load: Load, text: str, expected: str
) -> None:
    assert message_of(load, text).splitlines()[2:] == [f"  {expected}"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--training.steps", "many"], "--training.steps many: expected an integer >= 1"),
        (["--training.steps", "1.5"], "--training.steps 1.5: expected an integer >= 1"),
        (["--training.stesp", "1"], "--training.stesp 1: unknown key; did you mean steps?"),
        (
            ["--steps", "1"],
            "--steps 1: unknown option; expected --section.key value; "
            "did you mean --training.steps?",
        ),
        (
            ["--training.folder", "a", "b"],
            "--training.folder a b: expected a path, got 2 arguments; "
            "quote values that contain spaces",
        ),
        (["--traning.steps", "1"], "--traning.steps 1: unknown section; did you mean [training]?"),
        (
            ["--method.name", "lra"],
            '--method.name lra: expected one of "lora", "switch"; did you mean "lora"?',
        ),
        (
            ["--method.name", "lora", "--method.interval", "9"],
            '--method.interval 9: unknown key; it is a key of [method] name = "switch"',
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_shown_as_it_was_typed(
    load: Load, argv: list[str], expected: str
) -> None:
    assert message_of(load, GOOD, *argv).splitlines()[1:] == [
        "on the command line:",
        f"  {expected}",
    ]


def test_all_mistakes_are_in_one_message_grouped_by_source(load: Load) -> None:
    def check_rank(method: Switch, training: Training) -> list[str]:
        raise AssertionError("runs only when both sections are valid")

    def check_method(method: Switch) -> list[str]:
        return [f"rank = {method.rank} does not fit"]

    text = '[training]\nsteps = 0\nlr = "x"\n[method]\nname = "switch"\n'
    message = message_of(
        load, text, "--training.betas", "1", "--foo.bar", "2", checks=(check_rank, check_method)
    )
    lines = message.splitlines()
    assert lines[0] == "invalid configuration (5 errors)"
    assert lines[2].startswith("  [training] steps = 0")
    assert lines[3].startswith('  [training] lr = "x"')
    assert lines[4] == "on the command line:"
    assert {line.split(":")[0].strip() for line in lines[5:7]} == {
        "--training.betas 1",
        "--foo.bar 2",
    }
    assert lines[7:] == ["values that do not fit together:", "  rank = 4 does not fit"]


def test_a_check_inside_a_section_names_the_section(load: Load) -> None:
    message = message_of(load, GOOD, "--method.interval", "9")
    assert message.splitlines()[1:] == [
        "values that do not fit together:",
        "  [method] interval = 9 is below 2 x freeze_steps = 10",
    ]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "llama_350m.toml").touch()
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*llama_350m\.toml\?"):
        read_toml(tmp_path / "llama_35m.toml")
    with pytest.raises(ConfigError, match=r"no such file$"):
        read_toml(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match=r"no such file$"):
        read_toml(tmp_path / "nowhere" / "x.toml")


def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable file"):
        read_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe4"')
    with pytest.raises(ConfigError, match="expected UTF-8"):
        read_toml(tmp_path / "latin.toml")


def test_a_syntax_error_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text("[training]\nsteps = many\n")
    with pytest.raises(ConfigError, match=r"job\.toml: not valid TOML: .*line 2"):
        read_toml(file)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return write_file


def load_file(file: Path, *argv: str) -> Job:
    return load_config(split_arguments(argv), file, Job)


def test_a_base_adds_the_keys_that_the_file_lacks(write: Callable[..., Path]) -> None:
    write(
        "bases/lowest.toml",
        '[training]\nsteps = 1\nlr = 2.0\n[training.inner]\ndepth = 3\n[method]\nname = "lora"',
    )
    write(
        "bases/middle.toml",
        'base = "lowest.toml"\n[training]\nsteps = 2\ntag = "mid"\n[method]\nrank = 7',
    )
    top = write("top.toml", 'base = "bases/middle.toml"\n[training]\nsteps = 3\n')
    expected = Job(
        training=Training(steps=3, lr=2.0, tag="mid", inner=Inner(depth=3)), method=Lora(rank=7)
    )
    assert load_file(top) == expected
    assert load_file(top, "--training.tag", "line").training.tag == "line"


def test_another_name_keeps_none_of_the_bases_keys_of_that_section(
    write: Callable[..., Path],
) -> None:
    write("base.toml", '[training]\nsteps = 1\n[method]\nname = "switch"\ninterval = 90\nrank = 7')
    other = write("other.toml", 'base = "base.toml"\n[method]\nname = "lora"')
    assert load_file(other).method == Lora()
    same = write("same.toml", 'base = "base.toml"\n[method]\nname = "switch"\nfreeze_steps = 1')
    assert load_file(same).method == Switch(interval=90, rank=7, freeze_steps=1)
    write("nameless.toml", "[training]\nsteps = 1\n[method]\nrank = 7")
    named = write("named.toml", 'base = "nameless.toml"\n[method]\nname = "lora"')
    assert load_file(named).method == Lora(rank=7)


def test_a_missing_key_is_not_reported_with_the_base_whose_section_is_dropped(
    write: Callable[..., Path],
) -> None:
    class Sized(NamedSection):
        name: Literal["sized"] = "sized"
        rank: int

    rows = {"lora": Component(Lora, str), "sized": Component(Sized, str)}

    class SizedJob(Section):
        training: Training
        method: Annotated[NamedSection, Registry("method", rows)]

    write("base.toml", '[training]\nsteps = 1\n[method]\nname = "lora"\nrank = 7')
    top = write("top.toml", 'base = "base.toml"\n[method]\nname = "sized"')
    with pytest.raises(ConfigError) as caught:
        load_config(split_arguments([]), top, SizedJob)
    assert f"in {top}:" in str(caught.value)
    assert "base.toml" not in str(caught.value)


def test_a_mistake_is_reported_with_its_file(write: Callable[..., Path]) -> None:
    base = write(
        "base.toml", '[training]\nsteps = 0\nstesp = 1\n[traning]\n[method]\nname = "lora"'
    )
    top = write("top.toml", 'base = "base.toml"\n[training]\nlr = "x"\n[training.inner]\ndpth = 1')
    with pytest.raises(ConfigError) as caught:
        load_file(top)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "invalid configuration (5 errors)"
    in_base, in_top = lines.index(f"in {base}:"), lines.index(f"in {top}:")
    groups = {base: lines[in_base + 1 :][:3], top: lines[in_top + 1 :][:2]}
    assert sorted(line.split(":")[0] for line in groups[base]) == [
        "  [training] steps = 0",
        "  [training] stesp = 1",
        "  [traning]",
    ]
    assert sorted(line.split(":")[0] for line in groups[top]) == [
        "  [training.inner] dpth = 1",
        '  [training] lr = "x"',
    ]


def test_a_base_may_be_a_configuration_that_is_installed(write: Callable[..., Path]) -> None:
    own = write("own.toml", 'base = "llama_350m.toml"\n')
    given = read_with_bases(own, {})
    assert given.table["model"]["size"] == "350m"
    assert given.origins["model", "size"] == str(FOLDER / "llama_350m.toml")
    write("llama_350m.toml", '[model]\nsize = "own"')
    assert read_with_bases(own, {}).table == {"model": {"size": "own"}}


def test_a_base_that_cannot_be_read_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    write("llama_350m.toml", 'base = "top.toml"')
    top = write("top.toml", 'base = "llama_35m.toml"')
    with pytest.raises(
        ConfigError,
        match=r'top\.toml: base = "llama_35m\.toml": no such file; did you mean .*350m',
    ):
        load_file(top)
    top = write("top.toml", 'base = "llama_350m.toml"')
    with pytest.raises(
        ConfigError, match=r"based on itself: .*top\.toml -> .*llama_350m\.toml -> .*top\.toml"
    ):
        load_file(top)
    top = write("top.toml", "base = 3")
    with pytest.raises(ConfigError, match="base = 3: expected the path of a TOML file"):
        load_file(top)
    top = write("top.toml", 'bsae = "llama_350m.toml"\n' + GOOD)
    with pytest.raises(
        ConfigError, match=r'bsae = "llama_350m\.toml": unknown section; did you mean base = "FILE"'
    ):
        load_file(top)


def test_a_row_registered_later_can_be_chosen(load: Load) -> None:
    class Toy(NamedSection):
        name: Literal["toy"] = "toy"
        size: int = Field(default=2, ge=1)

    text = GOOD.replace("switch", "toy") + "size = 5\n"
    with METHODS.registered("toy", Component(Toy, str)):
        assert load(text).method == Toy(size=5)
        assert "[method] size = 0: expected an integer >= 1" in message_of(
            load, text.replace("5", "0")
        )
        assert METHODS.build(Toy(size=3)) == "name='toy' size=3"
    message = message_of(load, text)
    assert '[method] name = "toy": expected one of "lora", "switch"' in message


def test_a_row_needs_a_unique_name_that_is_its_section_s_default() -> None:
    with pytest.raises(ValueError, match="'lora' is registered already"):
        METHODS.register("lora", Component(Lora, str))
    with pytest.raises(ValueError, match="defaults to 'lora'; expected 'other'"):
        METHODS.register("other", Component(Lora, str))


class Shelf(Section):
    title: str
    books: tuple[Training, ...] = Field(min_length=1)


def test_mistakes_in_a_list_of_tables_name_the_table(write: Callable[..., Path]) -> None:
    file = write(
        "shelf.toml",
        "titel = 1\n[[books]]\nsteps = 1\n[[books]]\nsteps = 0\nstesp = 2\ninner = 3\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_table(file, Shelf)
    assert set(str(caught.value).splitlines()) == {
        "invalid configuration (5 errors)",
        f"in {file}:",
        "  title: missing; expected a string",
        "  titel = 1: unknown key; did you mean title?",
        "  [[books]] number 2, steps = 0: expected an integer >= 1",
        "  [[books]] number 2, stesp = 2: unknown key; did you mean steps?",
        "  [[books]] number 2, inner = 3: expected a table",
    }
