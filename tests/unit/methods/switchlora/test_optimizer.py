"""The optimizer reproduces the authors' run, and equals a literal re-implementation on a float64
LLaMA."""

import pytest
import torch
from support.small_llama import draw_model, logits_of
from support.switchlora_layers import freeze_steps_left, requested_and_switched, with_interval
from support.switchlora_runs import (
    ADAMW,
    NUM_STEPS,
    RANK,
    build_ours,
    check_golden_trajectory,
    check_whole_run,
    run_step,
)

from switchtitan.methods.switchlora import SwitchLoraConfig


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


in_float64 = pytest.mark.usefixtures("_float64")


def test_golden_trajectory_is_reproduced():
    check_golden_trajectory()


RUNS = {
    "balanced": {
        "decay": "exponential",
        "decay_ratio": 0.9,
        "interval": 4.3,
        "freeze_steps": 2,
        "alpha": 2.5,
    },
    # k_proj and v_proj go round their six candidates several times.
    "no-reset": {
        "decay": "constant",
        "interval": 6.1,
        "freeze_steps": 0,
        "reset_moments": "none",
        "alpha": 2.5,
    },
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
        "alpha": 2.5,
        "reset_moments": "momentum",
    },
    "constant-lora": {
        "candidates": "constant",
        "decay": "sigmoid",
        "interval": 5,
        "freeze_steps": 1,
        "decay_ratio": 0.9,
        "init": "lora",
        "reset_moments": "both",
    },
}


@in_float64
@pytest.mark.parametrize("run", RUNS)
def test_whole_model_follows_the_rules_written_out_vector_by_vector(run):
    num_steps = NUM_STEPS if run == "balanced" else 40
    check_whole_run(with_interval(rank=RANK, **RUNS[run]), num_steps=num_steps)


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


@in_float64
def test_metric_of_the_last_step_is_the_growth_of_the_total():
    config = SwitchLoraConfig(rank=RANK, interval=6, freeze_steps=2, decay="constant")
    model, optimizer = build_ours(config)
    total = 0.0
    for step in range(9):
        run_step(model, optimizer, step)
        metrics, before = optimizer.metrics(), total
        total = metrics["switch/vectors_switched_total"]
        assert metrics["switch/vectors_switched"] == total - before
        assert metrics["optimizer/lr"] == ADAMW.lr
    assert total > 0


@in_float64
@pytest.mark.parametrize("candidates", ["swap", "constant"])
def test_run_resumes_bitwise_from_its_state(candidates):
    config = with_interval(6.5, rank=RANK, freeze_steps=3, decay="constant", candidates=candidates)
    model, optimizer = build_ours(config)
    for step in range(11):
        run_step(model, optimizer, step)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert freeze_steps_left(state, 3).any(), "nothing is frozen: that part is not tested"

    other, resumed = build_ours(config)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(11, 19):
        assert run_step(other, resumed, step) == run_step(model, optimizer, step)
    for tensors, expected in (
        (other.state_dict(), model.state_dict()),
        (resumed.state_dict(), optimizer.state_dict()),
    ):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


@in_float64
@pytest.mark.parametrize("candidates", ["swap", "constant"])
def test_model_starts_as_the_plain_model_and_zero_grad_forgets_all_gradients(candidates):
    config = SwitchLoraConfig(rank=RANK, alpha=3, candidates=candidates)
    model, optimizer = build_ours(config)
    logits = logits_of(model, 0)
    # float64 rounding through two blocks
    torch.testing.assert_close(logits, logits_of(draw_model(), 0), rtol=0, atol=1e-12)
    logits.sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
