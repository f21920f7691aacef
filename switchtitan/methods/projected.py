"""GaLore, Fira and APOLLO: full weights train from low-rank projections of their gradients.

The smaller dimension of G [out, in] is projected (GaLore, arXiv 2403.03507, sec. 4.2; square ones
on the right, as in the authors' code):

    right, out >= in    R = G Q       [out, rank] with Q [in, rank]
    left,  out < in     R = Q^T G     [rank, in]  with Q [out, rank]

G is sharded over rows. On the right, every rank has the full Q, and R's rows are local: a step
needs no collective for it. On the left, each rank has its rows of Q and a summand of R.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as distributed_zeros

from switchtitan.contracts import Method, OptimizerConfig, TrainedModel, TrainingOptimizer
from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.norms import sum_packed, sum_rows
from switchtitan.distributed.replicas import compute_in_turns
from switchtitan.distributed.shards import (
    all_ranks_group,
    copy_from_full_,
    full_tensor,
    local,
    rows_per_rank,
    shard_group,
)
from switchtitan.methods.targets import TargetConfig
from switchtitan.numerics.random import generator_for
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.adamw import AdamKeys
from switchtitan.optim.adamw8bit import MOMENTS
from switchtitan.optim.base import GroupedOptimizer, SplitOptimizer
from switchtitan.optim.moments import Moments, Stored, decoded, encode_
from switchtitan.optim.parameters import TrainedParameter, trained_parameters

TINY_NORM = 1e-8
"""Added to norms in denominators, as in the code of Fira's and APOLLO's authors."""


class ProjectedConfig(TargetConfig):
    """The configuration keys of methods that project gradients."""

    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw", "adamw8bit"})
    rank: int = Field(ge=1)
    """Dimensions that gradients are projected onto: at least 1, and below the smaller dimension of
    every target."""
    update_interval: int = Field(default=200, ge=1)
    """Steps between two projections; at least 1."""
    scale: float = Field(default=0.25, gt=0)
    """Updates that are projected back are multiplied by this (alpha in the papers), above 0. Fira's
    residual is G - scale R Q^T, with the gradient G, the basis Q and R = G Q."""


class GaloreConfig(ProjectedConfig):
    """`[method] name = "galore"`: GaLore (arXiv 2403.03507). On a GPU, the host waits for torch's
    decompositions when bases are renewed, every `update_interval` steps. They run in fp64,
    slow on GPUs that compute it at 1/64 of the rate of fp32; a larger interval means fewer."""

    name: Literal["galore"] = "galore"
    """The method."""


class LimitedConfig(ProjectedConfig):
    """The configuration keys of methods whose updates grow slowly."""

    max_norm_growth: float = Field(default=1.01, gt=1)
    """Largest factor, above 1, by which the norm of a weight's update may grow in a step (gamma in
    the papers). Fira limits the scaled residual alone."""


class FiraConfig(LimitedConfig):
    """`[method] name = "fira"`: Fira (arXiv 2410.01623). Bases are those of GaLore, with the same
    waits on a GPU."""

    name: Literal["fira"] = "fira"
    """The method."""


class ApolloConfig(LimitedConfig):
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


def is_right(weight: Tensor) -> bool:
    """Whether the gradient of a weight [out, in] is projected on the right."""
    return weight.shape[0] >= weight.shape[1]


class ProjectedWeight:
    """A weight, the basis of its projection, and Adam's moments of the projected gradient.

    Attributes:
        parameter: [out, in], plain or sharded along dimension 0.
        basis: Q, [in, rank] on the right, unsharded; [out, rank] on the left, sharded.
        moments: M and V, [out, rank] on the right, [rank, in] on the left, sharded.
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, in_8_bits: bool) -> None:
        self.name, self.parameter, self.is_right = name, parameter, is_right(parameter)
        out_features, in_features = parameter.shape
        zeros = sharded_zeros = local(parameter.detach()).new_zeros
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            sharded_zeros = partial(
                distributed_zeros, dtype=parameter.dtype, device_mesh=mesh, placements=placements
            )
        if self.is_right:
            self.basis, shape = zeros(in_features, rank), (out_features, rank)
        else:
            self.basis, shape = sharded_zeros(out_features, rank), (rank, in_features)
        like = {name: sharded_zeros(shape)}
        self.moments = [Moments(*moment, like, in_8_bits) for moment in MOMENTS.items()]

    def stored_moments(self) -> list[Stored]:
        return [moment.stored[self.name] for moment in self.moments]

    @property
    def grad(self) -> Tensor:
        """The local shard of the gradient, [out/ranks, in]."""
        assert self.parameter.grad is not None, f"no gradient for {self.name}"
        return local(self.parameter.grad)

    def project(self) -> Tensor:
        """Returns R: [out/ranks, rank] on the right, a summand [rank, in] on the left."""
        basis = local(self.basis)
        return self.grad @ basis if self.is_right else basis.t() @ self.grad

    def add_back_(self, target: Tensor, low: Tensor, alpha: float, beta: float = 1.0) -> None:
        """Sets local rows of a matrix [out, in] to beta * target + alpha * low Q^T, with local rows
        of low on the right; on the left to beta * target + alpha * Q low, with all rows."""
        basis = local(self.basis)
        left, right = (low, basis.t()) if self.is_right else (basis, low)
        target.addmm_(left, right, alpha=alpha, beta=beta)


class ProjectedOptimizer(GroupedOptimizer):
    """Updates the targeted weights.

    Adam's direction is N = M / (sqrt(V) + eps), with the moments M, V of R. As in the code of
    GaLore's and Fira's authors, eps is added before the bias correction, which is part of the step
    size, and moments are kept when bases change. Weight decay is that of AdamW (arXiv 1711.05101),
    before the update. The state is `<weight>.exp_avg` and so on, and `projection.step`.
    """

    saves_bases: ClassVar[bool] = True
    """Whether bases are part of the state."""

    def __init__(
        self,
        method: ProjectedConfig,
        adam: AdamKeys,
        parameters: dict[str, nn.Parameter],
        seed: int,
        compile_step: bool,
    ) -> None:
        super().__init__(adam, [TrainedParameter(*item) for item in parameters.items()])
        self._method, self._adam, self._seed = method, adam, seed
        in_8_bits = adam.has_8bit_moments
        items = parameters.items()
        self._targeted = [ProjectedWeight(*item, method.rank, in_8_bits) for item in items]
        self._first = self._targeted[0].parameter
        self._have_bases = set[str]()
        self._group = shard_group(self._first)
        self._num_steps = 0
        self._compile = compile_if(compile_step)
        self._direction = self._compile(partial(direction_, betas=adam.betas, eps=adam.eps))
        for weight in self._targeted:
            for moment in weight.moments:
                self.state |= moment.state
            if self.saves_bases:
                self.state[f"{weight.name}.basis"] = weight.basis

    def _choose_weights(self) -> None:
        """Chooses the weights that have a gradient; nothing of the others changes in a step."""
        trains = [weight.parameter.grad is not None for weight in self._targeted]
        self._places = [place for place, does in enumerate(trains) if does]
        self._weights = [self._targeted[place] for place in self._places]
        self._left = [weight for weight in self._weights if not weight.is_right]

    def renew_bases(self, is_due: bool) -> None:
        """Sets bases from the gradients: all, every `update_interval` steps, or those of weights
        that had no gradient so far."""
        if lacking := [it for it in self._weights if is_due or it.name not in self._have_bases]:
            renew_from_gradients(lacking)
            self._have_bases |= {weight.name for weight in lacking}

    @abstractmethod
    def update(self, step_size: float, decay: float) -> None:
        """Multiplies all weights by `decay`, then updates them from their gradients."""

    @torch.no_grad()
    def step(self) -> None:
        self._choose_weights()
        if not self._weights:
            return
        self.renew_bases(is_due=self._num_steps % self._method.update_interval == 0)
        self._num_steps += 1
        (beta1, beta2), n = self._adam.betas, self._num_steps
        # The bias correction as at the end of sec. 2 of arXiv 1412.6980.
        (lr,) = self.rates  # weights are one group
        step_size = lr * (1 - beta2**n) ** 0.5 / (1 - beta1**n)
        self.update(step_size, decay=1 - lr * self._adam.weight_decay)

    def sums_on_left(self) -> list[Tensor]:
        """Returns this rank's rows of R, summed over ranks, for each weight projected on the left;
        one reduce-scatter of all [rank, in] next to each other, and with replicas their mean."""
        partials = [weight.project() for weight in self._left]
        if self._group is None or not partials:
            return partials
        rank, num_ranks = self._method.rank, self._group.size()
        chunk = rows_per_rank(rank, num_ranks)
        packed = F.pad(torch.cat(partials, dim=1), (0, 0, 0, num_ranks * chunk - rank))
        own = sum_rows(packed, self._first)
        num_held = len(self._left[0].stored_moments()[0][0])
        return list(own[:num_held].split([partial.shape[1] for partial in partials], dim=1))

    def gather_on_left(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns all rows of matrices like R, [rank, in], given this rank's; one all-gather."""
        if self._group is None or not parts:
            return parts
        chunk = rows_per_rank(self._method.rank, self._group.size())
        own = F.pad(torch.cat(parts, dim=1), (0, 0, 0, chunk - parts[0].shape[0]))
        full = own.new_empty(self._group.size() * chunk, own.shape[1])
        dist.all_gather_single(full, own, group=self._group)
        return list(full[: self._method.rank].split([part.shape[1] for part in parts], dim=1))

    def direction(self, weight: ProjectedWeight, low: Tensor) -> Tensor:
        """Updates the moments from this rank's rows of R; returns those of N."""
        direction: Tensor = self._direction(low, *weight.stored_moments())
        return direction

    def metrics(self) -> dict[str, float]:
        num_refreshes = -(-self._num_steps // self._method.update_interval)
        return super().metrics() | {"projection/refreshes": float(num_refreshes)}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"projection.step": torch.tensor(self._num_steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._num_steps = int(state["projection.step"])
        if self.saves_bases:  # one full basis is in memory at a time
            found = (it.name for it in self._targeted if bool(full_tensor(it.basis).any()))
            self._have_bases = set(found)


def direction_(
    grad: Tensor, mean: Stored, square: Stored, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """Updates the moments M and V in place; returns M / (sqrt(V) + eps)."""
    exp_avg = decoded(mean).lerp_(grad, 1 - betas[0])
    exp_avg_sq = decoded(square).mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    encode_(mean, exp_avg)
    encode_(square, exp_avg_sq)
    return exp_avg / (exp_avg_sq.sqrt() + eps)


def renew_from_gradients(weights: list[ProjectedWeight]) -> None:
    """Sets bases to the leading singular vectors of the gradients, which ranks share."""

    def collect(place: int) -> Tensor:
        gradient = weights[place].parameter.grad
        assert gradient is not None
        return full_tensor(gradient)

    def compute(gradient: Tensor) -> list[Tensor]:
        return [leading_singular_vectors(gradient, weights[0].basis.shape[1])]

    bases = [[weight.basis] for weight in weights]
    group = all_ranks_group(weights[0].parameter)
    computed = compute_in_turns(collect, compute, bases, weights[0].basis.device, group)
    for weight, (basis,) in zip(weights, computed, strict=True):
        copy_from_full_(weight.basis, basis)


def leading_singular_vectors(grad: Tensor, rank: int) -> Tensor:
    """Returns the leading singular vectors of a gradient [out, in].

    Right ones [in, rank] if out >= in, else left ones [out, rank]: the leading eigenvectors of
    G^T G or G G^T in fp64, more exact than an SVD in fp32. The largest entry of each is positive:
    moments are kept when the basis changes, so its sign must not depend on rounding.
    """
    # The trainer reports gradients that are not finite; an error would leave other ranks waiting.
    matrix = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)
    gram = matrix.t() @ matrix if is_right(grad) else matrix @ matrix.t()
    # In ascending order.
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(grad.dtype)


class GaloreOptimizer(ProjectedOptimizer):
    """W <- decay W - step_size scale (N Q^T) (arXiv 2403.03507, Alg. 2). A step has two
    collectives, a reduce-scatter of R and an all-gather of N of weights projected on the left."""

    def update(self, step_size: float, decay: float) -> None:
        alpha = -step_size * self._method.scale
        parts = map(self.direction, self._left, self.sums_on_left())
        on_left = iter(self.gather_on_left(list(parts)))
        for weight in self._weights:
            is_right = weight.is_right
            low = self.direction(weight, weight.project()) if is_right else next(on_left)
            weight.add_back_(local(weight.parameter), low, alpha, decay)


class LimitedOptimizer(ProjectedOptimizer):
    """Keeps the norm of each weight's update below `max_norm_growth` times its limited value in the
    step before (Fira, arXiv 2410.01623, which APOLLO uses as well). The first step is not limited.
    The last norms, [weights], are the state `projection.update_norms`."""

    measure: ClassVar[Callable[..., Any]]
    """What an update's norm needs, compiled to one graph."""
    _method: LimitedConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._measure = self._compile(type(self).measure)
        like = local(self._first).detach()
        self._norms = like.new_full((len(self._targeted),), torch.inf)
        self._num_limited = torch.zeros((), device=like.device)
        self.state["projection.update_norms"] = self._norms

    def divisors(self, norms: Tensor) -> Tensor:
        """Returns the divisors of updates of these norms, both [weights]; stores limited norms."""
        most = self._method.max_norm_growth
        # A list of all places would wait for a GPU.
        places = slice(None) if len(norms) == len(self._norms) else self._places
        divisors = (norms / (self._norms[places] + TINY_NORM)).clamp(min=most) / most
        self._norms[places] = norms / divisors
        self._num_limited = (divisors > 1).sum()
        return divisors

    def metrics(self) -> dict[str, float]:
        share = float(self._num_limited) / len(self._norms)
        return super().metrics() | {"projection/limited_share": share}


def scale_residual(
    residual: Tensor, low: Tensor, direction: Tensor, *, dim: int
) -> tuple[Tensor, Tensor]:
    """Returns phi = ||N|| / ||R|| along `dim`, which is kept, and ||phi residual||^2, with the
    residual G - scale R Q^T, [out/ranks, in]."""
    norms = torch.linalg.vector_norm(low, dim=dim, keepdim=True) + TINY_NORM
    factors = torch.linalg.vector_norm(direction, dim=dim, keepdim=True) / norms
    return factors, (residual * factors).square().sum()


class FiraOptimizer(LimitedOptimizer):
    """W <- decay W - step_size (scale N Q^T + S / limiter), S = phi (G - scale R Q^T).

    (arXiv 2410.01623.) phi = ||N|| / ||R|| of each row of R where the projection is on the right,
    of each column where it is on the left. The paper subtracts R Q^T; the authors' package, which
    the published runs used, subtracts scale R Q^T, as we do, and decays weights after the update.
    A step has three collectives: a reduce-scatter of R and an all-gather of R and N of weights
    projected on the left, and a sum of squares for all weights.
    """

    measure = staticmethod(scale_residual)

    def update(self, step_size: float, decay: float) -> None:
        scale = self._method.scale
        sums = self.sums_on_left()
        gathered = self.gather_on_left([*sums, *map(self.direction, self._left, sums)])
        on_left = iter(zip(gathered[: len(sums)], gathered[len(sums) :], strict=True))
        projections, factors, squares = [], [], []
        for weight in self._weights:
            if weight.is_right:
                low = weight.project()
                direction = self.direction(weight, low)
            else:
                low, direction = next(on_left)
            residual = weight.grad.clone()
            weight.add_back_(residual, low, -scale)
            factor, square = self._measure(
                residual, low, direction, dim=1 if weight.is_right else 0
            )
            projections.append((low, direction))
            factors.append(factor)
            squares.append(square)
        divisors = self.divisors(torch.stack(sum_packed(squares, self._first)).sqrt())
        for weight, (low, direction), factor, divisor in zip(
            self._weights, projections, factors, divisors.unbind(), strict=True
        ):
            # scaling (G - scale R Q^T) + scale N Q^T is scaling G + scale (N - scaling R) Q^T.
            parameter, scaling = local(weight.parameter), factor / divisor
            if decay != 1:
                parameter.mul_(decay)
            parameter.addcmul_(weight.grad, scaling, value=-step_size)
            rest = torch.addcmul(direction, low, scaling, value=-1)
            weight.add_back_(parameter, rest, -step_size * scale)


def sums_of_squares(*matrices: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns sums over `dims`, [matrices, the rest of the shape]."""
    return torch.stack([matrix.square().sum(dims).reshape(-1) for matrix in matrices])


def factors_and_square(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s, [channels], and ||s G||^2, 0-dim, from the sums of squares of N, R and G."""
    direction, low, grad = squares
    factors = direction.sqrt() / (low.sqrt() + TINY_NORM)
    return factors, (factors.square() * grad).sum()


class ApolloOptimizer(LimitedOptimizer):
    """W <- decay W - step_size scale (s G) / limiter (arXiv 2412.05270, Alg. 1).

    s = ||N|| / ||R|| over each channel or the tensor, with a random Q. A step has two collectives:
    a reduce-scatter of R of weights projected on the left, and a sum of squares. Bases follow from
    (seed, name, number of the basis), so no checkpoint has them.
    """

    saves_bases = False
    measure = staticmethod(sums_of_squares)
    _method: ApolloConfig

    def renew_bases(self, is_due: bool) -> None:
        if not is_due:
            return
        number = self._num_steps // self._method.update_interval
        for weight in self._targeted:
            generator = generator_for(self._seed, f"{weight.name}.basis.{number}")
            values = torch.randn(weight.basis.shape, generator=generator)
            values /= weight.basis.shape[1] ** 0.5
            copy_from_full_(weight.basis, to_device(values, weight.basis.device))

    def replicated(self) -> dict[str, Tensor]:
        return {f"{weight.name}.basis": weight.basis for weight in self._targeted}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.renew_bases(is_due=True)

    def update(self, step_size: float, decay: float) -> None:
        by_channel = self._method.scaling == "channel"
        on_left = iter(self.sums_on_left())
        factors: dict[str, Tensor] = {}
        squares = []
        for weight in self._weights:
            low = weight.project() if weight.is_right else next(on_left)
            dims = (0, 1) if not by_channel else (1,) if weight.is_right else (0,)
            own = self._measure(self.direction(weight, low), low, weight.grad, dims=dims)
            # A channel projected on the right is on one rank: only ||s G||^2 is summed over ranks.
            if by_channel and weight.is_right:
                factors[weight.name], own = factors_and_square(own)
            squares.append(own)
        totals = []
        for weight, total in zip(self._weights, sum_packed(squares, self._first), strict=True):
            if weight.name not in factors:
                factors[weight.name], total = factors_and_square(total)
            totals.append(total)
        divisors = self.divisors(torch.stack(totals).sqrt())
        for weight, divisor in zip(self._weights, divisors.unbind(), strict=True):
            factor = factors[weight.name].unsqueeze(1 if weight.is_right else 0)
            parameter = local(weight.parameter)
            if decay != 1:
                parameter.mul_(decay)
            coefficients = factor * (step_size * self._method.scale) / divisor
            parameter.addcmul_(weight.grad, coefficients, value=-1)


_OPTIMIZERS: dict[type[ProjectedConfig], type[ProjectedOptimizer]] = {
    GaloreConfig: GaloreOptimizer,
    FiraConfig: FiraOptimizer,
    ApolloConfig: ApolloOptimizer,
}


class Projected(Method[ProjectedConfig]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        assert isinstance(config, AdamKeys)  # see `ProjectedConfig.optimizers`
        names = {f"{name}.weight" for name in self.config.targeted(model)}
        trained = trained_parameters(model, names)
        targeted = {entry.name: entry.parameter for entry in trained if not entry.is_other}
        others = [entry for entry in trained if entry.is_other]
        optimizer = _OPTIMIZERS[type(self.config)]
        projected = optimizer(self.config, config, targeted, self.seed, compile_step)
        return SplitOptimizer([projected, OPTIMIZERS.build(config, others, compile_step)])
