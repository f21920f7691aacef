"""The optimizer reproduces the authors' run, and equals a literal re-implementation on a float64
LLaMA."""

import pytest
from support.switchlora_layers import requested_and_switched, with_interval
from support.switchlora_runs import (
    NUM_STEPS,
    RANK,
    build_ours,
    check_golden_trajectory,
    check_whole_run,
)

from switchtitan.methods.switchlora import SwitchLoraConfig

in_float64 = pytest.mark.usefixtures("float64")


def test_golden_trajectory_is_reproduced():
    check_golden_trajectory()


RUNS = {
    "balanced": {"decay": "exponential", "decay_ratio": 0.9, "interval": 4.3, "freeze_steps": 2},
    # k_proj and v_proj go round their six candidates several times.
    "no-reset": {"decay": "constant", "interval": 6.1, "freeze_steps": 0, "reset_moments": "none"},
    "lora-reset-both": {
        "decay": "sigmoid",
        "decay_ratio": 0.6,
        "interval": 6.1,
        "freeze_steps": 3,
        "init": "lora",
        "reset_moments": "both",
    },
    "constant-momentum": {
        "candidates": "constant",
        "decay": "constant",
        "interval": 4.3,
        "freeze_steps": 2,
        "reset_moments": "momentum",
    },
}


@in_float64
@pytest.mark.parametrize("run", RUNS)
def test_whole_model_follows_the_rules_written_out_vector_by_vector(run):
    num_steps = NUM_STEPS if run == "balanced" else 40
    check_whole_run(with_interval(rank=RANK, alpha=2.5, **RUNS[run]), num_steps=num_steps)


@in_float64
@pytest.mark.parametrize(
    ("keys", "fragments"),
    [
        # k_proj has one candidate that is not in use.
        ({"interval": 5}, ()),
        ({"interval": 4}, ("interval = 4", "6 candidates")),
        ({"switches_per_vector": 12}, ()),
        ({"switches_per_vector": 15}, ("switches_per_vector = 15", "6 candidates")),
    ],
)
def test_switches_that_a_layer_has_too_few_candidates_for_are_said(caplog, keys, fragments):
    config = SwitchLoraConfig(rank=RANK, decay="constant", freeze_steps=0, **keys)
    _, optimizer = build_ours(config)
    assert all(fragment in caplog.text for fragment in fragments)
    assert bool(caplog.text) == bool(fragments)
    requested, switched = requested_and_switched(optimizer, NUM_STEPS)
    assert (switched < requested).any() == bool(fragments)
