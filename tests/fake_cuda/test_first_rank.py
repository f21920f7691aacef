"""What the first of eight ranks does on fake CUDA, in every case."""

import types
from typing import Literal, Union, get_args, get_origin

import numpy as np
import pytest
from support.fake_cuda import checks
from support.fake_cuda.cases import CASES, ON_CPU, PERIOD, config_of, num_steps_of
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.steps import Observed, unexpected_in
from support.packages import HAS_TORCHAO

from switchtitan.methods import METHODS
from switchtitan.methods.switchlora.plan import Plan
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
}
"""(section, key, value)."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    return [config_of(folder, name) for name in CASES]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_check(checks.steps_of_first_rank, str(tmp_path_factory.mktemp("steps")))


def test_every_choice_has_a_case(configs):
    assert set(METHODS) == {config.method.name for config in configs}
    optimizers = {config.optimizer.name for config in configs}
    assert set(OPTIMIZERS) == optimizers | (set() if HAS_TORCHAO else {"adamw8bit"})
    chosen, possible = set(), set()
    for config in configs:
        for name in SECTIONS:
            section = getattr(config, name)
            for key, field in type(section).model_fields.items():
                if key not in ("name", "size"):
                    possible |= {(name, key, value) for value in values_of(field.annotation)}
                    chosen.add((name, key, getattr(section, key)))
    assert possible - chosen - NOT_TRACED == set()


def values_of(annotation):
    if annotation is bool:
        return False, True
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(value for part in get_args(annotation) for value in values_of(part))
    return ()


def test_the_observed_steps_contain_all_that_happens(configs):
    """Switches of one and of two vectors, the end of a freeze, resets, and new bases."""
    for config in configs:
        method = config.method
        if method.name == "switchlora":
            plan = Plan(method, config.training.steps, np.array([100]))
            # Step n is the one with index n - 1; the first is not observed.
            counts = [int(plan.requested()[0]) for plan.step in range(1, 1 + PERIOD)]
            assert set(counts) == {1, 2}
            # A counterpart that is frozen in the first step.
            assert method.freeze_steps <= PERIOD
        for key in ("reset_interval", "update_interval"):
            assert getattr(method, key, PERIOD) <= PERIOD


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing_and_nothing_races(found, name):
    """Except for documented reads, and vectors that were put back two steps ago."""
    steps = [Observed(*step) for step in found["steps"][name]]
    assert unexpected_in(name, steps) == {}
    assert len(steps) == num_steps_of(name) - 1
    # Bases were renewed.
    assert name != "galore" or steps[1].reads


@needs_compiler
def test_collectives_are_those_on_a_cpu(found):
    assert found["on a CPU"].keys() == ON_CPU
    for name, on_cpu in found["on a CPU"].items():
        assert [Observed(*step).collectives for step in found["steps"][name]][:PERIOD] == on_cpu
