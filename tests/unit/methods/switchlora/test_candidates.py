"""Constant candidates are not stored; a switch uses the values of their definition."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.switchlora_layers import (
    build_optimizer,
    effective_weight,
    relative_change,
    set_gradients,
    with_interval,
)
from support.switchlora_reference import constant_candidates
from support.tiny import full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.world import stop_world
from switchtitan.methods.lowrank import LowRankLinear, low_rank_layers
from switchtitan.methods.lowrank.linear import balanced_bounds
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.methods.switchlora.candidates import DrawnCandidates
from switchtitan.methods.switchlora.init import initial_factors
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.optim import AdamWConfig
from switchtitan.training.description import count_parameters

CONSTANT = ("--method.candidates", "constant")
# (out, in, rank): wide and tall
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]
SEED = 4
METRICS = (
    "switch/vectors_switched",
    "switch/vectors_switched_total",
    "switch/frozen_share",
    "switch/candidate_coverage",
)


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def switching_layer(
    shape: tuple[int, int, int], dtype: torch.dtype, num_per_step: int = 1, init: str = "switchlora"
) -> tuple[LowRankLinear, SwitchLoraOptimizer]:
    """A layer whose optimizer only switches: learning rate 0 and gradients of zero."""
    out_features, in_features, rank = shape
    config = with_interval(
        rank / num_per_step,
        rank=rank,
        freeze_steps=0,
        decay="constant",
        candidates="constant",
        init=init,
    )
    layer = LowRankLinear(in_features, out_features, rank, 1 / rank, initial_factors(config))
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    values = layer.initial_tensors(
        weight / in_features**0.5, lambda name: generator_for(SEED, f"layer0.{name}")
    )
    layer.load_state_dict(values)
    layer.to(dtype)
    candidates = DrawnCandidates(config, {"layer0": layer}, SEED)
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), [layer], 500, candidates)
    optimizer.set_lr(0.0)
    set_gradients([layer], 0.0)
    return layer, optimizer


def expected_candidates(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For A [c, in], for B [c, out]."""
    out_features, in_features, rank = shape
    count = min(out_features, in_features)
    bound_a, bound_b = balanced_bounds(out_features, in_features, rank)
    return (
        constant_candidates(SEED, "layer0.candidates_a", count, in_features, bound_a),
        constant_candidates(SEED, "layer0.candidates_b", count, out_features, bound_b),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_vector_in_use_is_the_candidate_of_its_slot_always_the_same(shape):
    """Without training: from the start, and for three rounds of the ring."""
    rank, count = shape[2], min(shape[:2])
    layer, optimizer = switching_layer(shape, torch.float32)
    vectors_a, vectors_b = expected_candidates(shape)
    slots_a, slots_b = {}, {}
    for i in range(rank):
        slots_a[i] = slots_b[(rank // 2 + i) % rank] = count - rank + i
    for switched in range(3 * count):
        assert torch.equal(layer.lora_a, vectors_a[[slots_a[i] for i in range(rank)]])
        assert torch.equal(layer.lora_b, vectors_b[[slots_b[i] for i in range(rank)]])
        optimizer.step()
        slots_a[switched % rank] = slots_b[(rank // 2 + switched) % rank] = switched % count


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Rounding of float64; what the method promises in fp32, where each element rounds to 6e-8.
    [(torch.float64, 1e-12), (torch.float32, 1e-7)],
)
@pytest.mark.parametrize("init", ["switchlora", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_switch_keeps_the_effective_weight(shape, init, dtype, bound):
    for num_per_step in (1, 3):
        layer, optimizer = switching_layer(shape, dtype, num_per_step, init)
        with torch.no_grad():  # with LoRA's zeros in B nothing would be folded
            layer.lora_b += 0.1
        for _ in range(12):
            before, factors = effective_weight(layer), layer.lora_a.clone()
            optimizer.step()
            assert relative_change(effective_weight(layer), before) <= bound
            assert not torch.equal(layer.lora_a, factors)


def test_nothing_is_stored_for_the_candidates(corpora):
    trainers = {
        candidates: tiny_trainer(
            corpora / f"stored-{candidates}", "switchlora", "--method.candidates", candidates
        )
        for candidates in ("swap", "constant")
    }
    names = {candidates: set(trainer.tensors()) for candidates, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.stepper.close()
    assert list(trainers["constant"].stepper.model.buffers()) == []
    counts = {
        candidates: count_parameters(trainer.stepper.model)
        for candidates, trainer in trainers.items()
    }
    assert counts["constant"]["buffers"] == 0
    assert counts["swap"]["buffers"] > 0
    assert counts["constant"]["trainable"] == counts["swap"]["trainable"]
    assert {name for name in names["swap"] if ".candidates_" not in name} == names["constant"]
    assert any(".candidates_" in name for name in names["swap"])
    for name, layer in low_rank_layers(trainers["constant"].stepper.model).items():
        spread = layer.lora_b.full_tensor().abs().max()
        bound = balanced_bounds(layer.out_features, layer.in_features, layer.rank)[1]
        assert 0.9 * bound < spread <= bound * (1 + 1e-6), name


def test_switch_plan_is_that_of_stored_candidates(corpora):
    states = {}
    for candidates in ("swap", "constant"):
        trainer = tiny_trainer(
            corpora / f"plan-{candidates}", "switchlora", "--method.candidates", candidates
        )
        states[candidates] = []
        for _ in range(15):
            train_steps(trainer, 1)
            state = trainer.stepper.optimizer.state_dict()
            states[candidates].append(
                {
                    name: tensor.clone()
                    for name, tensor in state.items()
                    if name.startswith("switch.")
                }
                | {
                    "metrics": torch.tensor(
                        [trainer.stepper.optimizer.metrics()[key] for key in METRICS]
                    )
                }
            )
        trainer.stepper.close()
    assert states["swap"][-1]["switch.num_switched"].min() > 10
    for swap, constant in zip(states["swap"], states["constant"], strict=True):
        assert swap.keys() == constant.keys()
        for name, tensor in swap.items():
            assert torch.equal(constant[name], tensor), name


def run(
    folder: Path, num_steps: int, *overrides: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = tiny_trainer(folder, "switchlora", *CONSTANT, *overrides)
    losses = train_steps(trainer, num_steps)
    tensors = full_tensors(trainer)
    if num_steps == 20 and trainer.stepper.state.step == 20:
        trainer.save()
        trainer.checkpointer.finish()
    trainer.stepper.close()
    return losses, tensors


def test_resuming_equals_a_straight_run_bitwise(corpora):
    losses, straight = run(corpora / "constant-straight", 40)
    folder = corpora / "constant-resumed"
    first, _ = run(folder, 20)
    second, resumed = run(folder, 20)
    assert first + second == losses
    assert losses[-1] < losses[0]
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


def initial_factors_of(seed: int) -> dict[str, torch.Tensor]:
    config = SwitchLoraConfig(rank=3, candidates="constant", targets=("first", "second"))
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(7, 5, bias=False) for name in ("first", "second")}
    )
    SwitchLora(config, 10, seed).prepare_model(model)
    return {
        f"{name}.{factor}": tensor
        for name, layer in low_rank_layers(model).items()
        for factor, tensor in layer.initial_tensors(
            torch.zeros(5, 7), lambda local, name=name: generator_for(seed, f"{name}.{local}")
        ).items()
        if factor != "weight"
    }


def test_draws_follow_the_seed_and_differ_from_layer_to_layer():
    one, same, other = initial_factors_of(1), initial_factors_of(1), initial_factors_of(2)
    for name, factor in one.items():
        assert torch.equal(factor, same[name])
        assert not torch.isclose(factor, other[name]).any()
    for factor in ("lora_a", "lora_b"):
        assert not torch.isclose(one[f"first.{factor}"], one[f"second.{factor}"]).any()
