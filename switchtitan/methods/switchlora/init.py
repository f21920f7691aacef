"""Initial values of a SwitchLoRA layer: candidates are drawn, and factors are copies of some."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.host_copies import to_device
from switchtitan.distributed.initial_draws import GeneratorFor, RandomRows
from switchtitan.distributed.seeds import advance64, splitmix64
from switchtitan.methods.lowrank.linear import (
    InitialFactors,
    LayerBuffer,
    LayerShape,
    balanced_bounds,
    lora_bound,
    random_counterparts,
    random_vectors,
    take,
    without_update,
)
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.schedule import initial_slots

_NUM_BITS = 24
"""Random bits in a value: the significand bits of fp32."""


def num_candidates(out_features: int, in_features: int) -> int:
    """Returns the number of candidates for each factor: the smaller dimension of the weight."""
    return min(out_features, in_features)


def candidate_shapes(out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """Returns the shapes of `candidates_a` [c, in] and `candidates_b` [c, out]."""
    count = num_candidates(out_features, in_features)
    return {"candidates_a": (count, in_features), "candidates_b": (count, out_features)}


def candidate_buffers(
    config: SwitchLoraConfig, out_features: int, in_features: int
) -> dict[str, LayerBuffer]:
    """Returns the buffers for a layer's stored candidates; none if candidates are constant."""
    if config.candidates == "constant":
        return {}
    dtype = torch.bfloat16 if config.candidates_dtype == "bfloat16" else None
    is_on_host = config.candidates_device == "host"
    shapes = candidate_shapes(out_features, in_features)
    return {name: LayerBuffer(shape, dtype, is_on_host) for name, shape in shapes.items()}


def candidate_bounds(
    init: Literal["switchlora", "lora"], out_features: int, in_features: int, rank: int
) -> tuple[float, float]:
    """Returns the bounds of the uniform distributions of A's and B's candidates."""
    if init == "switchlora":
        return balanced_bounds(out_features, in_features, rank)
    return lora_bound(in_features), 0.0


def initial_factors(config: SwitchLoraConfig) -> InitialFactors:
    """Returns the function that computes a layer's initial tensors."""
    if config.candidates == "swap":
        return balanced_candidates_init if config.init == "switchlora" else lora_candidates_init
    return partial(drawn_candidates_init, config.init)


def balanced_candidates_init(
    weight: Tensor, shape: LayerShape, rows: Mapping[str, range], generator_for: GeneratorFor
) -> dict[str, Tensor]:
    """Draws the candidates of both factors within `balanced_bounds`, and sets W := weight - s B A.

    All are fp32. Candidates in bf16 buffers are rounded; factors and W are not.
    See `InitialFactors`.

    Returns:
        Rows of `weight`, `lora_a`, `lora_b`, `candidates_a`, `candidates_b`.
    """
    return _from_stored_candidates("switchlora", weight, shape, rows, generator_for)


def lora_candidates_init(
    weight: Tensor, shape: LayerShape, rows: Mapping[str, range], generator_for: GeneratorFor
) -> dict[str, Tensor]:
    """Draws A's candidates within `lora_bound`; B's are zero, and W is unchanged.

    Returns:
        See `balanced_candidates_init`.
    """
    return _from_stored_candidates("lora", weight, shape, rows, generator_for)


def drawn_candidates_init(
    init: Literal["switchlora", "lora"],
    weight: Tensor,
    shape: LayerShape,
    rows: Mapping[str, range],
    generator_for: GeneratorFor,
) -> dict[str, Tensor]:
    """Draws the initial factors alone, for candidates that are drawn when needed.

    Returns:
        Rows of `weight`, `lora_a`, `lora_b`.
    """
    out_features, in_features, rank, scale = shape
    bound_a, bound_b = candidate_bounds(init, out_features, in_features, rank)
    slots_a, slots_b = initial_slots(rank, num_candidates(out_features, in_features))
    lora_a = _draw(generator_for("candidates_a"), slots_a, bound_a, in_features).to(weight.dtype)
    lora_b = _draw(generator_for("candidates_b"), slots_b, bound_b, out_features).to(weight.dtype)
    return {
        "weight": without_update(weight, rows["weight"], lora_a, lora_b, scale),
        "lora_a": take(lora_a, rows["lora_a"]),
        "lora_b": take(lora_b, rows["lora_b"]),
    }


def candidates_key(generator: torch.Generator) -> int:
    """Returns the key of a factor's drawn candidates, from the generator for their name."""
    return generator.initial_seed()


def draw_vectors(keys: Tensor, bounds: Tensor, elements: range) -> Tensor:
    """Draws vectors uniformly from [-bound, bound), with the same bits on every device.

    A vector is a pure function of its key: nothing is stored, and any part can be drawn alone.

    Args:
        keys: [vectors] int64, one key per vector.
        bounds: [vectors] fp32.
        elements: which elements of each vector to draw.

    Returns:
        [vectors, elements] fp32.
    """
    indices = torch.arange(elements.start, elements.stop, device=keys.device)
    return _draw_elements(keys.unsqueeze(1), bounds.unsqueeze(1), indices)


def draw_vectors_of_widths(
    keys: Tensor, bounds: Tensor, widths: np.ndarray, device: torch.device
) -> Tensor:
    """Draws vectors of different widths, one after the other; see `draw_vectors`.

    The number of kernels depends neither on the number of vectors nor on their widths.

    Args:
        keys, bounds: [vectors] int64 and fp32, on the CPU.
        widths: [vectors] int64.

    Returns:
        [sum of widths] fp32, on `device`.
    """
    num_elements = int(widths.sum())
    starts = widths.cumsum(0) - widths
    # Advanced so that the index `start` draws a vector's element 0.
    keys = advance64(keys, torch.from_numpy(-starts))
    table = to_device(torch.stack([keys, torch.from_numpy(widths)]), device)
    of_element = torch.repeat_interleave(table[1], output_size=num_elements)
    indices = torch.arange(num_elements, device=device)
    return _draw_elements(table[0][of_element], to_device(bounds, device)[of_element], indices)


def _draw_elements(keys: Tensor, bounds: Tensor, indices: Tensor) -> Tensor:
    """Draws elements `indices` of vectors `keys`; all arguments broadcast."""
    # An arithmetic shift keeps the sign: integers in [-2^23, 2^23).
    values = splitmix64(keys, indices) >> (64 - _NUM_BITS)
    return values.to(torch.float32) * (bounds * 2.0 ** (1 - _NUM_BITS))


def _draw(generator: torch.Generator, slots: np.ndarray, bound: float, width: int) -> Tensor:
    """Draws the candidates in `slots` [k]; returns [k, width]."""
    keys = splitmix64(torch.tensor(candidates_key(generator)), torch.from_numpy(slots))
    return draw_vectors(keys, torch.full(keys.shape, bound, dtype=torch.float32), range(width))


def _from_stored_candidates(
    init: Literal["switchlora", "lora"],
    weight: Tensor,
    shape: LayerShape,
    rows: Mapping[str, range],
    generator_for: GeneratorFor,
) -> dict[str, Tensor]:
    out_features, in_features, rank, scale = shape
    count = num_candidates(out_features, in_features)
    bound_a, bound_b = candidate_bounds(init, out_features, in_features, rank)
    candidates_a = random_vectors("candidates_a", (count, in_features), bound_a, generator_for)
    candidates_b = random_counterparts(
        "candidates_b", (count, out_features), bound_b, generator_for
    )
    slots_a, slots_b = initial_slots(rank, count)
    lora_a, lora_b = _select(candidates_a, slots_a), _select(candidates_b, slots_b)
    return {
        "weight": without_update(weight, rows["weight"], lora_a, lora_b, scale),
        "lora_a": take(lora_a, rows["lora_a"]),
        "lora_b": take(lora_b, rows["lora_b"]),
        "candidates_a": candidates_a[rows["candidates_a"]],
        "candidates_b": candidates_b[rows["candidates_b"]],
    }


def _select(candidates: RandomRows, slots: np.ndarray) -> Tensor:
    """Returns the candidates in `slots` [k], unsharded, [k, width]."""
    first = int(slots.min())
    return candidates[range(first, int(slots.max()) + 1)][slots - first]
