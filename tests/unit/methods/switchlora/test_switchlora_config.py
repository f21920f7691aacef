"""SwitchLoRA's section: keys that exclude each other, and the interval that follows from a number
of switches."""

import math
from pathlib import Path

import pytest
from support.tiny import tiny_config

from switchtitan.config.fields import choices
from switchtitan.config.toml_text import resolved_toml, toml_value
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.config import PRESETS, SwitchLoraConfig


def load_tiny(folder: Path, keys: str, *overrides: str) -> JobConfig:
    """The tiny run's file with these lines in place of its `[method]` keys."""
    tiny_config(folder, "switchlora")
    (file,) = folder.glob("switchlora-*.toml")
    head, tail = file.read_text().split('[method]\nname = "switchlora"\n')
    _, optimizer, tail = tail.partition("[optimizer]")
    other = folder / "other.toml"
    other.write_text(f'{head}[method]\nname = "switchlora"\nrank = 6\n{keys}\n{optimizer}{tail}')
    return parse_arguments(["--config", str(other), *overrides], 1)


def loads_again(config: JobConfig, folder: Path) -> bool:
    """Whether the saved configuration and the identity in a checkpoint give the same section."""
    (folder / "resolved.toml").write_text(resolved_toml(config))
    again = parse_arguments(["--config", str(folder / "resolved.toml")], 1)
    restored = METHODS.restore(config.method.model_dump(mode="json"))
    return again == config and restored == config.method


def test_interval_follows_from_the_number_of_switches():
    config = SwitchLoraConfig(rank=16, switches_per_vector=9.375, decay="constant")
    assert config.interval_in(1500) == 160
    # A geometric series: (0.3^(1 / 150) + ... + 0.3^(1500 / 150)) / 3.
    ratio = 0.3 ** (1 / 150)
    config = SwitchLoraConfig(rank=16, switches_per_vector=3)
    expected = ratio * (1 - 0.3**10) / (1 - ratio) / 3
    assert config.interval_in(1500) == pytest.approx(expected, rel=1e-12)
    config = SwitchLoraConfig(rank=16, switches_per_vector=3, decay="sigmoid", decay_ratio=0.5)
    rates = [1 - 1 / (1 + math.exp(-10 * (t / 50 - 1))) for t in range(100)]
    assert config.interval_in(100) == pytest.approx(math.fsum(rates) / 3, rel=1e-12)


def test_published_interval_is_the_default_and_does_not_depend_on_the_run():
    config = SwitchLoraConfig(rank=16)
    assert config.interval_in(7) == config.interval_in(10**6) == 40


def test_both_ways_to_say_how_often_exclude_each_other(tmp_path: Path):
    both = "interval = 9 and switches_per_vector = 2 both say how often"
    with pytest.raises(ConfigError, match=both):
        load_tiny(tmp_path, "interval = 9\nfreeze_steps = 0\nswitches_per_vector = 2")
    with pytest.raises(ConfigError, match=both):
        load_tiny(tmp_path, "", "--method.interval", "9", "--method.switches_per_vector", "2")


@pytest.mark.parametrize(
    ("keys", "override", "kept"),
    [
        ("interval = 20", ["--method.switches_per_vector", "0.2"], (40, 0.2)),
        ("switches_per_vector = 0.2", ["--method.interval", "20"], (20, None)),
        ("switches_per_vector = 0.2", ["--method.switches_per_vector", "none"], (40, None)),
    ],
)
def test_the_command_line_replaces_the_files_way(
    tmp_path: Path, keys: str, override: list[str], kept: tuple[float, float | None]
):
    method = load_tiny(tmp_path, keys, *override).method
    assert isinstance(method, SwitchLoraConfig)
    assert (method.interval, method.switches_per_vector) == kept


def test_a_saved_configuration_with_a_number_of_switches_loads_again(tmp_path: Path):
    config = load_tiny(tmp_path, "switches_per_vector = 0.2")
    assert loads_again(config, tmp_path)
    text = resolved_toml(config)
    assert "\n# interval = 40" in text
    assert "\nswitches_per_vector = 0.2\n" in text
    assert '\nswitches_per_vector = "none"\n' in resolved_toml(load_tiny(tmp_path, ""))


def test_too_many_switches_for_the_run_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_tiny(tmp_path, 'switches_per_vector = 9.4\ndecay = "constant"')
    assert (
        "[method] switches_per_vector = 9.4: a run of [training] steps = 40 would switch a vector "
        "every 4.26 steps at its start, but rank = 6 and freeze_steps = 5 need at least 10; use at "
        "most 3.98, increase steps, or lower freeze_steps"
    ) in str(caught.value)
    keys = 'switches_per_vector = 9.4\ndecay = "constant"\nfreeze_steps = 0'
    assert load_tiny(tmp_path, keys).method.check_length(40) == []


def test_an_interval_that_would_drop_switches_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        load_tiny(tmp_path, "interval = 1.5\nfreeze_steps = 0")
    assert (
        "[method] interval = 1.5: expected at least 2, since rank = 6 and freeze_steps = 0 allow 3 "
        "switches of each factor's vectors in one step; increase interval"
    ) in str(caught.value)
    odd = ("--method.rank", "7")
    with pytest.raises(ConfigError) as caught:
        load_tiny(tmp_path, "interval = 6\nfreeze_steps = 3", *odd)
    assert (
        "[method] interval = 6: expected at least 7, since rank = 7 and freeze_steps = 3 allow 3 "
        "switches of each factor's vectors in 3 steps; increase interval or lower freeze_steps"
    ) in str(caught.value)
    load_tiny(tmp_path, "interval = 2\nfreeze_steps = 0")
    load_tiny(tmp_path, "interval = 7\nfreeze_steps = 3", *odd)


def test_a_saved_run_with_a_short_interval_can_still_be_read():
    """It can be evaluated and exported, although a new one is refused."""
    saved = {"name": "switchlora", "rank": 7, "interval": 10, "freeze_steps": 5}
    method = METHODS.restore(saved)
    assert method.interval == 10
    assert len(method.check_length(100)) == 1


GENTLE = {
    "candidates": "constant",
    "switches_per_vector": 9.4,
    "decay": "constant",
    "freeze_steps": 0,
    "reset_moments": "momentum",
}


def test_gentle_sets_its_keys_and_no_others():
    config = SwitchLoraConfig(rank=16, preset="gentle")
    assert config == SwitchLoraConfig(rank=16, **GENTLE)
    assert config != SwitchLoraConfig(rank=16)
    # The rows of docs/RESULTS.md have interval 160 in 1500 steps.
    assert config.interval_in(1500) == pytest.approx(160, rel=5e-3)


def test_the_documentation_of_presets_has_their_keys():
    field = SwitchLoraConfig.model_fields["preset"]
    assert choices(field) == list(PRESETS)
    for keys in PRESETS.values():
        for key, value in keys.items():
            assert f"{key} = {toml_value(value)}" in (field.description or "")


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ("freeze_steps = 1", {"freeze_steps": 1}),
        # Values that are the defaults of a run without a preset.
        ('candidates = "swap"', {"candidates": "swap"}),
        ('decay = "exponential"\ndecay_ratio = 0.8', {"decay": "exponential", "decay_ratio": 0.8}),
        ("switches_per_vector = 3", {"switches_per_vector": 3}),
        ("interval = 40", {"switches_per_vector": None, "interval": 40}),
    ],
)
def test_keys_that_are_set_win_over_the_preset(
    tmp_path: Path, keys: str, changed: dict[str, object]
):
    config = load_tiny(tmp_path, f'preset = "gentle"\n{keys}')
    assert config.method == SwitchLoraConfig(rank=6, **{**GENTLE, **changed})
    assert loads_again(config, tmp_path)
    # Also on the command line, over a file with the preset.
    options = [word for line in keys.split("\n") for word in f"--method.{line}".split(" = ")]
    again = load_tiny(tmp_path, 'preset = "gentle"', *[word.strip('"') for word in options])
    assert again == config


def test_a_saved_configuration_has_the_keys_of_the_preset_and_no_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_tiny(tmp_path, 'preset = "gentle"')
    lines = resolved_toml(config).splitlines()
    assert 'preset = "none"' in lines
    for key, value in GENTLE.items():
        assert f"{key} = {toml_value(value)}" in lines
    assert {"# interval = 40", "# decay_ratio = 0.1"} <= set(lines)
    # Even if a later version gives the preset another meaning.
    monkeypatch.setitem(PRESETS, "gentle", {"freeze_steps": 3})
    assert SwitchLoraConfig(rank=6, preset="gentle").freeze_steps == 3
    assert loads_again(config, tmp_path)


def test_a_preset_on_the_command_line_replaces_the_files_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    keys = (
        'interval = 5\ndecay_ratio = 0.2\nfreeze_steps = 2\nreset_moments = "both"\n'
        'candidates_dtype = "bfloat16"'
    )
    config = load_tiny(tmp_path, keys, "--method.preset", "gentle")
    assert config.method == SwitchLoraConfig(rank=6, **GENTLE)
    notes = capsys.readouterr().err
    for line in keys.split("\n"):
        assert f"method.{line}" in notes
    kept = load_tiny(tmp_path, keys, "--method.preset", "gentle", "--method.freeze_steps", "1")
    assert kept.method == SwitchLoraConfig(rank=6, **{**GENTLE, "freeze_steps": 1})


def test_a_preset_of_a_file_replaces_its_bases_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = (
        'interval = 5\ndecay_ratio = 0.2\nfreeze_steps = 2\nreset_moments = "both"\n'
        'candidates_dtype = "bfloat16"'
    )
    load_tiny(tmp_path, base)
    file = tmp_path / "file.toml"
    file.write_text('base = "other.toml"\n[method]\npreset = "gentle"\n')
    config = parse_arguments(["--config", str(file)], 1)
    assert config.method == SwitchLoraConfig(rank=6, **GENTLE)
    assert loads_again(config, tmp_path)
    notes = capsys.readouterr().err
    for line in base.split("\n"):
        assert f"method.{line}" in notes
    file.write_text(file.read_text() + "freeze_steps = 1\n")
    fewer = ("--method.switches_per_vector", "2")
    kept = parse_arguments(["--config", str(file), "--method.decay", "exponential", *fewer], 1)
    expected = GENTLE | {"freeze_steps": 1, "decay": "exponential", "decay_ratio": 0.2}
    expected |= {"switches_per_vector": 2}
    assert kept.method == SwitchLoraConfig(rank=6, **expected)
    without = parse_arguments(["--config", str(file), "--method.preset", "none"], 1)
    assert without == load_tiny(tmp_path, base, "--method.freeze_steps", "1")


def test_a_key_that_the_preset_leaves_no_effect_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match='decay_ratio has no effect with decay = "constant"'):
        load_tiny(tmp_path, 'preset = "gentle"\ndecay_ratio = 0.2')
    with pytest.raises(ConfigError, match="candidates_device = 'host' has no effect"):
        load_tiny(tmp_path, 'preset = "gentle"\ncandidates_device = "host"')


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path):
    with pytest.raises(ConfigError, match='preset = "gentel": expected "gentle", or "none"'):
        load_tiny(tmp_path, 'preset = "gentel"')
    with pytest.raises(ConfigError, match=r'--method\.preset 3: expected "gentle", or "none"'):
        load_tiny(tmp_path, "", "--method.preset", "3")
    assert load_tiny(tmp_path, 'preset = "gentle"', "--method.preset", "none") == load_tiny(
        tmp_path, ""
    )
