"""SwitchLoRA layers with an optimizer, without a model."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from switchtitan.distributed import random
from switchtitan.distributed.random import generator_for
from switchtitan.distributed.rows import Spans
from switchtitan.methods.lowrank import LowRankLinear, balanced_bounds
from switchtitan.methods.lowrank.rounding import FrozenWeights
from switchtitan.methods.switchlora import update
from switchtitan.methods.switchlora.candidates import Candidates, StoredCandidates
from switchtitan.methods.switchlora.method import SwitchLoraLinear, SwitchLoraOptimizer
from switchtitan.methods.switchlora.plan import Plan, SwitchLoraConfig, VectorSpan
from switchtitan.methods.switchlora.update import FactorMuon, Factors, VectorAdamW
from switchtitan.optim import AdamW, AdamWConfig
from switchtitan.optim.muon import MuonConfig


def with_interval(interval: float, **keys: Any) -> SwitchLoraConfig:
    """A configuration with any interval, also one that is refused because it meets the limits."""
    return SwitchLoraConfig(**keys).model_copy(update={"interval": interval})


def flat(spans: Spans) -> list[int]:
    """The vectors of spans, in order."""
    return [vector for span in spans for vector in span]


def build_layer(
    out_features: int, in_features: int, rank: int, scale: float, dtype: torch.dtype, seed: int = 0
) -> SwitchLoraLinear:
    """A layer with balanced initial candidates and a random weight of variance 1 / in."""
    bounds = balanced_bounds(out_features, in_features, rank)
    layer = SwitchLoraLinear(in_features, out_features, rank, scale, bounds)
    layer.store_candidates(on_host=False)
    weight = (
        torch.randn(out_features, in_features, generator=generator_for(seed, "weight"))
        / in_features**0.5
    )
    values = layer.initial_tensors(weight, partial(generator_for, seed))
    layer.load_state_dict(values)
    return layer.to(dtype)


def build_rule(
    keys: AdamWConfig | MuonConfig,
    layers: Mapping[str, LowRankLinear],
    plan: Plan | None = None,
    compute_dtype: torch.dtype = torch.float32,
    compile_step: bool = False,
) -> VectorAdamW | FactorMuon:
    """A rule for all vectors; by default its plan never switches."""
    if plan is None:
        rank = next(iter(layers.values())).rank
        config = SwitchLoraConfig(rank=rank, freeze_steps=1, reset_moments="none")
        plan = Plan(config, 1000, np.full(len(layers), rank))
    if isinstance(keys, MuonConfig):
        return FactorMuon(keys, Factors(layers, compute_dtype), plan, compile_step)
    return VectorAdamW(keys, Factors(layers), plan, compile_step)


def step_rule(rule: VectorAdamW | FactorMuon, frozen: Sequence[VectorSpan] = ()) -> None:
    """Steps a rule of `build_rule`, which holds these vectors still."""
    plan = rule._plan
    for factor, layer, vectors in frozen:
        plan.last_switched[1 - factor, layer, vectors.start : vectors.stop] = plan.step
    plan.advance([])
    rule.step()


def build_optimizer(
    config: SwitchLoraConfig,
    keys: AdamWConfig | MuonConfig,
    layers: list[SwitchLoraLinear],
    num_steps: int,
    candidates: Candidates | None = None,
    seed: int = 0,
    compile_step: bool = False,
) -> SwitchLoraOptimizer:
    """An optimizer of these layers only, named layer0, layer1, ...; no full-rank parameters."""
    named = {f"layer{index}": layer for index, layer in enumerate(layers)}
    plan = Plan(config, num_steps, np.array([layer.num_candidates for layer in layers]))
    return SwitchLoraOptimizer(
        named,
        plan,
        build_rule(keys, named, plan, compile_step=compile_step),
        AdamW(keys, []),
        candidates or StoredCandidates(layers),
        FrozenWeights(named, seed, compile_step),
    )


def freeze_steps_left(state: dict[str, torch.Tensor], freeze_steps: int) -> torch.Tensor:
    """Steps for which each vector is still frozen, [2, layers, rank], from an optimizer's state."""
    since = state["switch.step"] - state["switch.last_switched"].flip(0)
    return (freeze_steps - since).clamp(min=0)


def vector_steps(optimizer: SwitchLoraOptimizer) -> torch.Tensor:
    """Steps since each vector's reset, [2, layers, rank]."""
    return torch.from_numpy(optimizer._plan.num_updates().copy())


def set_gradients(layers: list[LowRankLinear], value: float) -> None:
    """The same gradient for every element of every factor."""
    for layer in layers:
        for factor in (layer.lora_a, layer.lora_b):
            factor.grad = torch.full_like(factor, value)


def effective_weight(layer: LowRankLinear) -> torch.Tensor:
    """W + s B A in float64."""
    weight, lora_a, lora_b = (
        tensor.detach().to(torch.float64) for tensor in (layer.weight, layer.lora_a, layer.lora_b)
    )
    return weight + layer.scale * lora_b.T @ lora_a


def relative_change(after: torch.Tensor, before: torch.Tensor) -> float:
    """|after - before| / |before| in Frobenius norms."""
    return ((after - before).norm() / before.norm()).item()


def requested_and_switched(
    optimizer: SwitchLoraOptimizer, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Switches `num_steps` times; returns how many vectors of each layer were due and switched."""
    plan, requested = optimizer._plan, 0
    for _ in range(num_steps):
        requested = requested + plan.requested()
        optimizer.switch()
    return np.asarray(requested), plan.num_switched


def limit_elements(monkeypatch: Any, per_call: int = 2**25, in_cache: int = 2**16) -> None:
    """Limits the groups of factors, and the blocks that a CPU updates at a time."""
    monkeypatch.setattr(update, "_ELEMENTS_PER_CALL", per_call)
    monkeypatch.setattr(update, "_ELEMENTS_IN_CACHE", in_cache)


def draw_few_at_a_time(monkeypatch: Any, num_elements: int) -> None:
    """Draws random vectors in parts of so many elements."""
    monkeypatch.setattr(random, "_DRAWN_AT_A_TIME", num_elements)
