"""`switchtitan benchmark optimizer`: AdamW with a step count per vector, and torch's AdamW."""

import argparse
import time

import torch
from pydantic import JsonValue

from switchtitan.benchmark.commands.command import Command, Measurement, Overrides, add_rounds
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.tables import call_record, call_table
from switchtitan.benchmark.timing import time_calls_in_turns
from switchtitan.builders.stepper import build_method, build_plain_model
from switchtitan.distributed.adjacent import allocate_adjacent, empty_on
from switchtitan.distributed.world import device_type
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig
from switchtitan.methods.lowrank import LowRankLinear, low_rank_layers
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import require_adamw


def build_layers(config: JobConfig, device: torch.device) -> dict[str, LowRankLinear]:
    """Returns the low-rank layers of a configuration's model, with random factors and gradients.

    Other tensors are uninitialized.

    Raises:
        ConfigError: if the method has no low-rank layers.
    """
    model = build_plain_model(config)
    build_method(config).prepare_model(model)
    layers = low_rank_layers(model)
    if not layers:
        raise ConfigError(
            f"[method] name = {config.method.name!r}: has no low-rank layers, whose update this "
            "benchmark times; choose another method"
        )
    draw = torch.Generator(device).manual_seed(0)
    allocated = allocate_adjacent(factors_of(layers), device)
    with torch.no_grad():
        for layer in layers.values():
            layer._apply(lambda tensor: empty_on(tensor, device, allocated))
            for factor in (layer.lora_a, layer.lora_b):
                factor.normal_(std=0.02, generator=draw)
                factor.grad = torch.randn(factor.shape, generator=draw, device=device)
    return layers


def factors_of(layers: dict[str, LowRankLinear]) -> list[torch.nn.Parameter]:
    return [factor for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="FILE or FILE:section.key=value,... with a low-rank method"
    )
    add_rounds(parser, rounds=10, per_round=5, unit="calls", meaning="updates")


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    (config,) = load_sides([options.config], overrides).values()
    adamw, device = require_adamw(config.optimizer), torch.device(device_type())
    theirs = factors_of(build_layers(config, device))
    fused = torch.optim.AdamW(
        theirs,
        lr=adamw.lr,
        betas=adamw.betas,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        fused=True,
    )
    compiled = VectorAdamW(adamw, build_layers(config, device), compile_step=True)
    eager = VectorAdamW(adamw, build_layers(config, device), compile_step=False)
    update_mask = torch.ones_like(eager.num_steps, dtype=torch.bool)
    began_at = time.perf_counter()
    compiled.step(update_mask)
    first_step_s = time.perf_counter() - began_at
    sides = {
        "torch.optim.AdamW, fused": fused.step,
        "per vector, compiled": lambda: compiled.step(update_mask),
        "per vector, eager": lambda: eager.step(update_mask),
    }
    times = time_calls_in_turns(sides, device, options.rounds, options.calls_per_round)
    num_elements = sum(factor.numel() for factor in theirs)
    title = (
        f"update of {len(theirs)} factors, {num_elements / 1e6:.1f} M elements; the first compiled "
        f"update took {first_step_s:.1f} s"
    )
    record: dict[str, JsonValue] = {
        "num_factors": len(theirs),
        "num_elements": num_elements,
        "first_compiled_step_s": first_step_s,
        "rounds": options.rounds,
        "calls_per_round": options.calls_per_round,
        "updates": call_record(times),
    }
    return Measurement([title, *call_table(times)], record)


OPTIMIZER = Command(
    name="optimizer",
    summary="time the update of low-rank factors and torch's fused AdamW",
    description="Times the update of a configuration's low-rank factors in alternation: torch's "
    "fused AdamW, and AdamW with a step count per vector, compiled and eager. Switches nothing.",
    add_arguments=_add_arguments,
    measure=_measure,
)
