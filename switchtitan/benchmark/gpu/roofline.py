"""The least time in which a card could run what a step launches (roofline)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from switchtitan.benchmark.gpu.record import Launch, StepOnGpu
from switchtitan.distributed.gpus import CARDS, Card


@dataclass
class Cost:
    """Sums over launches of one rank."""

    num_launches: int = 0
    num_bytes: int = 0
    num_flops: int = 0
    seconds: float = 0.0
    """The bound on a card."""


def costs_by(launches: Iterable[tuple[Launch, int]], card: Card, *keys: str) -> dict[tuple, Cost]:
    """Returns the costs of launches by some of their attributes, e.g. "region"; by () the total."""
    costs: dict[tuple, Cost] = {}
    for launch, number in launches:
        cost = costs.setdefault(tuple(getattr(launch, key) for key in keys), Cost())
        cost.num_launches += number * launch.num_launches
        cost.num_bytes += number * launch.num_bytes
        cost.num_flops += number * launch.num_flops
        cost.seconds += number * bound_s(launch, card)
    return costs


def bounds_s(steps: Mapping[str, StepOnGpu]) -> dict[str, float]:
    """Returns the least seconds of a step on each card whose architecture is in `steps`."""
    return {
        name: costs_by(steps[card.arch].launches, card)[()].seconds
        for name, card in CARDS.items()
        if card.arch in steps
    }


def bound_s(launch: Launch, card: Card) -> float:
    """Returns the least seconds of a launch; 0 for a collective."""
    if launch.kind == "collective":
        return 0.0
    return max(launch.num_bytes / card.bandwidth, launch.num_flops / card.flops_per_s(launch.dtype))
