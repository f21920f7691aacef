"""SwitchLoRA layers with an optimizer, without a model."""

from functools import partial
from typing import Any

import numpy as np
import torch

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import Spans
from switchtitan.methods.lowrank import LayerBuffer, LowRankLinear
from switchtitan.methods.switchlora import factor_groups, vector_adamw
from switchtitan.methods.switchlora.candidates import Candidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.factor_muon import FactorMuon
from switchtitan.methods.switchlora.init import balanced_candidates_init, candidate_shapes
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
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
) -> LowRankLinear:
    """A layer with balanced initial candidates and a random weight of variance 1 / in."""
    layer = LowRankLinear(
        in_features,
        out_features,
        rank,
        scale,
        balanced_candidates_init,
        buffers={
            name: LayerBuffer(shape)
            for name, shape in candidate_shapes(out_features, in_features).items()
        },
    )
    weight = (
        torch.randn(out_features, in_features, generator=generator_for(seed, "weight"))
        / in_features**0.5
    )
    values = layer.initial_tensors(weight, partial(generator_for, seed))
    layer.load_state_dict(values)
    return layer.to(dtype)


def build_optimizer(
    config: SwitchLoraConfig,
    keys: AdamWConfig | MuonConfig,
    layers: list[LowRankLinear],
    num_steps: int,
    candidates: Candidates | None = None,
    seed: int = 0,
) -> SwitchLoraOptimizer:
    """An optimizer of these layers only, named layer0, layer1, ...; no full-rank parameters."""
    named = {f"layer{index}": layer for index, layer in enumerate(layers)}
    dense = AdamW(keys, [])
    rule = (
        FactorMuon(keys, named, torch.float32, False)
        if isinstance(keys, MuonConfig)
        else VectorAdamW(keys, named, False)
    )
    return SwitchLoraOptimizer(config, named, rule, dense, num_steps, seed, False, candidates)


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
    requested = sum(optimizer._schedule.requested(step) for step in range(num_steps))
    for _ in range(num_steps):
        optimizer.switch()
    return np.asarray(requested), optimizer._counts.num_switched


def limit_elements_per_call(monkeypatch: Any, num_elements: int) -> None:
    """Makes groups of factors small: the number for 10 million elements is one for few."""
    monkeypatch.setattr(factor_groups, "_ELEMENTS_PER_CALL", num_elements)


def limit_elements_in_cache(monkeypatch: Any, num_elements: int) -> None:
    """Makes the blocks small that a CPU updates at a time."""
    monkeypatch.setattr(vector_adamw, "_ELEMENTS_IN_CACHE", num_elements)


def are_groups_in_place(rule: VectorAdamW | FactorMuon) -> bool:
    """Whether the factors of every group lie next to each other, so that none was copied."""
    return all(matrix is not None for matrix in rule._factors._matrices)


def replace_first_shard(rule: VectorAdamW, value: float) -> torch.nn.Parameter:
    """Replaces a parameter, as FSDP replaces the local shard of a DTensor; with a gradient."""
    factors = rule._factors.factors
    factors[0] = torch.nn.Parameter(torch.full_like(factors[0], value))
    factors[0].grad = torch.ones_like(factors[0])
    return factors[0]
