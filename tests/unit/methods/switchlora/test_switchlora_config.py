"""SwitchLoRA's section: how often vectors are switched, and keys that exclude each other."""

import math

import pytest
from support.tiny import tiny_config

from switchtitan.config import resolved_toml
from switchtitan.errors import ConfigError
from switchtitan.job.config import parse_arguments
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.plan import SwitchLoraConfig


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
    keys = "--method.interval 40 --method.switches_per_vector 0.2"
    config = tiny_config(tmp_path, "switchlora", *keys.split())
    (tmp_path / "resolved.toml").write_text(resolved_toml(config))
    assert parse_arguments(["--config", str(tmp_path / "resolved.toml")], 1) == config
    assert METHODS.restore(config.method.model_dump(mode="json")) == config.method


@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        ("interval 9 switches_per_vector 2", ("interval = 9", "= 2")),
        ("interval 40 switches_per_vector 12", ("switches_per_vector = 12", "at least 4,")),
        ("interval 1.5 freeze_steps 0", ("interval = 1.5", "at least 2,")),
        ("interval 6 freeze_steps 4", ("interval = 6", "at least 8,")),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(tmp_path, keys, fragments):
    words = keys.split()
    words[::2] = [f"--method.{key}" for key in words[::2]]
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, "switchlora", *words)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_keys_of_what_is_constant_have_no_effect():
    keys = {"rank": 4, "decay_ratio": 0.2, "candidates_device": "host"}
    assert SwitchLoraConfig(**keys).without_effect() == []
    constant = SwitchLoraConfig(**keys, decay="constant", candidates="constant")
    ratio, device = constant.without_effect()
    assert ratio.startswith("decay_ratio = 0.2 has no effect")
    assert device.startswith("candidates_device = 'host' has no effect")


def test_a_saved_run_with_a_short_interval_can_still_be_read():
    """It can be evaluated and exported, although a new one is refused."""
    method = METHODS.restore({"name": "switchlora", "rank": 7, "interval": 10, "freeze_steps": 5})
    assert method.interval == 10
    assert len(method.check_length(100)) == 1
