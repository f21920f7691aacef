"""How a SwitchLoRA layer starts: all candidates are drawn, and the factors are copies of some of them."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.host_copies import to_device
from switchtitan.methods.lowrank.linear import (
    InitialFactors,
    LayerBuffer,
    balanced_bounds,
    lora_bound,
    uniform,
    without_update,
)
from switchtitan.methods.splitmix import advance64, splitmix64
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.schedule import initial_slots

_NUM_BITS = 24
"""Random bits in a value: as many as fp32 holds exactly."""


def num_candidates(out_features: int, in_features: int) -> int:
    """Candidates for each factor of a layer: as many as its weight has singular values."""
    return min(out_features, in_features)


def candidate_shapes(out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """`candidates_a` [c, in], `candidates_b` [c, out]."""
    count = num_candidates(out_features, in_features)
    return {"candidates_a": (count, in_features), "candidates_b": (count, out_features)}


def is_candidates(name: str) -> bool:
    """Whether a tensor of a model or a checkpoint, by qualified name, holds candidates."""
    return name.endswith((".candidates_a", ".candidates_b"))


def candidate_buffers(
    config: SwitchLoraConfig, out_features: int, in_features: int
) -> dict[str, LayerBuffer]:
    """The buffers for a layer's stored candidates; none where candidates are constant."""
    if config.candidates == "constant":
        return {}
    dtype = torch.bfloat16 if config.candidates_dtype == "bfloat16" else None
    is_on_host = config.candidates_device == "host"
    shapes = candidate_shapes(out_features, in_features)
    return {name: LayerBuffer(shape, dtype, is_on_host) for name, shape in shapes.items()}


def candidate_bounds(
    init: Literal["switchlora", "lora"], out_features: int, in_features: int, rank: int
) -> tuple[float, float]:
    """Bounds of the uniform distributions of A's and B's candidates: `balanced_bounds`, or `lora_bound` and 0."""
    if init == "switchlora":
        return balanced_bounds(out_features, in_features, rank)
    return lora_bound(in_features), 0.0


def initial_factors(config: SwitchLoraConfig) -> InitialFactors:
    """What gives a layer its initial tensors."""
    if config.candidates == "swap":
        return balanced_candidates_init if config.init == "switchlora" else lora_candidates_init
    return partial(drawn_candidates_init, config.init)


def balanced_candidates_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Candidates of both factors random with `balanced_bounds`, and W := weight - s B A.

    All are fp32: buffers of a shorter dtype round them, while the factors, and so W, start as they were drawn.

    Args:
        weight: [out, in], the plain layer's initial weight.

    Returns:
        `weight`, `lora_a`, `lora_b`, `candidates_a`, `candidates_b`.
    """
    return _from_stored_candidates("switchlora", weight, rank, scale, generator_for)


def lora_candidates_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """A's candidates uniform within `lora_bound`, B's zero, W untouched. Returns as `balanced_candidates_init`."""
    return _from_stored_candidates("lora", weight, rank, scale, generator_for)


def drawn_candidates_init(
    init: Literal["switchlora", "lora"],
    weight: Tensor,
    rank: int,
    scale: float,
    generator_for: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The same distributions, for candidates that are drawn when needed: no more than the factors' own are drawn here.

    Returns:
        `weight`, `lora_a`, `lora_b`.
    """
    out_features, in_features = weight.shape
    bound_a, bound_b = candidate_bounds(init, out_features, in_features, rank)
    slots_a, slots_b = initial_slots(rank, num_candidates(out_features, in_features))
    lora_a = _draw(generator_for("candidates_a"), slots_a, bound_a, in_features).to(weight.dtype)
    lora_b = _draw(generator_for("candidates_b"), slots_b, bound_b, out_features).to(weight.dtype)
    return {
        "weight": without_update(weight, lora_a, lora_b, scale),
        "lora_a": lora_a,
        "lora_b": lora_b,
    }


def candidates_key(generator: torch.Generator) -> int:
    """The key of a factor's drawn candidates, from the generator that belongs to their name."""
    return generator.initial_seed()


def draw_vectors(keys: Tensor, bounds: Tensor, elements: range) -> Tensor:
    """Return vectors whose elements are uniform on [-bound, bound), the same bits on every device.

    Args:
        keys: [vectors] int64, a vector's identity.
        bounds: [vectors] fp32.
        elements: the elements to draw of each vector.

    Returns:
        [vectors, elements] fp32.
    """
    indices = torch.arange(elements.start, elements.stop, device=keys.device)
    return _draw_elements(keys.unsqueeze(1), bounds.unsqueeze(1), indices)


def draw_vectors_of_widths(
    keys: Tensor, bounds: Tensor, widths: np.ndarray, device: torch.device
) -> Tensor:
    """Return the vectors of `draw_vectors` with widths of their own, one after the other.

    The number of kernels depends neither on the number of vectors nor on their widths.

    Args:
        keys, bounds: [vectors] int64 and fp32, on the CPU.
        widths: [vectors] int64.

    Returns:
        [sum of widths] fp32, on `device`.
    """
    num_elements = int(widths.sum())
    starts = widths.cumsum(0) - widths
    # A vector's element 0 is drawn at the index `start`.
    keys = advance64(keys, torch.from_numpy(-starts))
    table = to_device(torch.stack([keys, torch.from_numpy(widths)]), device)
    of_element = torch.repeat_interleave(table[1], output_size=num_elements)
    indices = torch.arange(num_elements, device=device)
    return _draw_elements(table[0][of_element], to_device(bounds, device)[of_element], indices)


def _draw_elements(keys: Tensor, bounds: Tensor, indices: Tensor) -> Tensor:
    """Elements `indices` of vectors `keys`; all arguments broadcast."""
    # The sign is included: integers in [-2^23, 2^23).
    values = splitmix64(keys, indices) >> (64 - _NUM_BITS)
    return values.to(torch.float32) * (bounds * 2.0 ** (1 - _NUM_BITS))


def _draw(generator: torch.Generator, slots: np.ndarray, bound: float, width: int) -> Tensor:
    """Candidates in `slots` [k], [k, width]."""
    keys = splitmix64(torch.tensor(candidates_key(generator)), torch.from_numpy(slots))
    return draw_vectors(keys, torch.full(keys.shape, bound, dtype=torch.float32), range(width))


def _from_stored_candidates(
    init: Literal["switchlora", "lora"],
    weight: Tensor,
    rank: int,
    scale: float,
    generator_for: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    out_features, in_features = weight.shape
    count = num_candidates(out_features, in_features)
    bound_a, bound_b = candidate_bounds(init, out_features, in_features, rank)
    candidates_a = uniform((count, in_features), bound_a, generator_for("candidates_a"))
    candidates_b = uniform((out_features, count), bound_b, generator_for("candidates_b")).t()
    slots_a, slots_b = initial_slots(rank, count)
    lora_a, lora_b = candidates_a[slots_a], candidates_b[slots_b]
    return {
        "weight": without_update(weight, lora_a, lora_b, scale),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "candidates_a": candidates_a,
        "candidates_b": candidates_b,
    }
