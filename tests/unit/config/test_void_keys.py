"""The command line drops keys of a file that it leaves without effect, and so does a file those of
its base; both say so."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import model_validator
from typing_extensions import Self

from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config
from switchtitan.config.section import NamedSection, Section, VoidKey, VoidKeyError
from switchtitan.config.toml_text import resolved_toml
from switchtitan.config.void_keys import print_note
from switchtitan.errors import ConfigError
from switchtitan.registry import Component, Registry


class Schedule(Section):
    decay: Literal["linear", "constant"] = "linear"
    decay_ratio: float = 0.5
    decay_start: int = 1
    steps: int = 9

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.decay == "constant":
            void = [
                VoidKey(key, ("decay",), f"{key} has no effect without decay")
                for key in ("decay_ratio", "decay_start")
                if key in self.model_fields_set
            ]
            others = ["steps must be odd"] if self.steps % 2 == 0 else []
            if void:
                raise VoidKeyError(void, others)
        return self


class Fixed(NamedSection):
    name: Literal["fixed"] = "fixed"
    rank: int = 4
    init: Literal["zero", "normal"] = "normal"


class Switch(NamedSection):
    name: Literal["switch"] = "switch"
    rank: int = 4
    init: Literal["normal", "balanced"] = "normal"
    interval: int = 40
    size: Literal["s", "m"] | None = None
    width: int | None = None

    @classmethod
    def implied_by(cls, key: str, value: object) -> Mapping[str, object]:
        widths: dict[object, int] = {"s": 1, "m": 2}
        return {"width": widths[value]} if key == "size" and value in widths else {}


METHODS: Registry = Registry(
    "method", {"fixed": Component(Fixed, str), "switch": Component(Switch, str)}
)


class Job(Section):
    schedule: Schedule
    method: Annotated[NamedSection, METHODS]


def check_short(schedule: Schedule, method: Switch) -> list[VoidKey]:
    if schedule.steps > 3 or method.name != "switch" or "interval" not in method.model_fields_set:
        return []
    return [VoidKey("method.interval", ("schedule.steps",), "interval has no effect so early")]


Load = Callable[..., tuple[Job, list[str]]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(
        text: str, *argv: str, heading: str | None = None, base: str | None = None
    ) -> tuple[Job, list[str]]:
        file = tmp_path / "job.toml"
        file.write_text(text if base is None else f'base = "base.toml"\n{text}')
        (tmp_path / "base.toml").write_text(base or "")
        notes: list[str] = []
        job = load_config(
            split_arguments(argv), file, Job, [check_short], heading, say=notes.append
        )
        names = {str(file): "FILE", str(tmp_path / "base.toml"): "BASE"}
        for path, name in names.items():
            notes = [note.replace(path, name) for note in notes]
        return job, notes

    return load_text


SWITCH = '[method]\nname = "switch"\n'
DECAYS = SWITCH + "[schedule]\ndecay_ratio = 0.2\ndecay_start = 3\n"


def test_a_key_that_the_command_line_makes_void_is_dropped_with_a_note(load: Load) -> None:
    job, notes = load(DECAYS, "--schedule.decay", "constant")
    assert job.schedule == Schedule(decay="constant")
    assert notes == [
        "--schedule.decay constant: dropped schedule.decay_ratio = 0.2 of FILE: "
        "it has no effect now",
        "--schedule.decay constant: dropped schedule.decay_start = 3 of FILE: it has no effect now",
    ]
    saved = resolved_toml(job)
    assert "# decay_ratio = 0.5" in saved
    assert load(saved) == (job, [])


def test_a_key_that_keeps_its_effect_is_kept(load: Load) -> None:
    job, notes = load(DECAYS, "--schedule.steps", "5")
    assert job.schedule == Schedule(decay_ratio=0.2, decay_start=3, steps=5)
    assert notes == []


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        # Void by the file alone, also if the command line repeats the file.
        (DECAYS + 'decay = "constant"\n', []),
        (DECAYS + 'decay = "constant"\n', ["--schedule.decay", "constant"]),
        (DECAYS + 'decay = "constant"\n', ["--schedule.steps", "5"]),
        # Set by the command line itself.
        (SWITCH, ["--schedule.decay", "constant", "--schedule.decay_ratio", "0.2"]),
        (SWITCH + '[schedule]\ndecay = "constant"\n', ["--schedule.decay_ratio", "0.2"]),
    ],
)
def test_other_void_keys_are_errors(load: Load, text: str, argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="decay_ratio has no effect without decay"):
        load(text, *argv)


def test_overrides_of_a_program_drop_nothing(load: Load) -> None:
    with pytest.raises(ConfigError, match="decay_ratio has no effect"):
        load(DECAYS, "--schedule.decay", "constant", heading="in row x:")
    with pytest.raises(ConfigError, match="unknown key"):
        load(SWITCH + "interval = 3\n", "--method.name", "fixed", heading="in row x:")


def test_other_mistakes_are_still_reported_once(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(DECAYS + "steps = 4\nstep = 1\n", "--schedule.decay", "constant")
    assert str(caught.value).count("unknown key") == 1
    assert "decay_ratio" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"\(1 error\)\n.*\n.*steps must be odd"):
        load(DECAYS + "steps = 4\n", "--schedule.decay", "constant", "--schedule.decay_start", "2")


def test_a_check_between_sections_drops_a_key(load: Load) -> None:
    text = SWITCH + "interval = 50\n"
    job, notes = load(text, "--schedule.steps", "3")
    assert job.method == Switch()
    assert notes == [
        "--schedule.steps 3: dropped method.interval = 50 of FILE: it has no effect now"
    ]
    with pytest.raises(ConfigError, match="interval has no effect so early"):
        load(text + "[schedule]\nsteps = 3\n")


def test_another_name_keeps_what_it_has_and_says_both(load: Load) -> None:
    text = SWITCH + 'rank = 8\ninit = "balanced"\ninterval = 50\n'
    job, notes = load(text, "--method.name", "fixed")
    assert job.method == Fixed(rank=8)
    assert notes == [
        '--method.name fixed: dropped method.init = "balanced", method.interval = 50 of FILE: '
        'not for [method] name = "fixed"',
        '--method.name fixed: kept method.rank = 8, meant for name = "switch"',
    ]
    assert load(text, "--method.name", "switch")[1] == []
    assert load(text, "--method.name", "fixed", "--method.rank", "2")[1] == notes[:1]


def test_a_misspelt_key_or_one_on_the_command_line_is_an_error_with_another_name(
    load: Load,
) -> None:
    with pytest.raises(ConfigError, match=r"\[method\] intervall = 50: unknown key"):
        load(SWITCH + "intervall = 50\n", "--method.name", "fixed")
    with pytest.raises(ConfigError, match=r"--method.interval 9: unknown key"):
        load(SWITCH, "--method.name", "fixed", "--method.interval", "9")


def test_a_key_that_sets_others_drops_those_that_contradict_it(load: Load) -> None:
    text = SWITCH + "width = 1\n"
    job, notes = load(text, "--method.size", "m")
    assert job.method == Switch(size="m")
    assert notes == ["--method.size m: dropped method.width = 1 of FILE: --method.size sets it"]
    assert load(text, "--method.size", "s") == (
        Job(schedule=Schedule(), method=Switch(size="s", width=1)),
        [],
    )
    both = load(text, "--method.size", "m", "--method.width", "7")
    assert both == (Job(schedule=Schedule(), method=Switch(size="m", width=7)), [])
    in_file = load(text + 'size = "m"\n', "--method.rank", "2")
    assert in_file == (Job(schedule=Schedule(), method=Switch(size="m", width=1, rank=2)), [])


@pytest.mark.parametrize("heading", [None, "in row x:"])
def test_a_key_of_the_base_that_the_file_makes_void_is_dropped_with_a_note(
    load: Load, heading: str | None
) -> None:
    job, notes = load('[schedule]\ndecay = "constant"\n', base=DECAYS, heading=heading)
    assert job.schedule == Schedule(decay="constant")
    assert notes == [
        "FILE: dropped schedule.decay_ratio = 0.2 of BASE: it has no effect now",
        "FILE: dropped schedule.decay_start = 3 of BASE: it has no effect now",
    ]


@pytest.mark.parametrize(
    ("text", "base", "argv"),
    [
        # Void by the base alone, or set by the file or the command line itself.
        ("", DECAYS + 'decay = "constant"\n', []),
        ('[schedule]\ndecay = "constant"\ndecay_ratio = 0.2\n', DECAYS, []),
        ("[schedule]\ndecay_ratio = 0.2\n", SWITCH + '[schedule]\ndecay = "constant"\n', []),
        ('[schedule]\ndecay = "constant"\n', DECAYS, ["--schedule.decay_ratio", "0.3"]),
    ],
)
def test_other_void_keys_of_files_with_a_base_are_errors(
    load: Load, text: str, base: str, argv: list[str]
) -> None:
    with pytest.raises(ConfigError, match="decay_ratio has no effect without decay"):
        load(text, *argv, base=base)


def test_a_key_that_sets_others_drops_those_of_the_base_that_contradict_it(load: Load) -> None:
    width = SWITCH + "width = 1\n"
    job, notes = load('[method]\nsize = "m"\n', base=width)
    assert job.method == Switch(size="m")
    assert notes == ["FILE: dropped method.width = 1 of BASE: method.size sets it"]
    for text, base, expected in (
        ('[method]\nsize = "s"\n', width, Switch(size="s", width=1)),
        ('[method]\nsize = "m"\nwidth = 7\n', width, Switch(size="m", width=7)),
        ("[method]\nwidth = 7\n", SWITCH + 'size = "m"\n', Switch(size="m", width=7)),
        ("[method]\nrank = 2\n", width + 'size = "m"\n', Switch(size="m", width=1, rank=2)),
    ):
        assert load(text, base=base) == (Job(schedule=Schedule(), method=expected), [])
    kept = load('[method]\nsize = "m"\n', "--method.width", "7", base=width)
    assert kept == (Job(schedule=Schedule(), method=Switch(size="m", width=7)), [])


@pytest.mark.parametrize(("rank", "is_printed"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_prints_a_note(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str | None,
    is_printed: bool,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    print_note("x is dropped")
    assert capsys.readouterr() == ("", "note: x is dropped\n" if is_printed else "")
