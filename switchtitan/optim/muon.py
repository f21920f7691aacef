"""Muon on sharded matrices.

The momentum of a matrix's gradient is orthogonalized: for G = U S V^T, the update is about U V^T
(Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Updates are scaled
to the root mean square of AdamW's, so that both take the same learning rate and weight decay (Liu
et al. 2025, "Muon is Scalable for LLM Training", arXiv 2502.16982).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.shards import local, shard_group
from switchtitan.optim.adamw import AdamKeys, AdamW
from switchtitan.optim.adamw8bit import build_adamw8bit
from switchtitan.optim.base import GroupedOptimizer, SplitOptimizer
from switchtitan.optim.matrix_exchange import MatrixExchange
from switchtitan.optim.moments import Moments, Stored, decoded, encode_
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.weights import Weight, Weights, joined, write_

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""a, b and c of X <- a X + (b X X^T + c (X X^T)^2) X (Jordan et al. 2024)."""
_MIN_NORM = 1e-7
"""A matrix is divided by its norm, but by no less than this."""
_RMS_OF_ADAMW = 0.2
"""The root mean square of AdamW's updates without the learning rate (arXiv 2502.16982, eq. 4)."""
_MAX_ELEMENTS = 1 << 26
"""The most elements for each rank of matrices that are updated at a time, which bounds temporary
memory; at least one matrix."""


class MuonKeys(AdamKeys):
    """The configuration keys of Muon."""

    width_exponent: ClassVar[float] = 0.5
    orthogonalizes: ClassVar[bool] = True
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the running mean of gradients, in [0, 1)."""
    nesterov: bool = True
    """Nesterov momentum; has no effect with momentum = 0."""
    ns_steps: int = Field(default=5, ge=1)
    """Newton-Schulz iterations that orthogonalize an update, at least 1."""


class MuonConfig(MuonKeys):
    """`[optimizer] name = "muon"`: Muon (Jordan et al. 2024) for the matrices in the model's
    blocks, AdamW for all other parameters. Both use the same learning rate and decoupled weight
    decay, since Muon's updates are scaled to the root mean square of AdamW's (arXiv 2502.16982). A
    matrix has one moment, in fp32. An update needs the full matrix: ranks that share the model
    share the matrices, and orthogonalize them in the run's compute dtype; replicas repeat the
    work."""

    name: Literal["muon"] = "muon"
    """The optimizer."""


class Muon8bitConfig(MuonKeys):
    """`[optimizer] name = "muon8bit"`: `muon` with its momentum in 8 bits, and `adamw8bit` in place
    of AdamW. As with `adamw8bit`, momentum takes a byte for each element, and four for each block
    of at most 256 elements of a row."""

    trains_bf16: ClassVar[bool] = True
    has_8bit_moments: ClassVar[bool] = True
    name: Literal["muon8bit"] = "muon8bit"
    """The optimizer."""


class Muon(GroupedOptimizer):
    """Updates matrices by their orthogonalized momentum.

    The state is that of `Moments` and `Weights`, sharded like the parameters. Large models are
    updated in batches, of two collectives each: rows of momentum travel to the owner of their
    matrix, and rows of the update travel back; see `MatrixExchange`. Replicas compute the same
    updates, so that none of it crosses the slower links between them.

    Args:
        parameters: matrices [out, in]; a gradient that one rank lacks is missing on all.
        compile_step: compile all but the collectives.
    """

    def __init__(
        self, config: MuonKeys, parameters: Iterable[TrainedParameter], compile_step: bool
    ) -> None:
        trained = list(parameters)
        super().__init__(config, trained)
        self._is_compiled = compile_step
        self._dtype = trained[0].compute_dtype if trained else torch.float32
        self.momenta = Moments("momentum", True, self.parameters, config.has_8bit_moments)
        self.weights = Weights(self.parameters, config.trains_bf16)
        self.state = self.momenta.state | self.weights.state
        self._batches: dict[tuple[str, ...], list[tuple[list[str], MatrixExchange]]] = {}
        compile_it = compile_if(compile_step)
        self._advance: Callable[..., list[Tensor]] = compile_it(
            partial(advance_, momentum=config.momentum, nesterov=config.nesterov, dtype=self._dtype)
        )
        self._orthogonalize: Callable[..., Tensor] = compile_it(
            partial(orthogonalize, num_steps=config.ns_steps)
        )
        self._subtract: Callable[..., None] = compile_it(subtract_)

    @torch.no_grad()
    def step(self) -> None:
        weights = self.weights.next()
        for group, rate in zip(self.groups, self.rates, strict=True):
            grads = {
                name: local(parameter.grad)
                for name, parameter in group.parameters.items()
                if parameter.grad is not None
            }
            for names, exchange in self._batches_of(tuple(grads)):
                own = [weights[name] for name in names], [grads[name] for name in names]
                self._update(names, *own, exchange, rate, group.weight_decay)

    def _update(
        self,
        names: list[str],
        weights: list[Weight],
        grads: list[Tensor],
        exchange: MatrixExchange,
        rate: float,
        weight_decay: float,
    ) -> None:
        parts = self._advance([self.momenta.stored[name] for name in names], grads)
        batches = exchange.collect(parts)
        del parts  # frees memory before more is allocated
        batches = [self._orthogonalize(batches.pop(0)) for _ in range(len(batches))]
        # torch.compile would recompile for every new Python number.
        lr = torch.full((), rate, device=weights[0][0].device) if self._is_compiled else rate
        self._subtract(weights, exchange.distribute(batches), lr, weight_decay)

    def _batches_of(self, names: tuple[str, ...]) -> list[tuple[list[str], MatrixExchange]]:
        if names not in self._batches:
            batches = split_matrices({name: self.parameters[name] for name in names})
            self._batches[names] = [(batch, self._exchange(batch)) for batch in batches]
        return self._batches[names]

    def _exchange(self, names: list[str]) -> MatrixExchange:
        matrices = [self.parameters[name] for name in names]
        costs = [orthogonalization_cost(*matrix.shape) for matrix in matrices]
        return MatrixExchange(matrices, costs, self._dtype)


def split_matrices(matrices: Mapping[str, Tensor]) -> list[list[str]]:
    """Returns names in batches, one shape after the other, of which ranks have at most
    `_MAX_ELEMENTS` each and, of each shape, as many if there are enough."""
    batches: list[list[str]] = [[]]
    size, num_of_shape = 0, Counter[torch.Size]()
    for name in sorted(matrices, key=lambda name: tuple(matrices[name].shape)):
        shape, group = matrices[name].shape, shard_group(matrices[name])
        if num_of_shape[shape] % (1 if group is None else group.size()) == 0:
            size += shape.numel()
            if batches[-1] and size > _MAX_ELEMENTS:
                batches.append([])
                size, num_of_shape = shape.numel(), Counter()
        batches[-1].append(name)
        num_of_shape[shape] += 1
    return batches if matrices else []


def advance_(
    stored: list[Stored],
    grads: list[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Moves each momentum, in place, towards its gradient; returns what is to be orthogonalized.

    A running mean, where Jordan et al. have a sum: the two differ by a factor, which cancels.
    The result has `dtype`, unless it is the momentum itself.
    """
    pairs = list(zip(stored, grads, strict=True))
    whole = [(of[0], grad) for of, grad in pairs if len(of) == 1 and of[0].dtype == grad.dtype]
    if whole:
        torch._foreach_lerp_([mean for mean, _ in whole], [grad for _, grad in whole], 1 - momentum)
    # One at a time: only one of them takes memory in fp32.
    parts = []
    for moment, grad in pairs:
        mean = decoded(moment)
        is_done, grad = len(moment) == 1 and grad.dtype == mean.dtype, grad.to(mean.dtype)
        if not is_done:
            encode_(moment, mean.lerp_(grad, 1 - momentum))
        parts.append(torch.lerp(grad, mean, momentum).to(dtype) if nesterov else mean)
    return parts


def orthogonalize(matrices: Tensor, num_steps: int) -> Tensor:
    """Returns about U V^T for each matrix U S V^T, scaled to AdamW's root mean square.

    Newton-Schulz iterations (Jordan et al. 2024): singular values become 0.7 to 1.2 rather than 1.
    The scale is 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982, sec. 2.2). Matrices are [count,
    rows, columns]; products are computed in their dtype.
    """
    num_rows, num_columns = matrices.shape[1:]
    is_tall = num_rows > num_columns
    # X X^T is the smaller product for wide matrices.
    x = matrices.mT if is_tall else matrices
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / norms.clamp(min=_MIN_NORM)).to(x.dtype)
    for step in range(num_steps):
        # In the last product, so that the result is rounded once.
        scale = _RMS_OF_ADAMW * math.sqrt(max(num_rows, num_columns))
        a, b, c = (k * (scale if step == num_steps - 1 else 1.0) for k in _COEFFICIENTS)
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def orthogonalization_cost(num_rows: int, num_columns: int) -> float:
    """Returns the multiplications of one iteration for a matrix."""
    small, large = sorted((num_rows, num_columns))
    return float(2 * small * small * large + small**3)


def subtract_(
    weights: list[Weight], updates: list[Tensor], lr: Tensor | float, weight_decay: float
) -> None:
    """Moves weights against updates of any dtype, with decoupled weight decay."""
    parameters = [*map(joined, weights)]
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        # Compiled, so that the product takes no memory.
        steps = torch._foreach_mul([update.to(torch.float32) for update in updates], lr)
        torch._foreach_sub_(parameters, steps)
    else:
        torch._foreach_add_(parameters, updates, alpha=-lr)
    for weight, values in zip(weights, parameters, strict=True):
        write_(weight, values)


def build_muon(
    config: MuonKeys, parameters: Iterable[TrainedParameter], compile_step: bool
) -> TrainingOptimizer:
    matrices, others = list[TrainedParameter](), list[TrainedParameter]()
    for trained in parameters:
        is_matrix = trained.is_in_block and trained.parameter.ndim == 2
        (matrices if is_matrix else others).append(trained)
    adamw: TrainingOptimizer
    if config.has_8bit_moments:
        adamw = build_adamw8bit(config, others, compile_step)
    else:
        adamw = AdamW(config, others)
    return SplitOptimizer([Muon(config, matrices, compile_step), adamw]) if matrices else adamw
