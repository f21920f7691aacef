"""SwitchLoRA's section: keys that exclude each other, and the interval that follows from a number
of switches."""

import math
from pathlib import Path

import pytest
from support.tiny import tiny_config

from switchtitan.config.toml_text import resolved_toml
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.config import SwitchLoraConfig


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
