"""The least time in which a card could run what a step launches (roofline)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from switchtitan.benchmark.gpu.record import Launch, StepOnGpu
from switchtitan.observability.throughput import peak_flops_per_s


@dataclass(frozen=True)
class Card:
    """What a data sheet says of a card; its dense bf16 FLOP/s are those of `peak_flops_per_s`."""

    arch: str
    device_name: str
    bandwidth: float
    """Bytes per second of device memory."""
    float32_flops_per_s: float
    """Without TF32."""

    def seconds(self, launch: Launch) -> float:
        """Returns the least seconds of a launch; 0 for a collective."""
        if launch.kind == "collective":
            return 0.0
        flops_per_s = peak_flops_per_s(self.device_name)
        if launch.dtype == "float32":
            flops_per_s = self.float32_flops_per_s
        assert flops_per_s is not None
        return max(launch.num_bytes / self.bandwidth, launch.num_flops / flops_per_s)


CARDS = {
    # NVIDIA A100 Tensor Core GPU, data sheet, 2021.
    "A100 80GB SXM": Card("sm_80", "NVIDIA A100-SXM4-80GB", 2.039e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU, data sheet, 2023.
    "H100 SXM": Card("sm_90", "NVIDIA H100 80GB HBM3", 3.35e12, 67e12),
    # NVIDIA H200 Tensor Core GPU, data sheet, 2024.
    "H200": Card("sm_90", "NVIDIA H200", 4.8e12, 67e12),
    # NVIDIA L4 Tensor Core GPU, data sheet, 2023.
    "L4": Card("sm_89", "NVIDIA L4", 0.3e12, 30.3e12),
    # NVIDIA Ada architecture white paper, 2023, appendix A.
    "RTX 4090": Card("sm_89", "NVIDIA GeForce RTX 4090", 1.008e12, 82.6e12),
}


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
        cost.seconds += number * card.seconds(launch)
    return costs


def bounds_s(steps: Mapping[str, StepOnGpu]) -> dict[str, float]:
    """Returns the least seconds of a step on each card whose architecture is in `steps`."""
    return {
        name: costs_by(steps[card.arch].launches, card)[()].seconds
        for name, card in CARDS.items()
        if card.arch in steps
    }


def card_of(arch: str) -> Card:
    """Returns the first card of an architecture."""
    return next(card for card in CARDS.values() if card.arch == arch)
