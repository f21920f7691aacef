"""Every choice of an option that a step depends on is made by a case of fake CUDA."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from support.fake_cuda.cases import CASES, PERIOD, config_of
from support.packages import HAS_TORCHAO

from switchtitan.config.section import Section
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.schedule import SwitchSchedule
from switchtitan.optim import OPTIMIZERS

SECTIONS = ("model", "method", "optimizer", "training", "parallelism", "activation_checkpoint")
NOT_TRACED = {
    # Their kernels are compiled for a GPU.
    ("model", "attention", "flex"),
    ("model", "attention", "flash_attn"),
    # Set for the whole process when a run starts.
    ("training", "tf32", True),
    ("training", "deterministic", True),
    # Another dtype by the time of the first step.
    ("training", "dtype", "auto"),
    # They change numbers, not operations.
    ("method", "decay", "exponential"),
    ("method", "decay", "sigmoid"),
    ("method", "init", "balanced"),
    ("optimizer", "decay_norms", True),
    # It sets other keys.
    ("method", "preset", "gentle"),
}
"""(section, key, value)."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[JobConfig]:
    folder = tmp_path_factory.mktemp("cases")
    return [config_of(folder, settings) for settings in CASES.values()]


def test_every_choice_has_a_case(configs: list[JobConfig]) -> None:
    chosen, possible = set(), set()
    for config in configs:
        for name in SECTIONS:
            section = getattr(config, name)
            for key, values in choices_of(type(section)):
                possible |= {(name, key, value) for value in values}
                chosen.add((name, key, getattr(section, key)))
    assert possible - chosen - NOT_TRACED == set()


def test_every_method_and_optimizer_has_a_case(configs: list[JobConfig]) -> None:
    assert set(METHODS) == {config.method.name for config in configs}
    optimizers = {config.optimizer.name for config in configs}
    assert set(OPTIMIZERS) == optimizers | (set() if HAS_TORCHAO else {"adamw8bit"})


def test_the_observed_steps_contain_all_that_happens(configs: list[JobConfig]) -> None:
    """Switches of one and of two vectors, the end of a freeze, resets, and new bases."""
    for config in configs:
        method = config.method
        if isinstance(method, SwitchLoraConfig):
            schedule = SwitchSchedule(method, config.training.steps, num_layers=1)
            # Step n is the one with index n - 1; the first is not observed.
            counts = {int(schedule.requested(index)[0]) for index in range(1, 1 + PERIOD)}
            assert counts == {1, 2}
            # A counterpart that is frozen in the first step.
            assert method.freeze_steps <= PERIOD
        for key in ("reset_interval", "update_interval"):
            assert getattr(method, key, PERIOD) <= PERIOD


def choices_of(section: type[Section]) -> Iterator[tuple[str, tuple]]:
    """Yields the keys of a section that have a few values, with these."""
    for key, field in section.model_fields.items():
        values = values_of(field.annotation)
        if key not in ("name", "size") and values:
            yield key, values


def values_of(annotation: Any) -> tuple:
    if annotation is bool:
        return False, True
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(value for part in get_args(annotation) for value in values_of(part))
    return ()


def test_choices_are_those_of_a_section() -> None:
    class Example(Section):
        dtype: Literal["auto", "float32"] = "auto"
        offload: bool = False
        rank: int = 3
        other: Literal["x"] | None = None

    assert dict(choices_of(Example)) == {
        "dtype": ("auto", "float32"),
        "offload": (False, True),
        "other": ("x",),
    }
