"""AdamW with one step count for each vector of the factors."""

from collections.abc import Callable
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.adjacent import as_one_matrix, with_local
from switchtitan.distributed.compilation import compile_if
from switchtitan.distributed.shards import ShardedRows, copy_all_, local_shards, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.schedule import FACTORS, VectorSpan
from switchtitan.methods.switchlora.switch import fill_vectors_, places_in_table, scale_rows_
from switchtitan.optim import AdamWConfig

_ELEMENTS_PER_CALL = 2**25
"""The most elements that one call updates, if they belong to several factors: gradients are copied
next to each other, which takes 128 MiB for so many. A model's factors of one width are usually
fewer."""
_ELEMENTS_IN_CACHE = 2**16
"""Elements that a CPU updates at a time if nothing is compiled: all operations find them in its
cache, and temporary tensors reuse memory. For 10 million elements at a time, an update takes six
times as long."""


class Coefficients(NamedTuple):
    """The coefficients of each vector's update, [vectors, 1] each."""

    mask: Tensor
    """1 if the vector is updated, else 0."""
    step_size: Tensor
    """lr sqrt(1 - beta2^n) / (1 - beta1^n) after n steps, 0 if frozen. Both bias corrections are in
    it, which saves a division per element."""
    eps: Tensor
    """eps sqrt(1 - beta2^n)."""
    decay: Tensor
    """1 - lr * weight_decay, 1 if frozen."""


class _Group(NamedTuple):
    """Factors of one width, updated in one call.

    Their local vectors follow each other, in the order of `factors`.
    """

    factors: list[int]
    vectors: slice
    """Among the local vectors of all groups."""
    exp_avg: Tensor
    """[vectors, width], like `exp_avg_sq`."""
    exp_avg_sq: Tensor


class VectorAdamW:
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count.

    (SwitchLoRA, arXiv 2406.06564, sec. 3.) Equals torch's AdamW as long as no vector is reset or
    frozen. Factors are indexed as the flattened first two dimensions of tables [2, layers, rank]: A
    of all layers, then B of all layers.

    Factors of one width are updated as one matrix. It takes few kernels if their local shards
    follow each other in memory, in the order of `layers`, A before B; otherwise they are copied.

    Args:
        layers: by qualified name, all of one rank.
        compile_step: fuse the update of a matrix into one kernel.

    Attributes:
        num_steps: [2, layers, rank] fp32, the updates of each vector, including those while it was
            frozen; the same on every rank.
    """

    def __init__(
        self, config: AdamWConfig, layers: dict[str, LowRankLinear], compile_step: bool
    ) -> None:
        self._config = config
        keys = ("lora_a", "lora_b")
        self._names = [f"{name}.{key}" for key in keys for name in layers]
        self._factors = [layer.get_parameter(key) for key in keys for layer in layers.values()]
        first = self._factors[0]
        self.num_steps = torch.zeros(len(FACTORS), len(layers), first.shape[0], device=first.device)
        # A tensor: torch.compile would recompile for every new Python number.
        self._lr = torch.tensor(config.lr, dtype=first.dtype, device=first.device)
        self._groups = self._groups_of_one_width()
        self._exp_avg = self._moments([group.exp_avg for group in self._groups])
        self._exp_avg_sq = self._moments([group.exp_avg_sq for group in self._groups])
        self._places = self._places_of_vectors()
        self._matrices: list[Tensor | None] = []
        self._shards_in_matrices: list[Tensor] = []
        compile_it = compile_if(compile_step)
        self._coefficients: Callable[..., Coefficients] = compile_it(vector_coefficients)
        self._update: Callable[..., None] = compile_it(update_vectors_)
        # Fake tensors stand for those of a GPU.
        if not compile_step and first.device.type == "cpu" and not is_fake(first):
            self._update = update_in_blocks_

    def set_lr(self, lr_factor: float) -> None:
        self._lr.fill_(self._config.lr * lr_factor)

    @torch.no_grad()
    def reset(self, spans: list[VectorSpan]) -> None:
        """Zeroes these vectors' moments and step counts."""
        fill_vectors_(self.num_steps, spans, 0)
        _zero_all_(self._views(self._exp_avg, spans) + self._views(self._exp_avg_sq, spans))

    @torch.no_grad()
    def reset_first_moments(self, spans: list[VectorSpan]) -> None:
        """Zeroes only these vectors' first moments."""
        _zero_all_(self._views(self._exp_avg, spans))

    @torch.no_grad()
    def rescale_second_moments(self, spans: list[VectorSpan], ratios: Tensor) -> None:
        """Multiplies these vectors' second moments by `ratios`; keeps their step counts.

        A vector whose ratio is zero or not finite gets a second moment and a step count of zero.

        Args:
            ratios: [vectors], in the order of `spans`; the same on every rank.
        """
        if not spans:
            return
        is_usable = (ratios > 0) & ratios.isfinite()
        places = places_in_table(self.num_steps, spans)
        steps = self.num_steps.view(-1)
        steps.index_copy_(0, places, steps[places] * is_usable)
        moments = [self._exp_avg_sq[self._index_of(span)] for span in spans]
        scale_rows_(moments, [span.vectors for span in spans], ratios.where(is_usable, 0))

    @torch.no_grad()
    def step(self, update_mask: Tensor) -> None:
        """Updates every vector.

        Args:
            update_mask: [2, layers, rank] bool; a vector for which it is false gets a gradient of
                zero and does not change, not even by weight decay. Its step count still increases.
        """
        config, (beta1, beta2) = self._config, self._config.betas
        self.num_steps += 1
        if not self._groups:
            return
        coefficients = self._coefficients(
            self.num_steps,
            update_mask,
            self._places,
            self._lr,
            beta1=beta1,
            beta2=beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        shards = local_shards(self._factors)
        grads = local_shards(self._gradients())
        self._find_matrices(shards)
        for group, matrix in zip(self._groups, self._matrices, strict=True):
            vectors = matrix if matrix is not None else _stacked(shards, group.factors)
            self._update(
                vectors,
                _stacked(grads, group.factors),
                group.exp_avg,
                group.exp_avg_sq,
                *(coefficient[group.vectors] for coefficient in coefficients),
                beta1=beta1,
                beta2=beta2,
            )
            if matrix is None and len(group.factors) > 1:
                targets = [shards[factor] for factor in group.factors]
                copy_all_(list(zip(targets, _split_like(vectors, targets), strict=True)))

    def _groups_of_one_width(self) -> list[_Group]:
        """Returns groups of all factors with local rows; those of one width are of one size, so
        that they share a graph."""
        factors_of: dict[int, list[int]] = {}
        num_layers = self.num_steps.shape[1]
        num_rows = len(row_range(self._factors[0]))
        for layer in range(num_layers if num_rows else 0):
            for factor in (layer, num_layers + layer):
                factors_of.setdefault(self._factors[factor].shape[1], []).append(factor)
        groups = []
        start = 0
        for width, factors in factors_of.items():
            limit = max(1, _ELEMENTS_PER_CALL // (num_rows * width))
            size = _largest_divisor(len(factors), limit)
            num_vectors = size * num_rows
            for first in range(0, len(factors), size):
                exp_avg, exp_avg_sq = (
                    torch.zeros(num_vectors, width, dtype=self._lr.dtype, device=self._lr.device)
                    for _ in range(2)
                )
                vectors = slice(start, start + num_vectors)
                groups.append(_Group(factors[first : first + size], vectors, exp_avg, exp_avg_sq))
                start += num_vectors
        return groups

    def _moments(self, of_groups: list[Tensor]) -> list[ShardedRows]:
        """Returns each factor's rows of the groups' moments."""
        moments = [torch.empty_like(shard) for shard in local_shards(self._factors)]
        for group, matrix in zip(self._groups, of_groups, strict=True):
            for factor, part in zip(
                group.factors, matrix.split(len(matrix) // len(group.factors)), strict=True
            ):
                moments[factor] = part
        return [
            ShardedRows(with_local(factor.detach(), part))
            for factor, part in zip(self._factors, moments, strict=True)
        ]

    def _places_of_vectors(self) -> Tensor:
        """Returns the index of each local vector in a flattened table [2, layers, rank]."""
        rank = self.num_steps.shape[2]
        held = row_range(self._factors[0])
        factors = [factor for group in self._groups for factor in group.factors]
        places = [factor * rank + vector for factor in factors for vector in held]
        return torch.tensor(places, dtype=torch.int64, device=self._lr.device)

    def _find_matrices(self, shards: list[Tensor]) -> None:
        """Finds the matrix of each group, if its shards follow each other in memory.

        Again whenever a shard has been replaced, as FSDP may do before the first forward pass.
        """
        if len(self._shards_in_matrices) == len(shards) and all(
            map(is_, shards, self._shards_in_matrices)
        ):
            return
        self._matrices = [
            as_one_matrix([shards[factor] for factor in group.factors]) for group in self._groups
        ]
        self._shards_in_matrices = shards

    def _gradients(self) -> list[Tensor]:
        grads = []
        for name, factor in zip(self._names, self._factors, strict=True):
            assert factor.grad is not None, f"no gradient for {name}"
            grads.append(factor.grad)
        return grads

    def _views(self, moments: list[ShardedRows], spans: list[VectorSpan]) -> list[Tensor]:
        """Returns this rank's rows of these vectors."""
        return [
            view for span in spans for view in moments[self._index_of(span)].views((span.vectors,))
        ]

    def _index_of(self, span: VectorSpan) -> int:
        return span.factor * self.num_steps.shape[1] + span.layer

    def zero_grad(self) -> None:
        for parameter in self._factors:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.exp_avg` and so on, sharded like the factors."""
        return {
            f"{name}.{key}": rows.matrix
            for key, moments in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, rows in zip(self._names, moments, strict=True)
        }


def vector_coefficients(
    num_steps: Tensor,
    update_mask: Tensor,
    places: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Coefficients:
    """Returns the coefficients of the vectors at `places` of flattened tables.

    Args:
        num_steps, update_mask: [2, layers, rank]; see `VectorAdamW`.
        places: [vectors] int64.
        lr: 0-dim.
    """
    num_steps = num_steps.flatten()[places].to(lr.dtype)[:, None]
    mask = update_mask.flatten()[places].to(lr.dtype)[:, None]
    root_correction = (1 - beta2**num_steps).sqrt()
    step_size = lr * root_correction / (1 - beta1**num_steps)
    decay = 1 - lr * weight_decay * mask
    return Coefficients(mask, step_size * mask, eps * root_correction, decay)


def update_vectors_(
    vectors: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor,
    step_size: Tensor,
    eps: Tensor,
    decay: Tensor,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Updates vectors by AdamW (arXiv 1711.05101, Algorithm 2).

    Args:
        vectors, exp_avg, exp_avg_sq: [vectors, width]; changed in place.
        mask, step_size, eps, decay: see `Coefficients`.
    """
    grad = grad * mask
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    vectors.mul_(decay).addcdiv_(exp_avg * step_size, exp_avg_sq.sqrt().add_(eps), value=-1)


def update_in_blocks_(vectors: Tensor, *tensors: Tensor, beta1: float, beta2: float) -> None:
    """Does `update_vectors_` for a few vectors at a time."""
    num_vectors = max(1, _ELEMENTS_IN_CACHE // vectors.shape[1])
    for block in zip(*(part.split(num_vectors) for part in (vectors, *tensors)), strict=True):
        update_vectors_(*block, beta1=beta1, beta2=beta2)


def _stacked(shards: list[Tensor], factors: list[int]) -> Tensor:
    """Returns the shards of these factors as one matrix: a copy if they are several."""
    first = shards[factors[0]]
    if len(factors) == 1:
        return first
    parts = [shards[factor] for factor in factors]
    matrix = first.new_empty(len(first) * len(parts), first.shape[1])
    copy_all_(list(zip(_split_like(matrix, parts), parts, strict=True)))
    return matrix


def _split_like(matrix: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    return matrix.split(len(parts[0]))


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)


def _zero_all_(tensors: list[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(tensors)
