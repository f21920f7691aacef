"""SwitchLoRA layers with an optimizer, without a model."""

from functools import partial
from typing import Any

import torch

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import Spans
from switchtitan.methods.lowrank import LayerBuffer, LowRankLinear
from switchtitan.methods.switchlora.candidates import Candidates
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.factor_muon import FactorMuon
from switchtitan.methods.switchlora.init import balanced_candidates_init, candidate_shapes
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import AdamW, AdamWConfig
from switchtitan.optim.muon import MuonConfig


def least_moving(rank: int, interval: float, freeze_steps: int, **keys: Any) -> SwitchLoraConfig:
    """A configuration whose switches are spread evenly; vectors that move least come first."""
    keys = {"decay": "constant", "order": "least_moving"} | keys
    return SwitchLoraConfig(rank=rank, interval=interval, freeze_steps=freeze_steps, **keys)


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
