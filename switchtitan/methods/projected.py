"""GaLore, Fira and APOLLO: full weights train from low-rank projections of their gradients.

The smaller dimension of G [out, in] is projected (GaLore, arXiv 2403.03507, sec. 4.2; square ones
on the right, as in the authors' code):

    right, out >= in    R = G Q       [out, rank] with Q [in, rank]
    left,  out < in     R = Q^T G     [rank, in]  with Q [out, rank]

G is sharded over rows. On the right, every rank has the full Q, and R's rows are local: a step
needs no collective for it. On the left, each rank has its rows of Q and a summand of R.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as distributed_zeros

from switchtitan.contracts import (
    LanguageModel,
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.norms import sum_packed
from switchtitan.distributed.random import generator_for
from switchtitan.distributed.shards import (
    copy_from_full_,
    full_tensor,
    local,
    replica_group,
    rows_per_rank,
    shard_group,
)
from switchtitan.errors import ConfigError
from switchtitan.methods.lowrank.config import ADAPTED_LINEARS, Targets, check_rank, check_targets
from switchtitan.optim import AdamW, AdamWConfig, require_adamw, trained_parameters
from switchtitan.regions import region

TINY_NORM = 1e-8
"""Added to norms in denominators, as in the code of Fira's and APOLLO's authors."""


class ProjectedConfig(MethodConfig):
    """The configuration keys of methods that project gradients."""

    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    rank: int = Field(ge=1)
    """Dimensions that gradients are projected onto: at least 1, and below the smaller dimension of
    every projected weight."""
    update_interval: int = Field(default=200, ge=1)
    """Steps between two projections; at least 1."""
    targets: Targets = ADAPTED_LINEARS
    """Local names of the linear layers whose gradients are projected; by default all of attention
    and MLP. All other parameters train with AdamW."""
    scale: float = Field(default=0.25, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0."""

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return False

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """See `contracts.MethodConfig`."""
        return check_rank(self.rank, self.targets, linear_shapes)


class GaloreConfig(ProjectedConfig):
    """`[method] name = "galore"`: GaLore (arXiv 2403.03507). On a GPU, the host waits for torch's
    decompositions when bases are renewed, every `update_interval` steps. They run in fp64,
    slow on GPUs that compute it at 1/64 of the rate of fp32; a larger interval means fewer."""

    name: Literal["galore"] = "galore"
    """The method."""


class FiraConfig(ProjectedConfig):
    """`[method] name = "fira"`: Fira (arXiv 2410.01623). Bases are those of GaLore, with the same
    waits on a GPU."""

    name: Literal["fira"] = "fira"
    """The method."""
    scale: float = Field(default=0.25, gt=0)
    """Multiplies the update that is projected back (alpha in the paper); above 0. The residual is
    G - scale R Q^T, with the gradient G, the basis Q and R = G Q; with scale = 1 it is orthogonal
    to the basis."""
    max_norm_growth: float = Field(default=1.01, gt=1)
    """Largest factor, above 1, by which the norm of a weight's scaled residual may grow in a step
    (gamma in the paper)."""


class ApolloConfig(ProjectedConfig):
    """`[method] name = "apollo"`: APOLLO (arXiv 2412.05270). APOLLO-Mini is rank 1, scaling
    "tensor" and scale sqrt(128)."""

    name: Literal["apollo"] = "apollo"
    """The method."""
    scaling: Literal["channel", "tensor"] = "channel"
    """One scaling factor for each row or column of a weight, along its larger dimension
    (`channel`), or for each weight (`tensor`)."""
    scale: float = Field(default=1.0, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0. The
    authors' code takes its square."""
    max_norm_growth: float = Field(default=1.01, gt=1)
    """Largest factor, above 1, by which the norm of a weight's update may grow in a step (gamma in
    the paper)."""


def is_right(weight: Tensor) -> bool:
    """Whether the gradient of a weight [out, in] is multiplied by its basis from the right."""
    return weight.shape[0] >= weight.shape[1]


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight, the basis of its projection, and Adam's moments of the projected gradient."""

    name: str
    """The parameter's qualified name."""
    parameter: nn.Parameter
    """[out, in], plain or sharded along dimension 0."""
    basis: Tensor
    """Q: [in, rank] on the right, unsharded; [out, rank] on the left, sharded like the weight.
    Initially zero."""
    exp_avg: Tensor
    """[out, rank] on the right, [rank, in] on the left; both sharded along dimension 0."""
    exp_avg_sq: Tensor
    """Like `exp_avg`."""

    @property
    def is_right(self) -> bool:
        return is_right(self.parameter)

    @property
    def grad(self) -> Tensor:
        """The local shard of the gradient, [out/ranks, in]."""
        assert self.parameter.grad is not None, f"no gradient for {self.name}"
        return local(self.parameter.grad)

    def project(self) -> Tensor:
        """Returns R: its local rows [out/ranks, rank] on the right, a summand [rank, in] on the
        left."""
        basis = local(self.basis)
        return self.grad @ basis if self.is_right else basis.t() @ self.grad

    def add_back_(self, target: Tensor, low: Tensor, alpha: float, beta: float = 1.0) -> None:
        """Sets local rows of a matrix [out, in] to beta * target + alpha * (low Q^T, or Q low).

        Args:
            low: [out/ranks, rank] on the right, all rows [rank, in] on the left.
        """
        basis = local(self.basis)
        left, right = (low, basis.t()) if self.is_right else (basis, low)
        target.addmm_(left, right, alpha=alpha, beta=beta)


def build_projected_weight(name: str, parameter: nn.Parameter, rank: int) -> ProjectedWeight:
    """Returns the state of a weight, with basis and moments at zero."""
    out_features, in_features = parameter.shape
    if is_right(parameter):
        basis = torch.zeros(in_features, rank, device=parameter.device, dtype=parameter.dtype)
        moments = out_features, rank
    else:
        basis = _zeros_split_like(parameter, (out_features, rank))
        moments = rank, in_features
    exp_avg, exp_avg_sq = (_zeros_split_like(parameter, moments) for _ in range(2))
    return ProjectedWeight(name, parameter, basis, exp_avg, exp_avg_sq)


def _zeros_split_like(parameter: Tensor, shape: tuple[int, int]) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    return distributed_zeros(
        shape,
        dtype=parameter.dtype,
        device_mesh=parameter.device_mesh,
        placements=parameter.placements,
    )


class PackedRows:
    """Reduce-scatters and all-gathers the rows of several matrices, in one collective each.

    Together they send as much as one all-reduce, while moments and other state of the rows are
    sharded. On one rank nothing is sent or copied.

    Args:
        matrices: [rows, width] each, the layout of the rows: all plain, or all sharded along
            dimension 0 over the same ranks.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        self._group = shard_group(matrices[0]) if matrices else None
        self._num_ranks = 1 if self._group is None else self._group.size()
        self._shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        self._held = [local(matrix).shape[0] for matrix in matrices]
        # The last ranks are padded.
        self._rows_per_rank = [rows_per_rank(rows, self._num_ranks) for rows, _ in self._shapes]
        self._sizes = [
            rows * width for rows, (_, width) in zip(self._rows_per_rank, self._shapes, strict=True)
        ]

    def sum_and_scatter(self, partials: list[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each matrix, summed over ranks.

        Args:
            partials: [rows, width] each, this rank's summand.
        """
        if self._group is None:
            return partials
        with region("reduce"):
            packed = partials[0].new_empty(self._num_ranks, sum(self._sizes))
            for partial, block in zip(partials, self._blocks(packed), strict=True):
                padding = block.shape[0] * block.shape[1] - partial.shape[0]
                block.copy_(F.pad(partial, (0, 0, 0, padding)).view(block.shape))
            own = torch.empty_like(packed[0])
            # NCCL's collectives on lists copy them.
            dist.reduce_scatter_single(own, packed.view(-1), group=self._group)
            blocks = self._blocks(own.unsqueeze(0))
            return [block[0, :held] for block, held in zip(blocks, self._held, strict=True)]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns each full matrix, on every rank.

        Args:
            parts: this rank's rows of each.
        """
        if self._group is None:
            return parts
        own = parts[0].new_zeros(sum(self._sizes))
        for part, block in zip(parts, self._blocks(own.unsqueeze(0)), strict=True):
            block[0, : part.shape[0]] = part
        packed = own.new_empty(self._num_ranks, own.numel())
        dist.all_gather_single(packed.view(-1), own, group=self._group)
        return [
            block.flatten(0, 1)[:num_rows]
            for block, (num_rows, _) in zip(self._blocks(packed), self._shapes, strict=True)
        ]

    def _blocks(self, packed: Tensor) -> list[Tensor]:
        """Returns a view [ranks, rows/ranks, width] of each matrix in `packed` [ranks, sizes]."""
        parts = packed.split(self._sizes, dim=1)
        return [
            part.unflatten(1, (rows, width))
            for part, rows, (_, width) in zip(parts, self._rows_per_rank, self._shapes, strict=True)
        ]


ConfigT = TypeVar("ConfigT", bound=ProjectedConfig)
"""The section of a method with projected gradients."""
LimitedT = TypeVar("LimitedT", FiraConfig, ApolloConfig)
"""The section of a method whose updates grow slowly."""


class ProjectedOptimizer(TrainingOptimizer, Generic[ConfigT]):
    """Updates the targeted weights; `dense` updates all others.

    Adam's direction is N = M / (sqrt(V) + eps), with the moments M, V of R. As in the code of
    GaLore's and Fira's authors, eps is added to the root of the second moment before the bias
    correction, which is part of the step size; moments are kept when bases change; the first basis
    is that of the first gradient. Weight decay is that of AdamW (arXiv 1711.05101), before the
    update.

    Args:
        weights: those whose gradients are projected.
        seed: the job's seed.
        compile_step: fuse the elementwise operations.
    """

    saves_bases: ClassVar[bool] = True

    def __init__(
        self,
        config: ConfigT,
        adam: AdamWConfig,
        weights: list[ProjectedWeight],
        dense: TrainingOptimizer,
        seed: int,
        compile_step: bool,
    ) -> None:
        self._config, self._adam, self._weights, self._dense = config, adam, weights, dense
        self._seed, self._compile = seed, compile_if(compile_step)
        self._left = [weight for weight in weights if not weight.is_right]
        self._rows = PackedRows([weight.exp_avg for weight in self._left])
        self._group = shard_group(weights[0].parameter)
        self._num_steps = 0
        # A Python number, passed to kernels as an argument: no synchronization.
        self._lr = adam.lr
        self._direction: Callable[..., Tensor] = self._compile(direction_)

    def renew_bases(self) -> None:
        """Sets the bases for the next `update_interval` steps, from the gradients."""
        renew_from_gradients(self._weights)

    @abstractmethod
    def update(self, step_size: float, decay: float) -> None:
        """Multiplies all weights by `decay`, then updates them from their gradients.

        Args:
            step_size: lr sqrt(1 - beta2^n) / (1 - beta1^n) at the n-th step: Adam's bias correction
                as at the end of sec. 2 of arXiv 1412.6980, with eps added to the uncorrected root.
        """

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter."""
        if self._num_steps % self._config.update_interval == 0:
            self.renew_bases()
        self._num_steps += 1
        (beta1, beta2), n = self._adam.betas, self._num_steps
        self.update(
            self._lr * (1 - beta2**n) ** 0.5 / (1 - beta1**n),
            decay=1 - self._lr * self._adam.weight_decay,
        )
        self._dense.step()

    def sums_on_left(self) -> list[Tensor]:
        """Returns this rank's rows of R, summed over ranks, for each weight projected on the left;
        collective."""
        return self._rows.sum_and_scatter([weight.project() for weight in self._left])

    def direction(self, weight: ProjectedWeight, low: Tensor) -> Tensor:
        """Updates the moments from this rank's rows of R; returns those of N."""
        if low.numel() == 0:
            return low
        moments = local(weight.exp_avg), local(weight.exp_avg_sq)
        return self._direction(low, *moments, betas=self._adam.betas, eps=self._adam.eps)

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.parameter.grad = None
        self._dense.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._lr = self._adam.lr * lr_factor
        self._dense.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of both parts and the number of bases computed so far."""
        num_refreshes = -(-self._num_steps // self._config.update_interval)
        return {**self._dense.metrics(), "projection/refreshes": float(num_refreshes)}

    def replicated(self) -> dict[str, Tensor]:
        """Returns the bases, also those that are drawn again after a resume."""
        return self._dense.replicated() | self._of_weights("basis")

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of both parts, `<weight>.exp_avg` and so on, and `projection.step`."""
        state = self._dense.state_dict() | self._of_weights("exp_avg", "exp_avg_sq")
        if self.saves_bases:
            state |= self._of_weights("basis")
        return state | {"projection.step": torch.tensor(self._num_steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])
        self._num_steps = int(state["projection.step"])

    def _of_weights(self, *keys: str) -> dict[str, Tensor]:
        return {f"{each.name}.{key}": getattr(each, key) for each in self._weights for key in keys}


def direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """Updates the moments M and V in place; returns M / (sqrt(V) + eps)."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    return exp_avg / (exp_avg_sq.sqrt() + eps)


def renew_from_gradients(weights: list[ProjectedWeight]) -> None:
    """Sets bases to the leading singular vectors of the gradients.

    Ranks share the weights: each decomposes one gradient at a time. They send each other the bases,
    also replicas, since two devices may decompose the same gradient differently, by rounding.
    """
    first = weights[0].parameter
    shards, replicas = shard_group(first), replica_group(first)
    num_ranks = 1 if shards is None else shards.size()
    replica, num_replicas = (0, 1) if replicas is None else (replicas.rank(), replicas.size())
    for start in range(0, len(weights), num_ranks * num_replicas):
        shared = weights[start : start + num_ranks * num_replicas]
        _renew_of_replica(shared[replica * num_ranks : (replica + 1) * num_ranks], shards)
        for index, weight in enumerate(shared):
            if replicas is not None and local(weight.basis).numel():
                source = index // num_ranks
                dist.broadcast(local(weight.basis), group=replicas, group_src=source)


def _renew_of_replica(weights: list[ProjectedWeight], group: dist.ProcessGroup | None) -> None:
    """Sets the bases of at most one weight for each rank of `group`."""
    rank = 0 if group is None else group.rank()
    bases = []
    for owner, weight in enumerate(weights):
        assert weight.parameter.grad is not None
        grad = full_tensor(weight.parameter.grad)
        bases.append(grad if owner == rank else grad.new_empty(weight.basis.shape))
    if rank < len(weights):
        num_vectors = weights[rank].basis.shape[1]
        bases[rank] = leading_singular_vectors(bases[rank], num_vectors).contiguous()
    for owner, (weight, basis) in enumerate(zip(weights, bases, strict=True)):
        if group is not None:
            dist.broadcast(basis, group=group, group_src=owner)
        copy_from_full_(weight.basis, basis)


def leading_singular_vectors(grad: Tensor, rank: int) -> Tensor:
    """Returns the leading singular vectors of a gradient [out, in].

    They are the leading eigenvectors of the smaller Gram matrix, G^T G or G G^T, in fp64: squaring
    loses half the digits, and half of those of fp64 are more than an fp32 gradient has. That is
    more exact than an SVD in fp32, and on a CPU takes as long (1024 x 2736 on one thread: 1.3 s).

    The largest entry of each vector is positive. Moments are kept when the basis changes, so the
    sign of a vector must not depend on rounding or on the number of ranks.

    Returns:
        Right ones [in, rank] if out >= in, else left ones [out, rank].
    """
    # The trainer reports a gradient that is not finite. An error here would leave other ranks
    # waiting.
    matrix = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)
    gram = matrix.t() @ matrix if is_right(grad) else matrix @ matrix.t()
    # In ascending order.
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(grad.dtype)


class GaloreOptimizer(ProjectedOptimizer[GaloreConfig]):
    """W <- decay W - step_size scale (N Q^T) (arXiv 2403.03507, Alg. 2).

    Weights projected on the left take two collectives a step together: a reduce-scatter of R, and
    an all-gather of N. Weights projected on the right take none.
    """

    def update(self, step_size: float, decay: float) -> None:
        alpha = -step_size * self._config.scale
        sums = self.sums_on_left()
        parts = [self.direction(*pair) for pair in zip(self._left, sums, strict=True)]
        on_left = iter(self._rows.gather(parts))
        for weight in self._weights:
            is_right = weight.is_right
            low = self.direction(weight, weight.project()) if is_right else next(on_left)
            weight.add_back_(local(weight.parameter), low, alpha, decay)


class LimitedOptimizer(ProjectedOptimizer[LimitedT]):
    """Keeps the norm of each weight's update below `max_norm_growth` times its limited value in the
    step before (Fira, arXiv 2410.01623, which APOLLO uses as well). The first step is not
    limited."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        like = local(self._weights[0].parameter).detach()
        self._norms = like.new_full((len(self._weights),), torch.inf)
        self._num_limited = torch.zeros((), device=like.device)

    def divisors(self, norms: Tensor) -> Tensor:
        """Returns the divisor of each update, [weights], and stores the limited norms.

        Args:
            norms: [weights], of the updates, before they are limited.
        """
        most = self._config.max_norm_growth
        divisors = (norms / (self._norms + TINY_NORM)).clamp(min=most) / most
        self._norms.copy_(norms / divisors)
        self._num_limited = (divisors > 1).sum()
        return divisors

    def metrics(self) -> dict[str, float]:
        """Adds the fraction of weights whose update was limited in the last step."""
        share = float(self._num_limited) / len(self._norms)
        return super().metrics() | {"projection/limited_share": share}

    def state_dict(self) -> dict[str, Tensor]:
        """Adds `projection.update_norms`, [weights]: the last updates' norms, initially inf."""
        return super().state_dict() | {"projection.update_norms": self._norms}


class FiraOptimizer(LimitedOptimizer[FiraConfig]):
    """W <- decay W - step_size (scale N Q^T + S / limiter), S = phi (G - scale R Q^T).

    (arXiv 2410.01623.) phi = ||N|| / ||R|| of each row of R where the projection is on the right,
    of each column where it is on the left. The paper subtracts R Q^T. The authors' package
    subtracts scale R Q^T, and the published runs have scale 0.25, so we follow the package. The
    package decays weights after the update.

    On several ranks, a step has three collectives: a reduce-scatter of R and an all-gather of R and
    N, for weights projected on the left, and a sum of squares for all weights.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pairs = PackedRows([weight.exp_avg for weight in self._left] * 2)
        self._measure: Callable[..., tuple[Tensor, Tensor]] = self._compile(factors_and_square)

    def update(self, step_size: float, decay: float) -> None:
        projections = list(self._projections())
        measured = [
            self._factors_and_square(weight, *projected)
            for weight, projected in zip(self._weights, projections, strict=True)
        ]
        squares = sum_packed([square for _, square in measured], self._group)
        divisors = self.divisors(torch.stack(squares).sqrt()).unbind()
        for weight, (low, direction), (phi, _), divisor in zip(
            self._weights, projections, measured, divisors, strict=True
        ):
            # scaling (G - scale R Q^T) + scale N Q^T is scaling G + scale (N - scaling R) Q^T.
            parameter, scaling = local(weight.parameter), phi / divisor
            if decay != 1:
                parameter.mul_(decay)
            parameter.addcmul_(weight.grad, scaling, value=-step_size)
            rest = torch.addcmul(direction, low, scaling, value=-1)
            weight.add_back_(parameter, rest, -step_size * self._config.scale)

    def _projections(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Updates the moments; yields R and N of each weight: local rows [out/ranks, rank] on the
        right, all of [rank, in] on the left."""
        sums = self.sums_on_left()
        parts = [self.direction(*pair) for pair in zip(self._left, sums, strict=True)]
        gathered = self._pairs.gather([*sums, *parts])
        on_left = zip(gathered[: len(sums)], gathered[len(sums) :], strict=True)
        for weight in self._weights:
            if weight.is_right:
                low = weight.project()
                yield low, self.direction(weight, low)
            else:
                yield next(on_left)

    def _factors_and_square(
        self, weight: ProjectedWeight, low: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns phi, [out/ranks, 1] or [1, in], and this rank's summand of ||S||^2, 0-dim."""
        left, right = (low, weight.basis.t()) if weight.is_right else (local(weight.basis), low)
        residual = torch.addmm(weight.grad, left, right, alpha=-self._config.scale)
        # Empty shards are not worth compiling.
        measure = self._measure if residual.numel() else factors_and_square
        return measure(residual, low, direction, dim=1 if weight.is_right else 0)


def factors_and_square(
    residual: Tensor, low: Tensor, direction: Tensor, *, dim: int
) -> tuple[Tensor, Tensor]:
    """Returns phi = ||N|| / ||R|| along `dim`, which is kept, and the sum of squares of phi times
    `residual`.

    Args:
        residual: G - scale R Q^T, [out/ranks, in].
    """
    norms = torch.linalg.vector_norm(low, dim=dim, keepdim=True) + TINY_NORM
    factors = torch.linalg.vector_norm(direction, dim=dim, keepdim=True) / norms
    return factors, (residual * factors).square().sum()


class ApolloOptimizer(LimitedOptimizer[ApolloConfig]):
    """W <- decay W - step_size scale (s G) / limiter (arXiv 2412.05270, Alg. 1).

    s = ||N|| / ||R|| over each channel or the tensor, with a random Q. The step size with its bias
    correction is not part of s.

    On several ranks, a step has up to two collectives for all weights: a reduce-scatter of R for
    weights with out < in, and a sum of squares. Bases follow from (seed, name, number of the
    basis), so no checkpoint has them. They are kept in memory, since drawing them takes longer than
    a step.
    """

    saves_bases = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._measure: Callable[..., Tensor] = self._compile(sums_of_squares)

    def renew_bases(self) -> None:
        """Draws each basis, normal with variance 1 / rank."""
        number = self._num_steps // self._config.update_interval
        for weight in self._weights:
            generator = generator_for(self._seed, f"{weight.name}.basis.{number}")
            values = torch.randn(weight.basis.shape, generator=generator)
            values /= weight.basis.shape[1] ** 0.5
            copy_from_full_(weight.basis, to_device(values, weight.basis.device))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.renew_bases()

    def update(self, step_size: float, decay: float) -> None:
        factors, squares = zip(*self._factors_and_squares(), strict=True)
        divisors = self.divisors(torch.stack(squares).sqrt())
        for weight, factor, divisor in zip(self._weights, factors, divisors.unbind(), strict=True):
            scaling = factor.unsqueeze(1 if weight.is_right else 0)
            coefficients = scaling * (step_size * self._config.scale) / divisor
            parameter = local(weight.parameter)
            if decay != 1:
                parameter.mul_(decay)
            parameter.addcmul_(weight.grad, coefficients, value=-1)

    def _factors_and_squares(self) -> list[tuple[Tensor, Tensor]]:
        """Returns per weight the local s, [channels] or [1], and the global ||s G||^2, 0-dim."""
        sums = iter(self.sums_on_left())
        squares = [
            self._squares(weight, weight.project() if weight.is_right else next(sums))
            for weight in self._weights
        ]
        # A channel projected on the right is on one rank: only squares are summed over ranks.
        by_channel = self._config.scaling == "channel"
        own = {
            index: _factors(squares[index])
            for index, weight in enumerate(self._weights)
            if weight.is_right and by_channel
        }
        summed = sum_packed(
            [own[index][1] if index in own else each for index, each in enumerate(squares)],
            self._group,
        )
        return [
            (own[index][0], total) if index in own else _factors(total)
            for index, total in enumerate(summed)
        ]

    def _squares(self, weight: ProjectedWeight, low: Tensor) -> Tensor:
        """Updates the moments; returns sums of squares of N, R and G, [3, channels] or [3, 1]."""
        dims = (0, 1) if self._config.scaling == "tensor" else (1,) if weight.is_right else (0,)
        matrices = self.direction(weight, low), low, weight.grad
        # Empty shards are not worth compiling.
        is_empty = any(matrix.numel() == 0 for matrix in matrices)
        return (sums_of_squares if is_empty else self._measure)(*matrices, dims=dims)


def sums_of_squares(*matrices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns [matrices, what is left of the shape], over `dims`."""
    return torch.stack([matrix.square().sum(dims).reshape(-1) for matrix in matrices])


def _factors(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s, [channels], and ||s G||^2, 0-dim, from the sums of squares of N, R and G."""
    direction, low, grad = squares
    factors = direction.sqrt() / (low.sqrt() + TINY_NORM)
    return factors, (factors.square() * grad).sum()


class ProjectedMethod(Method[ConfigT]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    @abstractmethod
    def optimizer_class(self) -> type[ProjectedOptimizer[ConfigT]]:
        """Returns the optimizer of the targeted weights."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        adamw = require_adamw(config)
        targeted = targeted_weights(model, self.config.targets)
        weights = [
            build_projected_weight(name, parameter, self.config.rank)
            for name, parameter in targeted.items()
        ]
        others = [p for p in trained_parameters(model, targeted) if p.is_other]
        dense = AdamW(adamw, others)
        build = self.optimizer_class()
        return build(self.config, adamw, weights, dense, self.seed, compile_step)


class Galore(ProjectedMethod[GaloreConfig]):
    """Adam in the subspace of each gradient's leading singular vectors."""

    def optimizer_class(self) -> type[GaloreOptimizer]:
        return GaloreOptimizer


class Fira(ProjectedMethod[FiraConfig]):
    """GaLore plus the residual of each gradient, scaled as Adam scales the projection."""

    def optimizer_class(self) -> type[FiraOptimizer]:
        return FiraOptimizer


class Apollo(ProjectedMethod[ApolloConfig]):
    """The gradient, scaled as by Adam in a random subspace."""

    def optimizer_class(self) -> type[ApolloOptimizer]:
        return ApolloOptimizer


def targeted_weights(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Returns the weights of the linear layers in `targets`, by qualified parameter name.

    Raises:
        ConfigError: if a target names no linear layer of the model.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = tuple(targets)
    if problems := check_targets(targets, linears):
        raise ConfigError(problems[0])
    wanted = {f"{name}.weight" for name in linears if name.rpartition(".")[2] in targets}
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}
