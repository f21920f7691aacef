"""SwitchLoRA layers with an optimizer, without a model."""

from functools import partial

import numpy as np
import torch
from torch import nn

from support.small_llama import initial_tensors
from support.tensors import differing
from switchtitan.distributed.shards import full_tensor
from switchtitan.methods.adapter.linear import adapter_layers, balanced_bounds
from switchtitan.methods.adapter.rounding import FrozenWeights
from switchtitan.methods.switchlora import SwitchLora, update
from switchtitan.methods.switchlora.candidates import StoredCandidates
from switchtitan.methods.switchlora.method import SwitchLoraLinear, SwitchLoraOptimizer
from switchtitan.methods.switchlora.plan import Plan, SwitchLoraConfig
from switchtitan.methods.switchlora.update import FactorMuon, Factors, VectorAdamW
from switchtitan.methods.targets import FACTORS
from switchtitan.numerics import random
from switchtitan.numerics.fixed_point import values_of
from switchtitan.numerics.random import generator_for
from switchtitan.numerics.split_float import join
from switchtitan.optim.adamw import AdamW, AdamWConfig
from switchtitan.optim.muon import MuonKeys
from switchtitan.optim.parameters import TrainedParameter

# Multiples of 16, for which cuBLAS has TF32 kernels.
LARGER = (
    *("--model.hidden_size", "256", "--model.intermediate_size", "512"),
    *("--method.rank", "64", "--method.interval", "4"),
)
MOST_DRIFT = 2e-4
"""The largest relative change of W + s B A after 500 switches of `LARGER` without learning. Then
switches recur, and their roundings add up: in fp32 to 4e-5, with products in TF32 to 9e-2 (both on
a CPU, the latter by rounding the products' inputs)."""


def with_interval(interval, **keys):
    """A configuration with any interval, also one that is refused because it meets the limits."""
    return SwitchLoraConfig(**keys).model_copy(update={"interval": interval})


def flat(spans):
    """The vectors of spans, in order."""
    return [vector for span in spans for vector in span]


def build_layer(out_features, in_features, rank, scale, dtype, seed=0):
    """A layer with balanced initial candidates."""
    bounds = balanced_bounds(out_features, in_features, rank)
    layer = SwitchLoraLinear(in_features, out_features, rank, scale, bounds)
    layer.store_candidates(on_host=False)
    return filled(layer, seed).to(dtype)


def filled(layer, seed):
    """The layer with the values at its start from a random weight of variance 1 / in."""
    shape = layer.plain_shape
    weight = torch.randn(shape, generator=generator_for(seed, "weight")) / shape[1] ** 0.5
    layer.load_state_dict(initial_tensors(layer, weight, partial(generator_for, seed)))
    return layer


def build_rule(keys, layers, plan=None, compile_step=False):
    """A rule for all vectors; by default its plan never switches."""
    if plan is None:
        rank = next(iter(layers.values())).rank
        config = SwitchLoraConfig(rank=rank, freeze_steps=1, reset_moments="none")
        plan = Plan(config, 1000, np.full(len(layers), rank))
    factors = Factors(
        [
            TrainedParameter(f"{name}.{key}", layer.get_parameter(key))
            for key in FACTORS
            for name, layer in layers.items()
        ]
    )
    rule = FactorMuon if isinstance(keys, MuonKeys) else VectorAdamW
    return rule(keys, factors, plan, compile_step)


def step_rule(rule, frozen=()):
    """Steps a rule of `build_rule`, which holds these vectors still."""
    plan = rule._plan
    for factor, layer, vectors in frozen:
        plan.last_switched[1 - factor, layer, vectors.start : vectors.stop] = plan.step
    plan.advance([])
    rule.step()


def build_optimizer(config, keys, layers, num_steps, candidates=None, compile_step=False):
    """An optimizer of these layers only, named layer0, layer1, ...; no full-rank parameters."""
    named = {f"layer{index}": layer for index, layer in enumerate(layers)}
    plan = Plan(config, num_steps, np.array([layer.num_candidates for layer in layers]))
    return SwitchLoraOptimizer(
        named,
        plan,
        build_rule(keys, named, plan, compile_step=compile_step),
        AdamW(keys, []),
        candidates or StoredCandidates(layers),
        FrozenWeights(named, 0, compile_step),
    )


def _build_switching(shapes, device, **keys):
    """Layers that switch a vector of each factor in every step, and their optimizer."""
    config = SwitchLoraConfig(rank=5, interval=5, freeze_steps=0, decay="constant", **keys)
    method, layers = SwitchLora(config, 500, 4), {}
    for index, (out, in_) in enumerate(shapes):
        name = f"layer{index}"
        layer = filled(method.build_layer(name, nn.Linear(in_, out, bias=False)), index)
        layers[name] = layer.to(device)
        for buffer in layer.host_buffers:
            setattr(layer, buffer, layer.get_buffer(buffer).cpu())
    candidates = method.candidates_of(layers)
    adamw = AdamWConfig(lr=3e-4)
    optimizer = build_optimizer(config, adamw, list(layers.values()), 500, candidates)
    return nn.ModuleDict(layers), optimizer


def differing_with_host_candidates(shapes, device):
    """Trains layers [out, in] on a device, with candidates there and on the host, in 60 steps with
    switches; returns what differs, by step."""
    here, optimizer_here = _build_switching(shapes, device)
    there, optimizer_there = _build_switching(shapes, device, candidates_device="host")
    assert {parameter.device.type for parameter in there.parameters()} == {device}
    assert {buffer.device.type for buffer in there.buffers()} == {"cpu"}
    generator, found = torch.Generator().manual_seed(3), []
    for step in range(60):
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            if one.requires_grad:
                one.grad = torch.randn(one.shape, generator=generator).to(device)
                other.grad = one.grad.clone()
        optimizer_here.step()
        optimizer_there.step()
        if step % 7 == 0:  # between them, vectors are on their way
            optimizer_there.state_dict()
            on_device = {name: value.to(device) for name, value in there.state_dict().items()}
            found += [(step, name) for name in differing(on_device, here.state_dict())]
    total = optimizer_here.metrics()["switch/vectors_switched_total"]
    assert total > 3 * 2 * 17, "all have come back"
    return found


def freeze_steps_left(state, freeze_steps):
    """Steps for which each vector is still frozen, [2, layers, rank], from an optimizer's state."""
    since = state["switch.step"] - state["switch.last_switched"].flip(0)
    return (freeze_steps - since).clamp(min=0)


def vector_steps(optimizer):
    """Steps since each vector's reset, [2, layers, rank]."""
    return torch.from_numpy(optimizer._plan.steps_since_reset().copy())


def effective_weight(layer, optimizer=None):
    """W + s B A in float64; of a sharded layer, the full weight, collective. With the optimizer of
    this layer alone, factors have all bits."""
    weight, *factors = (
        full_tensor(tensor).detach() for tensor in (layer.weight, layer.lora_a, layer.lora_b)
    )
    low_bits = [] if optimizer is None else [*optimizer._rule.weights.low_bits.values()]
    lora_a, lora_b = map(join, factors, low_bits) if low_bits else factors
    return values_of(weight, torch.float64) + layer.scale * lora_b.double().T @ lora_a.double()


def effective_weights(model):
    """Of each layer of a model, by the layer's name."""
    return {name: effective_weight(layer) for name, layer in adapter_layers(model).items()}


def relative_change(after, before):
    """|after - before| / |before| in Frobenius norms."""
    return ((after - before).norm() / before.norm()).item()


def requested_and_switched(optimizer, num_steps):
    """Switches `num_steps` times; returns how many vectors of each layer were due and switched."""
    plan, requested = optimizer._plan, 0
    for _ in range(num_steps):
        requested = requested + plan.requested()
        optimizer.switch()
    return np.asarray(requested), plan.num_switched


def limit_factors(monkeypatch, per_call):
    """Limits the groups of factors that a compiled update and one on a GPU take."""
    monkeypatch.setattr(update, "_FACTORS_PER_CALL", per_call)


def draw_few_at_a_time(monkeypatch, num_elements):
    """Draws random vectors in parts of so many elements."""
    monkeypatch.setattr(random, "_DRAWN_AT_A_TIME", num_elements)
