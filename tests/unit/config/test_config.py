"""TOML files and a command line become frozen sections; every mistake is named in one message."""

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tomli
from pydantic import Field, field_validator
from support.checkpoints import refused

from switchtitan.config import (
    FOLDER,
    QUICKSTART,
    find_config,
    help_text,
    load_config,
    read_with_bases,
    split_arguments,
    toml_value,
)
from switchtitan.errors import ConfigError
from switchtitan.registry import Component, NamedSection, Registry, Section


class Training(Section):
    """Of the run."""

    steps: int = Field(ge=1)
    """Optimizer steps. More of them take longer."""
    lr: float = 1.0
    clip: float | None = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    folder: Path = Path("out")
    ranks: Literal["all"] | tuple[int, ...] = "all"
    tag: str = "ab"

    @field_validator("tag")
    @classmethod
    def _check_tag(cls, tag):
        if " " in tag:
            raise ValueError("expected no spaces")
        return tag


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
    width: int | None = None


METHODS: Registry = Registry(
    "method", {"lora": Component(Lora, str), "switch": Component(Switch, str)}
)


def keys_of(source):
    """What `[method] source` stands for."""
    keys = {"switch.txt": {"name": "switch", "width": 4}, "lora.txt": {"name": "lora", "rank": 8}}
    if source not in keys:
        raise ConfigError(f"no file {source}")
    return keys[source]


class Job(Section):
    expansions: ClassVar = {("method", "source"): keys_of}

    training: Training
    method: Annotated[NamedSection, METHODS]


def load_file(file, words=(), config_type=Job, say=pytest.fail):
    _, _, overrides = split_arguments(words)
    tables = [] if file is None else read_with_bases(file)
    return load_config(config_type, tables, overrides, say)


@pytest.fixture
def load(tmp_path):
    def load_text(text, *words, base=None, say=pytest.fail):
        file = tmp_path / "job.toml"
        file.write_text(text if base is None else f'base = "base.toml"\n{text}')
        (tmp_path / "base.toml").write_text(base or "")
        return load_file(file, words, say=say)

    return load_text


SWITCH = '[training]\nsteps = 3\n[method]\nname = "switch"\n'


# The command line.
@pytest.mark.parametrize(
    ("annotation", "words", "value"),
    [
        (bool, ["true"], True),
        (int, ["1_000"], 1000),
        (float, ["1e-3"], 1e-3),
        (float, [".001"], 1e-3),
        (float | None, ["-5."], -5.0),
        (str, [".5"], ".5"),
        (float | None, ["none"], None),
        (str, ["none"], "none"),
        (str, ['"quoted"'], "quoted"),
        (str, ["a = b # c"], "a = b # c"),
        (str, ["2024-01-01T10:00:00Z"], "2024-01-01T10:00:00Z"),
        (Path, ["with space/file"], Path("with space/file")),
        (tuple[str, ...], ["q_proj,v_proj"], ("q_proj", "v_proj")),
        (tuple[str, ...], ["[q_proj, v_proj]"], ("q_proj", "v_proj")),
        (tuple[str, ...], ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (tuple[str, ...], ["1,2"], ("1", "2")),
        (tuple[float, float], ["0.9,.95"], (0.9, 0.95)),
        (Literal["auto"] | int, ["7"], 7),
    ],
)
def test_words_are_read_as_a_value_that_the_key_accepts(annotation, words, value):
    class Keys(Section):
        key: annotation

    class Only(Section):
        keys: Keys

    (found,) = load_file(None, ["--keys.key", *words], Only).keys
    assert found == ("key", value)
    assert type(found[1]) is type(value)


def test_arguments_are_split():
    words = ["--a.x", "-1", "--config", "my file.toml", "--a.y=--odd", "--b.local-key", "1", "2"]
    file, wants_help, overrides = split_arguments([*words, "-h"])
    assert file == Path("my file.toml")
    assert wants_help
    assert overrides == {("a", "x"): ["-1"], ("a", "y"): ["--odd"], ("b", "local_key"): ["1", "2"]}
    _, _, overrides = split_arguments(["--path", "a", "--data.seq-len", "8"], section="data")
    assert overrides == {("data", "path"): ["a"], ("data", "seq_len"): ["8"]}


@pytest.mark.parametrize(
    "words",
    [["--a.x"], ["--config"], ["--config", "a", "b"], ["--config=a", "--config=b"],
     ["--a.x", "1", "--a.x=2"], ["train.toml"], ["-x"]],
)  # fmt: skip
def test_a_malformed_argument_is_a_mistake(words):
    with pytest.raises(ConfigError, match=words[0].partition("=")[0]):
        split_arguments(words)


# Which value counts.
def test_a_file_wins_over_its_base_and_the_command_line_over_both(tmp_path):
    (tmp_path / "bases").mkdir()
    lowest = '[training]\nsteps = 1\nlr = 2.0\n[method]\nname = "lora"'
    (tmp_path / "bases" / "lowest.toml").write_text(lowest)
    middle = 'base = "lowest.toml"\n[training]\nsteps = 2\ntag = "mid"\n[method]\nrank = 7'
    (tmp_path / "bases" / "middle.toml").write_text(middle)
    top = tmp_path / "top.toml"
    top.write_text('base = "bases/middle.toml"\n[training]\nsteps = 3\nclip = "none"')
    training = Training(steps=3, lr=2.0, clip=None, tag="mid")
    assert load_file(top) == Job(training=training, method=Lora(rank=7))
    overridden = load_file(top, ["--training.steps=7", "--training.folder", "a b"]).training
    assert overridden == training.model_copy(update={"steps": 7, "folder": Path("a b")})


def test_another_name_takes_no_keys_of_that_section_from_a_base(load):
    base = SWITCH + "interval = 90\nrank = 7\n"
    assert load('[method]\nname = "lora"', base=base).method == Lora()
    same = load('[method]\nname = "switch"\nrank = 1', base=base).method
    assert same == Switch(interval=90, rank=1)
    nameless = "[training]\nsteps = 1\n[method]\nrank = 7"
    assert load('[method]\nname = "lora"', base=nameless).method == Lora(rank=7)


def test_another_name_on_the_command_line_drops_what_it_does_not_have(load):
    notes = []
    text = SWITCH + 'rank = 8\ninterval = 50\ninit = "balanced"'
    words = ("--method.rank", "9", "--method.name", "lora")
    assert load(text, *words, say=notes.append).method == Lora(rank=9)
    assert [note.partition("dropped ")[2] for note in notes] == [
        '[method] init = "balanced"',
        "[method] interval = 50",
    ]


def test_a_base_may_be_a_configuration_that_is_installed(tmp_path):
    own, model = tmp_path / "own.toml", '[model]\nsize = "own"'
    own.write_text('base = "llama_350m.toml"\n')
    with pytest.raises(ConfigError, match=str(FOLDER / "llama_350m.toml")):
        load_file(own)
    (tmp_path / "llama_350m.toml").write_text(model)
    with pytest.raises(ConfigError, match=str(tmp_path / "llama_350m.toml")):
        load_file(own)


def test_a_shipped_file_is_found_from_any_folder_unless_one_of_its_name_is_there(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_configs").mkdir()
    for given in (QUICKSTART.name, f"train_configs/{QUICKSTART.name}"):
        assert find_config(Path(given)) == QUICKSTART
        (tmp_path / given).touch()
        assert find_config(Path(given)) == Path(given)
    assert find_config(Path("nowhere.toml")) == Path("nowhere.toml")


def test_a_key_that_stands_for_others_gives_class_and_keys_and_is_not_kept(load):
    text = '[training]\nsteps = 3\n[method]\nsource = "switch.txt"\nrank = 2\n'
    assert load(text).method == Switch(width=4, rank=2)
    assert load(text + 'name = "switch"\nwidth = 4').method == Switch(width=4, rank=2)
    # Over the keys of a base, and from the command line over those of the file.
    assert load('[method]\nsource = "switch.txt"', base=SWITCH + "width = 7").method.width == 4
    assert load(SWITCH + "rank = 3", "--method.source", "lora.txt").method == Lora(rank=8)


# Mistakes.
LORA = '[method]\nname = "lora"\n[training]\nsteps = 1\n'
LORA_FILE = '[training]\nsteps = 3\n[method]\nsource = "lora.txt"\n'


@pytest.mark.parametrize(
    ("text", "words", "fragments"),
    [
        (LORA.replace("1", '"8"'), (), ('job.toml: [training] steps = "8": expected', "integer")),
        (LORA.replace("steps = 1", ""), (), ("job.toml: [training] steps: missing",)),
        (LORA + "betas = [0.9]", (), ("[training] betas[1]: missing",)),
        (LORA + "ranks = 2.5", (), ("[training] ranks = 2.5", "'all'", "array")),
        (LORA + 'tag = "a b"', (), ('[training] tag = "a b"', "no spaces")),
        (LORA + "foldre = 1", (), ("[training] foldre = 1: unknown key", "training.folder?")),
        (LORA + "rank = 1", (), ("[training] rank = 1: unknown key", "method.rank?")),
        ("[training]\nsteps = 1", (), ("[method] name: missing", "lora, switch")),
        (SWITCH.replace("switch", "swich"), (), ('[method] name = "swich"', "mean switch?")),
        (SWITCH + "[trainig]\nsteps = 1", (), ("job.toml: trainig", "training?")),
        ("steps = 1\n" + SWITCH, (), ("job.toml: steps", "training.steps?")),
        ('bsae = "x.toml"\n' + SWITCH, (), ("bsae", "base?")),
        (SWITCH, ("--training.steps", "many"), ("--training.steps many: expected", "integer")),
        (SWITCH, ("--steps", "1"), ("--steps 1", "--training.steps?")),
        (SWITCH, ("--confg", "1"), ("--confg 1", "--config?")),
        (SWITCH, ("--method.name", "lora", "--method.interval", "9"),
         ("--method.interval 9: unknown key",)),
        (SWITCH + "intervall = 9", ("--method.name", "lora"), ("intervall = 9: unknown key",)),
        # Keys that stand for others.
        (LORA_FILE + "rank = 5", (), ("[method] rank = 5", 'source = "lora.txt"')),
        (LORA_FILE, ("--method.rank", "5"), ("--method.rank 5", 'source = "lora.txt"')),
        (LORA_FILE + 'name = "switch"', (), ('[method] name = "switch"', "contradicts")),
        (LORA_FILE.replace("lora", "lost"), (), ('source = "lost.txt"', "no file lost.txt")),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key_and_value_as_they_were_written(load, text, words, fragments):
    with pytest.raises(ConfigError) as caught:
        load(text, *words, say=str)
    head, *lines = str(caught.value).splitlines()
    assert head == f"invalid configuration ({len(lines)} error{'s' if len(lines) > 1 else ''})"
    assert any(all(fragment in line for fragment in fragments) for line in lines), lines


def test_all_mistakes_are_in_one_message(load, tmp_path):
    base = '[training]\nsteps = 0\nstesp = 1\n[traning]\n[method]\nname = "lora"'
    words = ("--training.betas", "1", "--foo.bar", "2")
    with pytest.raises(ConfigError) as caught:
        load('[training]\nlr = "x"', *words, base=base)
    lines = [line.strip().rpartition(": ")[0] for line in str(caught.value).splitlines()[1:]]
    base, top = tmp_path / "base.toml", tmp_path / "job.toml"
    assert sorted(lines) == [
        "--foo.bar 2",
        "--training.betas 1",
        f"{base}: [training] steps = 0",
        f"{base}: [training] stesp = 1",
        f"{base}: traning",
        f'{top}: [training] lr = "x"',
    ]


@pytest.mark.parametrize(
    ("name", "contents", "fragments"),
    [
        ("llama_35m.toml", None, ("llama_35m.toml: no such file", "llama_350m.toml?")),
        ("", None, ("cannot be read",)),
        ("latin.toml", b'a = "\xe4"', ("latin.toml", "utf-8")),
        ("job.toml", b"[training]\nsteps = many\n", ("job.toml", "line 2")),
        ("job.toml", b'base = "lama_350m.toml"', ("lama_350m.toml: no such", "llama_350m.toml?")),
        ("job.toml", b"base = 3", ("base = 3",)),
        ("job.toml", b'base = "llama_350m.toml"', ('base = "job.toml"', "itself")),
    ],
)
def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path, name, contents, fragments):
    (tmp_path / "llama_350m.toml").write_text('base = "job.toml"')
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with refused(*fragments, error=ConfigError):
        load_file(tmp_path / name)


# A configuration as text.
@pytest.mark.parametrize(
    "value",
    ['quote " and \\ back', "line\nbreak", "tab\tbell\x07", "\x7f", "ünïcode ☃", "", "none so far",
     1, -3, True, 0.1 + 0.2, 1e-8, 1e300, math.inf, -math.inf, math.nan, ["a", 1.5], []],
)  # fmt: skip
def test_any_value_reads_back(value):
    found = tomli.loads(f"key = {toml_value(value)}")["key"]
    assert found == value or (math.isnan(found) and math.isnan(value))


def test_help_has_every_key_with_its_value_and_first_sentence():
    job = Job(training=Training(steps=3), method=Lora())
    entries = {entry.split()[0]: entry for entry in help_text(job, "usage: train").split("--")[1:]}
    assert {f"training.{key}" for key in Training.model_fields} < entries.keys()
    for key, parts in (
        ("training.steps", ("3", ">= 1", "Optimizer steps.")),
        ("method.name", ('"lora"', "switch")),
    ):
        assert all(part in entries[key] for part in parts)
    assert "More of them" not in entries["training.steps"]
