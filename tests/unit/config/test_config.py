"""TOML files and a command line become frozen sections; every mistake is named in one message."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tomli
from pydantic import Field, field_validator, model_validator

from switchtitan.config.command_line import split_arguments
from switchtitan.config.load import load_config, load_table
from switchtitan.config.section import NamedSection, Section, VoidKey, VoidKeyError
from switchtitan.config.shipped import FOLDER, QUICKSTART, find_config
from switchtitan.config.toml_files import read_toml, read_with_bases
from switchtitan.config.toml_text import flatten, resolved_toml, toml_value
from switchtitan.config.void_keys import print_note
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
    def _check_tag(cls, tag):
        if " " in tag:
            raise ValueError("expected no spaces")
        return tag


class Schedule(Section):
    decay: Literal["linear", "constant"] = "linear"
    decay_ratio: float = 0.5
    decay_start: int = 1

    @model_validator(mode="after")
    def _check_decay(self):
        void = [
            VoidKey(key, ("decay",), f"{key} has no effect without decay")
            for key in ("decay_ratio", "decay_start")
            if self.decay == "constant" and key in self.model_fields_set
        ]
        if void:
            raise VoidKeyError(void)
        return self


class Lora(NamedSection):
    name: Literal["lora"] = "lora"
    source: str | None = None
    rank: int = 4
    init: Literal["zero", "normal"] = "normal"


class Switch(NamedSection):
    name: Literal["switch"] = "switch"
    source: str | None = None
    rank: int = 4
    init: Literal["normal", "balanced"] = "normal"
    interval: int = 40
    freeze_steps: int = 5
    size: Literal["s", "m"] | None = None
    width: int | None = None

    @classmethod
    def implied_by(cls, key, value):
        widths = {"s": 1, "m": 2}
        return {"width": widths[value]} if key == "size" and value in widths else {}

    @model_validator(mode="after")
    def _check_interval(self):
        if self.interval < 2 * self.freeze_steps:
            raise ValueError(f"interval = {self.interval} is below 2 x freeze_steps")
        return self


METHODS: Registry = Registry(
    "method", {"lora": Component(Lora, str), "switch": Component(Switch, str)}
)


class Job(Section):
    training: Training
    schedule: Schedule = Schedule()
    method: Annotated[NamedSection, METHODS]


def check_short(training, method):
    if training.steps > 2 or getattr(method, "interval", 40) == 40:
        return []
    return [VoidKey("method.interval", ("training.steps",), "interval has no effect so early")]


def keys_of(source):
    """What `[method] source` stands for."""
    keys = {"switch.txt": {"name": "switch", "width": 4}, "lora.txt": {"name": "lora", "rank": 8}}
    if source not in keys:
        raise ConfigError(f"no file {source}")
    return keys[source]


@pytest.fixture
def notes():
    """What the last load said."""
    return []


@pytest.fixture
def load(tmp_path, notes):
    def load_text(text, *words, base=None, heading=None):
        file = tmp_path / "job.toml"
        file.write_text(text if base is None else f'base = "base.toml"\n{text}')
        (tmp_path / "base.toml").write_text(base or "")
        notes.clear()
        return load_config(
            split_arguments(words),
            file,
            Job,
            [check_short],
            heading,
            {("method", "source"): keys_of},
            lambda note: notes.append(note.replace(f"{tmp_path}/", "")),
        )

    return load_text


def message_of(load, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    return str(caught.value)


SWITCH = '[training]\nsteps = 3\n[method]\nname = "switch"\n'


# ---- The command line


@pytest.mark.parametrize(
    ("annotation", "words", "value"),
    [
        (bool, ["true"], True),
        (bool, ["False"], False),
        (int, ["-3"], -3),
        (int, ["1_000"], 1000),
        (float, ["1e-3"], 1e-3),
        (float, [".5"], 0.5),
        (float, ["2"], 2.0),
        (float | None, ["none"], None),
        (str, ["none"], "none"),
        (str, ["123"], "123"),
        (str, ['"quoted"'], "quoted"),
        (str, ["a = b # c"], "a = b # c"),
        (str | None, ["none"], None),
        (Path, ["with space/file"], Path("with space/file")),
        (Literal["none", "full"] | None, ["none"], "none"),
        (tuple[str, ...], ["q_proj,v_proj"], ("q_proj", "v_proj")),
        (tuple[str, ...], ['["q_proj", "v_proj"]'], ("q_proj", "v_proj")),
        (tuple[str, ...], ["[q_proj, v_proj]"], ("q_proj", "v_proj")),
        (tuple[str, ...], ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (tuple[str, ...], ["q_proj"], ("q_proj",)),
        (tuple[str, ...], ["1,2"], ("1", "2")),
        (tuple[float, float], ["0.9,0.95"], (0.9, 0.95)),
        (tuple[float, float], ["0.9", "0.95"], (0.9, 0.95)),
        (Literal["auto"] | int, ["auto"], "auto"),
        (Literal["auto"] | int, ["7"], 7),
    ],
)
def test_words_are_read_as_a_value_that_the_key_accepts(annotation, words, value):
    class Keys(Section):
        key: annotation

    class Only(Section):
        keys: Keys

    (found,) = load_config(split_arguments(["--keys.key", *words]), None, Only).keys
    assert found == ("key", value)
    assert type(found[1]) is type(value)


def test_arguments_are_split():
    arguments = split_arguments(
        ["--a.x", "-1", "--config", "my file.toml", "--a.y=--odd", "--b.local-key", "1", "2", "-h"]
    )
    assert arguments.config_file == "my file.toml"
    assert arguments.wants_help
    words = {path: override.words for path, override in arguments.overrides.items()}
    assert words == {("a", "x"): ["-1"], ("a", "y"): ["--odd"], ("b", "local_key"): ["1", "2"]}
    assert arguments.mistakes == []


def test_keys_of_a_given_section_may_omit_it_and_flags_have_no_value():
    words = ["--path", "a", "--data.seq-len", "8", "--dry-run"]
    arguments = split_arguments(words, section="data", flags=["--dry-run"])
    assert list(arguments.overrides) == [("data", "path"), ("data", "seq_len")]
    assert arguments.flags == {"--dry-run"}
    assert not arguments.wants_help
    assert arguments.mistakes == []
    assert split_arguments(["--dry-run"]).mistakes


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--a.x"], "--a.x VALUE"),
        (["--config"], "--config FILE"),
        (["--confg", "a.toml"], "--config?"),
        (["--help-al"], "--help-all?"),
        (["--help-all=1"], "--help-all 1"),
        (["--config", "a", "b"], "--config a b"),
        (["--config=a", "--config=b"], "--config b"),
        (["--a.x", "1", "--a.x=2"], "--a.x 2"),
        (["train.toml"], "train.toml"),
        (["-x"], "-x"),
    ],
)
def test_a_malformed_argument_is_a_mistake(words, fragment):
    (mistake,) = split_arguments(words).mistakes
    assert mistake.message.startswith(words[0].partition("=")[0])
    assert fragment in mistake.message


# ---- Which value counts


def test_a_file_wins_over_its_base_and_the_command_line_over_both(tmp_path):
    (tmp_path / "bases").mkdir()
    lowest = '[training]\nsteps = 1\nlr = 2.0\n[training.inner]\ndepth = 3\n[method]\nname = "lora"'
    (tmp_path / "bases" / "lowest.toml").write_text(lowest)
    middle = 'base = "lowest.toml"\n[training]\nsteps = 2\ntag = "mid"\n[method]\nrank = 7'
    (tmp_path / "bases" / "middle.toml").write_text(middle)
    top = tmp_path / "top.toml"
    top.write_text('base = "bases/middle.toml"\n[training]\nsteps = 3\nclip = "none"')
    training = Training(steps=3, lr=2.0, clip=None, tag="mid", inner=Inner(depth=3))
    assert load_config(split_arguments([]), top, Job) == Job(training=training, method=Lora(rank=7))
    words = ["--training.steps=7", "--training.inner.depth", "5", "--training.folder", "a b"]
    changes = {"steps": 7, "inner": Inner(depth=5), "folder": Path("a b")}
    overridden = load_config(split_arguments(words), top, Job).training
    assert overridden == training.model_copy(update=changes)


def test_another_name_takes_no_keys_of_that_section_from_a_base(load):
    base = SWITCH + "interval = 90\nrank = 7\n"
    assert load('[method]\nname = "lora"', base=base).method == Lora()
    same = load('[method]\nname = "switch"\nfreeze_steps = 1', base=base).method
    assert same == Switch(interval=90, rank=7, freeze_steps=1)
    nameless = "[training]\nsteps = 1\n[method]\nrank = 7"
    assert load('[method]\nname = "lora"', base=nameless).method == Lora(rank=7)


def test_a_base_may_be_a_configuration_that_is_installed(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('base = "llama_350m.toml"\n')
    given = read_with_bases(own, {})
    assert given.table["model"]["size"] == "350m"
    assert given.origins["model", "size"] == str(FOLDER / "llama_350m.toml")
    (tmp_path / "llama_350m.toml").write_text('[model]\nsize = "own"')
    assert read_with_bases(own, {}).table == {"model": {"size": "own"}}


@pytest.mark.parametrize("given", [QUICKSTART.name, f"train_configs/{QUICKSTART.name}"])
def test_a_shipped_file_is_found_from_any_folder_unless_one_of_its_name_is_there(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert find_config(given) == QUICKSTART
    assert str(QUICKSTART) in capsys.readouterr().err
    (tmp_path / "train_configs").mkdir()
    (tmp_path / given).touch()
    assert find_config(given) == Path(given)
    assert find_config("nowhere.toml") == Path("nowhere.toml")
    assert capsys.readouterr().err == ""


# ---- Keys that stand for others


def test_a_key_that_stands_for_others_gives_class_and_keys_and_is_not_kept(load):
    text = '[training]\nsteps = 3\n[method]\nsource = "switch.txt"\nrank = 2\n'
    assert load(text).method == Switch(width=4, rank=2)
    assert load(text + 'name = "switch"\nwidth = 4').method == Switch(width=4, rank=2)
    training = "[training]\nsteps = 3\n"
    assert load(training, "--method.source", "lora.txt").method == Lora(rank=8)
    none = '[method]\nname = "lora"\nsource = "none"'
    assert load(training + none).method == Lora()
    # Not even keys of the same section in a base.
    base = SWITCH + 'rank = 7\ninit = "balanced"'
    assert load('[method]\nsource = "switch.txt"', base=base).method == Switch(width=4)


def test_a_key_on_the_command_line_that_stands_for_others_wins_over_the_file(load, notes):
    text = SWITCH + 'rank = 8\nwidth = 7\ninit = "balanced"\n'
    method = load(text, "--method.source", "switch.txt").method
    assert method == Switch(width=4, rank=8, init="balanced")
    assert "dropped method.width = 7 of job.toml" in " ".join(notes)
    assert load(SWITCH + "rank = 3\n", "--method.source", "lora.txt").method == Lora(rank=8)


# ---- Keys without effect


CONSTANT = ("--schedule.decay", "constant")
DECAYS = SWITCH + "[schedule]\ndecay_ratio = 0.2\ndecay_start = 3\n"


@pytest.mark.parametrize(
    ("text", "words", "base", "section", "dropped"),
    [
        (DECAYS, CONSTANT, None, Schedule(decay="constant"), "schedule.decay_ratio = 0.2"),
        (DECAYS, ("--training.steps", "5"), None, Schedule(decay_ratio=0.2, decay_start=3), ""),
        ('[schedule]\ndecay = "constant"', (), DECAYS, Schedule(decay="constant"), "decay_start"),
        # By a check between sections.
        (SWITCH + "interval = 50", ("--training.steps", "2"), None, Switch(), "method.interval"),
        # By another name, or by a key that implies others.
        (SWITCH + "rank = 8\ninterval = 50", ("--method.name", "lora"), None, Lora(rank=8),
         "method.interval = 50"),
        (SWITCH + 'init = "balanced"', ("--method.name", "lora"), None, Lora(), "method.init"),
        (SWITCH + "width = 1", ("--method.size", "m"), None, Switch(size="m"), "method.width = 1"),
        (SWITCH + "width = 1", ("--method.size", "s"), None, Switch(size="s", width=1), ""),
        ('[method]\nsize = "m"', (), SWITCH + "width = 1", Switch(size="m"), "method.width = 1"),
    ],
)  # fmt: skip
def test_a_key_that_something_over_it_makes_void_is_dropped_with_a_note(
    load, notes, text, words, base, section, dropped
):
    job = load(text, *words, base=base)
    assert section in (job.schedule, job.method)
    said = " ".join(note for note in notes if "dropped" in note)
    assert dropped in said
    assert bool(said) == bool(dropped)
    saved = resolved_toml(job)
    assert load(saved) == job, "what is saved gives the same, without notes"
    assert notes == []


@pytest.mark.parametrize(
    ("text", "words", "options"),
    [
        # Void by one file alone, also if the command line repeats it.
        (DECAYS + 'decay = "constant"', (), {}),
        (DECAYS + 'decay = "constant"', CONSTANT, {}),
        ("", (), {"base": DECAYS + 'decay = "constant"'}),
        # Set by what makes it void, or over it.
        (SWITCH, (*CONSTANT, "--schedule.decay_ratio", "0.2"), {}),
        (SWITCH + '[schedule]\ndecay = "constant"', ("--schedule.decay_ratio", "0.2"), {}),
        ("[schedule]\ndecay_ratio = 0.2", (), {"base": SWITCH + '[schedule]\ndecay = "constant"'}),
        # Overrides of a program drop nothing.
        (DECAYS, CONSTANT, {"heading": "in row x:"}),
    ],
)
def test_other_void_keys_are_mistakes(load, text, words, options):
    message = message_of(load, text, *words, **options)
    assert "decay_ratio has no effect without decay" in message


@pytest.mark.parametrize(("rank", "is_printed"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_prints_a_note(monkeypatch, capsys, rank, is_printed):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    print_note("x is dropped")
    assert ("x is dropped" in capsys.readouterr().err) == is_printed


# ---- Mistakes


IN_TRAINING = '[method]\nname = "lora"\n[training]\n'


@pytest.mark.parametrize(
    ("text", "words", "fragments"),
    [
        (IN_TRAINING + 'steps = "8"', (), ('[training] steps = "8"', "write 8")),
        (IN_TRAINING + "steps = 8.0", (), ("[training] steps = 8.0", "write 8")),
        (IN_TRAINING + "steps = true", (), ("[training] steps = true", "an integer >= 1")),
        (IN_TRAINING, (), ("[training] steps: missing", "an integer >= 1")),
        (IN_TRAINING + "steps = 1\nclip = 0", (), ("[training] clip = 0", 'or "none"')),
        (IN_TRAINING + "steps = 1\nbetas = [0.9]", (), ("[training] betas = [0.9]", "2 items")),
        (IN_TRAINING + 'steps = 1\ntag = "a b"', (), ('[training] tag = "a b"', "no spaces")),
        (IN_TRAINING + "steps = 1\ntag = 2026-01-31", (), ("tag = 2026-01-31", '"2026-01-31"')),
        (IN_TRAINING + 'steps = 1\ndtype = "bf16"', (), ('dtype = "bf16"', '"bfloat16"?')),
        (IN_TRAINING + "steps = 1\nfoldre = 1", (), ("[training] foldre = 1", "folder?")),
        (IN_TRAINING + "steps = 1\nrank = 1", (), ("[training] rank = 1", "[method] rank?")),
        (IN_TRAINING + "steps = 1\ninner = 1", (), ("[training] inner = 1", "[training.inner]")),
        (IN_TRAINING + "steps = 1\n[training.inner]\ndpth = 1", (), ("dpth = 1", "depth?")),
        ("training = 3\n[method]\nname = 'lora'", (), ("training = 3", "[training]")),
        ("[training]\nsteps = 1", (), ("[method] name: missing", '"lora", "switch"')),
        (SWITCH.replace("switch", "swich"), (), ('[method] name = "swich"', '"switch"?')),
        (SWITCH + "[trainig]\nsteps = 1", (), ("[trainig]", "[training]?")),
        ("steps = 1\n" + SWITCH, (), ("steps = 1", "[training] steps?")),
        ('bsae = "x.toml"\n' + SWITCH, (), ('bsae = "x.toml"', "base")),
        (SWITCH, ("--training.steps", "many"), ("--training.steps many", "an integer")),
        (SWITCH, ("--training.stesp", "1"), ("--training.stesp 1", "steps?")),
        (SWITCH, ("--traning.steps", "1"), ("--traning.steps 1", "[training]?")),
        (SWITCH, ("--steps", "1"), ("--steps 1", "--training.steps?")),
        (SWITCH, ("--training.folder", "a", "b"), ("--training.folder a b", "2 arguments")),
        (SWITCH, ("--method.name", "lra"), ("--method.name lra", '"lora"?')),
        (SWITCH, ("--method.name", "lora", "--method.interval", "9"),
         ("--method.interval 9", 'name = "switch"')),
        (SWITCH + "intervall = 9", ("--method.name", "lora"), ("intervall = 9", "unknown")),
        (SWITCH, ("--method.interval", "9"), ("[method] interval = 9", "2 x freeze_steps")),
        # Keys that stand for others.
        ('[training]\nsteps = 3\n[method]\nsource = "lora.txt"\nrank = 5', (),
         ("[method] rank = 5", "says 8")),
        ('[training]\nsteps = 3\n[method]\nsource = "lora.txt"', ("--method.rank", "5"),
         ("--method.rank 5", "says 8")),
        ('[training]\nsteps = 3\n[method]\nsource = "lora.txt"\nname = "switch"', (),
         ('[method] name = "switch"', 'says "lora"')),
        ('[training]\nsteps = 3\n[method]\nsource = "lost.txt"', (),
         ('[method] source = "lost.txt"', "no file lost.txt")),
        (SWITCH, ("--method.source", "lost.txt"), ("--method.source lost.txt", "no file")),
        (SWITCH, ("--method.source", "lora.txt", "--method.name", "switch"),
         ("--method.name switch", 'says "lora"')),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key_and_value_as_they_were_written(load, text, words, fragments):
    message = message_of(load, text, *words)
    assert message.startswith("invalid configuration (1 error)"), message
    (line,) = (line for line in message.splitlines() if line.startswith("  "))
    for fragment in fragments:
        assert fragment in line


def test_all_mistakes_are_in_one_message_by_file_and_command_line(load, tmp_path):
    def check_method(method):
        return [f"rank = {method.rank} does not fit"]

    def check_both(method, training):
        raise AssertionError("runs only when both sections are valid")

    base = '[training]\nsteps = 0\nstesp = 1\n[traning]\n[method]\nname = "lora"'
    (tmp_path / "base.toml").write_text(base)
    top = tmp_path / "top.toml"
    top.write_text('base = "base.toml"\n[training]\nlr = "x"\n[training.inner]\ndpth = 1')
    arguments = split_arguments(["--training.betas", "1", "--foo.bar", "2"])
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, top, Job, [check_method, check_both])
    found, heading = {}, None
    for line in str(caught.value).splitlines():
        if line.startswith("  "):
            found.setdefault(heading, set()).add(line.strip().partition(":")[0])
        heading = heading if line.startswith("  ") else line
    assert found == {
        f"in {tmp_path / 'base.toml'}:": {
            "[training] steps = 0",
            "[training] stesp = 1",
            "[traning]",
        },
        f"in {top}:": {'[training] lr = "x"', "[training.inner] dpth = 1"},
        "on the command line:": {"--training.betas 1", "--foo.bar 2"},
        "values that do not fit together:": {"rank = 4 does not fit"},
    }
    assert "(8 errors)" in str(caught.value)


def test_mistakes_in_a_list_of_tables_name_the_table(tmp_path):
    class Shelf(Section):
        title: str
        books: tuple[Training, ...] = Field(min_length=1)

    file = tmp_path / "shelf.toml"
    file.write_text("titel = 1\n[[books]]\nsteps = 1\n[[books]]\nsteps = 0\nstesp = 2\n")
    with pytest.raises(ConfigError) as caught:
        load_table(file, Shelf)
    for fragment in ("title: missing", "titel = 1", "number 2, steps = 0", "number 2, stesp = 2"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("name", "contents", "fragments"),
    [
        ("llama_35m.toml", None, ("llama_35m.toml: no such file", "llama_350m.toml?")),
        ("nowhere/x.toml", None, ("x.toml: no such file",)),
        ("", None, ("readable",)),
        ("latin.toml", b'a = "\xe4"', ("latin.toml", "UTF-8")),
        ("job.toml", b"[training]\nsteps = many\n", ("job.toml", "line 2")),
        ("job.toml", b"a = 9223372036854775808", ("job.toml: a", "64 bits")),
        ("job.toml", b'base = "llama_35m.toml"', ('base = "llama_35m.toml"', "llama_350m.toml?")),
        ("job.toml", b"base = 3", ("base = 3",)),
        ("job.toml", b'base = "llama_350m.toml"', ("job.toml -> ", "itself")),
    ],
)
def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path, name, contents, fragments):
    (tmp_path / "llama_350m.toml").write_text('base = "job.toml"')
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        read_with_bases(tmp_path / name, {})
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- A configuration as TOML


@pytest.mark.parametrize(
    "value",
    ['quote " and \\ back', "line\nbreak", "tab\tbell\x07", "\x7f", "ünïcode ☃", "", "none so far",
     1, -3, True, 0.1 + 0.2, 1e-8, 1e300, math.inf, -math.inf, math.nan, ["a", 1.5], []],
)  # fmt: skip
def test_any_value_reads_back(value):
    found = tomli.loads(f"key = {toml_value(value)}")["key"]
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_sections_in_a_list_read_back_as_tables():
    text = toml_value((Inner(depth=2), Inner(depth=3)))
    assert tomli.loads(f"value = {text}")["value"] == [{"depth": 2}, {"depth": 3}]


def test_a_saved_configuration_loads_as_an_equal_one(load, tmp_path):
    training = Training(
        steps=3, lr=1 / 3, clip=None, folder=Path("a b"), tag='"no"', inner=Inner(depth=4)
    )
    job = Job(training=training, schedule=Schedule(decay="constant"), method=Switch(rank=9))
    text = resolved_toml(job)
    assert load(text) == job
    # Only a default that may not be set becomes a comment.
    assert 'decay = "constant"\n# decay_ratio = 0.5\n# decay_start = 1\n' in text
    assert text.count("#") == 2
    (tmp_path / "saved.toml").write_text(text)
    keys = flatten(read_toml(tmp_path / "saved.toml"))
    assert keys["training.inner.depth"] == 4
    assert keys["training.betas"] == [0.9, 0.999]
