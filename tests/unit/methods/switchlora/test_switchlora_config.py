"""SwitchLoRA's section: how often vectors are switched, and keys that exclude each other."""

import math

import pytest
from support.tiny import tiny_config

from switchtitan.config import resolved_toml
from switchtitan.errors import ConfigError
from switchtitan.job.config import parse_arguments
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.plan import SwitchLoraConfig


def load_tiny(folder, keys, *overrides):
    """The tiny run's file with these lines in place of its `[method]` keys."""
    tiny_config(folder, "switchlora")
    (file,) = folder.glob("switchlora-*.toml")
    head, tail = file.read_text().split('[method]\nname = "switchlora"\n')
    _, optimizer, tail = tail.partition("[optimizer]")
    other = folder / "other.toml"
    other.write_text(f'{head}[method]\nname = "switchlora"\nrank = 6\n{keys}\n{optimizer}{tail}')
    return parse_arguments(["--config", str(other), *overrides], 1)


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
    # The published interval is the default, and does not depend on the run.
    config = SwitchLoraConfig(rank=16)
    assert config.interval_in(7) == config.interval_in(10**6) == 40


def test_a_saved_configuration_loads_again(tmp_path):
    config = load_tiny(tmp_path, "switches_per_vector = 0.2")
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], 1) == config
    assert METHODS.restore(config.method.model_dump(mode="json")) == config.method
    assert config.method.switches_per_vector is not None


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ("interval = 9\nfreeze_steps = 0\nswitches_per_vector = 2", ("interval = 9", "= 2")),
        (
            'switches_per_vector = 9.4\ndecay = "constant"',
            ("switches_per_vector = 9.4", "at least 10,"),
        ),
        ("interval = 1.5\nfreeze_steps = 0", ("interval = 1.5", "at least 2,")),
        ("interval = 6\nfreeze_steps = 4", ("interval = 6", "at least 8,")),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(tmp_path, keys, fragments):
    with pytest.raises(ConfigError) as caught:
        load_tiny(tmp_path, keys)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_keys_of_what_is_constant_have_no_effect():
    keys = {"rank": 4, "decay_ratio": 0.2, "candidates_device": "host"}
    assert SwitchLoraConfig(**keys).without_effect() == []
    constant = SwitchLoraConfig(**keys, decay="constant", candidates="constant")
    ratio, device = constant.without_effect()
    assert ratio.startswith("decay_ratio = 0.2 has no effect")
    assert device.startswith("candidates_device = 'host' has no effect")


def test_a_rank_of_one_would_never_switch(tmp_path):
    with pytest.raises(ConfigError, match="rank = 1"):
        tiny_config(tmp_path, "switchlora", "--method.rank", "1")


def test_a_saved_run_with_a_short_interval_can_still_be_read():
    """It can be evaluated and exported, although a new one is refused."""
    method = METHODS.restore({"name": "switchlora", "rank": 7, "interval": 10, "freeze_steps": 5})
    assert method.interval == 10
    assert len(method.check_length(100)) == 1
