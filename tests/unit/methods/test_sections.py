"""Sections of methods and optimizers: what does not fit together, and keys without effect."""

import pytest
from support.checkpoints import refused
from support.tiny import tiny_config

from switchtitan.errors import ConfigError
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.plan import SwitchLoraConfig
from switchtitan.optim.torch_optimizer import SGDConfig


@pytest.mark.parametrize(
    ("method", "keys", "fragments"),
    [
        ("galore", "optimizer.name sgd", ("galore", "sgd")),
        ("apollo", "optimizer.name muon", ("apollo", "muon")),
        ("relora", "optimizer.name adafactor", ("relora", "adafactor")),
        ("full_rank", "optimizer.name scale model.tied_head true", ("scale", "tied")),
        ("relora", "method.restart_warmup_steps 9", ("restart_warmup_steps = 9",)),
        ("switchlora", "method.interval 9 method.switches_per_vector 2",
         ("interval = 9", "switches_per_vector = 2")),
        ("switchlora", "method.interval 40 method.switches_per_vector 12",
         ("switches_per_vector = 12", "at least 4,")),
        ("switchlora", "method.interval 6 method.freeze_steps 4", ("interval = 6", "at least 8,")),
        ("lora", "method.targets qproj", ("'qproj'", "up_proj")),
        ("lora", "model.name cola model.rank 5", ("rank = 6", "factor_a", "at most 4")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(tmp_path, method, keys, fragments):
    words = keys.split()
    words[::2] = [f"--{key}" for key in words[::2]]
    with refused(*fragments, error=ConfigError):
        tiny_config(tmp_path, method, *words)


SWITCHED = {"rank": 4, "decay_ratio": 0.2, "candidates_device": "host"}


@pytest.mark.parametrize(
    ("section", "void"),
    [
        (SwitchLoraConfig(**SWITCHED), ()),
        (SwitchLoraConfig(**SWITCHED, decay="constant", candidates="constant"),
         ("decay_ratio = 0.2", "candidates_device = 'host'")),
        (SGDConfig(lr=1e-3, momentum=0, nesterov=True), ("nesterov = true",)),
    ],
)  # fmt: skip
def test_a_key_that_another_one_switches_off_has_no_effect(section, void):
    messages = section.without_effect()
    assert len(messages) == len(void)
    for message, key in zip(messages, void, strict=True):
        assert message.startswith(f"{key} has no effect")


@pytest.mark.parametrize(
    "keys", [{"interval": 40, "switches_per_vector": 0.2}, {"interval": 10, "freeze_steps": 5}]
)
def test_a_saved_run_can_be_read_with_both_keys_or_an_interval_that_is_too_short(keys):
    saved = {"name": "switchlora", "rank": 7, **keys}
    assert METHODS.restore(saved).model_dump().items() >= saved.items()
