"""Muon on the factors."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from switchtitan.distributed.compilation import compile_if
from switchtitan.distributed.matrix_exchange import MatrixExchange
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.factor_groups import FactorGroups, stacked, zero_all_
from switchtitan.methods.switchlora.schedule import VectorSpan
from switchtitan.optim.muon import (
    MuonConfig,
    advance_,
    orthogonalization_cost,
    orthogonalize_all,
    subtract_,
)
from switchtitan.optim.parameters import LearningRates, ParameterGroup


class FactorMuon:
    """Muon on A and B of all layers, as matrices [rank, in] and [rank, out]; a `FactorRule`.

    Equals `optim.muon.Muon` as long as no vector is reset or frozen. The only state is momentum:
    there is no second moment and no step count to reset. Two collectives per step in all, those of
    Muon. Factors of one width are updated as one matrix, see `FactorGroups`.

    The row of a frozen vector is zero in the matrix that is orthogonalized. It then is zero in the
    update, and the other rows are what they would be without it. Rows of an update are all of about
    one size, whatever the size of their momentum: a vector whose momentum was reset moves as far as
    the others in the first step in which it is not frozen.

    Args:
        layers: by qualified name, all of one rank.
        compute_dtype: of products and of the rows that ranks exchange.
        compile_step: compile all but the collectives and copies.

    Attributes:
        momentum: see `FactorRule`.
    """

    def __init__(
        self,
        config: MuonConfig,
        layers: dict[str, LowRankLinear],
        compute_dtype: torch.dtype,
        compile_step: bool,
    ) -> None:
        self.momentum = config.momentum
        self._factors = FactorGroups(layers)
        self._momentum_of_groups = self._factors.new_moments()
        self._momentum = self._factors.rows_of(self._momentum_of_groups)
        self._weight_decay = config.weight_decay
        trained = ParameterGroup(self._factors.by_name(), config.lr, config.weight_decay)
        self._lrs = LearningRates([trained], compile_step)
        matrices = self._factors.factors
        costs = [orthogonalization_cost(*matrix.shape) for matrix in matrices]
        self._exchange = MatrixExchange(matrices, costs, compute_dtype)
        compile_it = compile_if(compile_step)
        self._advance: Callable[..., Tensor] = compile_it(
            partial(
                advance_vectors_,
                momentum=config.momentum,
                nesterov=config.nesterov,
                dtype=compute_dtype,
            )
        )
        self._orthogonalize: Callable[..., list[Tensor]] = compile_it(
            partial(orthogonalize_all, num_steps=config.ns_steps)
        )
        self._subtract: Callable[..., None] = compile_it(subtract_from_vectors_)

    def set_lr(self, lr_factor: float) -> None:
        self._lrs.set_factor(lr_factor)

    @torch.no_grad()
    def reset(self, spans: list[VectorSpan]) -> None:
        """Zeroes these vectors' momentum."""
        zero_all_(self._factors.views(self._momentum, spans))

    def reset_momentum(self, spans: list[VectorSpan]) -> None:
        """Does the same as `reset`, since momentum is the only state."""
        self.reset(spans)

    @torch.no_grad()
    def step(self, update_mask: Tensor) -> None:
        """See `FactorRule`."""
        mask = update_mask.flatten()[self._factors.places][:, None]
        updates = self._orthogonalized(mask)
        (lr,) = self._lrs
        for group, vectors in self._factors.matrices():
            update = stacked(updates, group)
            self._subtract(vectors, update, mask[group.vectors], lr, self._weight_decay)

    def _orthogonalized(self, mask: Tensor) -> list[Tensor]:
        """Advances momentum; returns this rank's rows of each factor's update.

        Args:
            mask: [vectors, 1] bool, of the local vectors of all groups.
        """
        grads = self._factors.gradients()
        parts = self._factors.split(
            [
                self._advance(momentum, stacked(grads, group), mask[group.vectors])
                for group, momentum in zip(
                    self._factors.groups, self._momentum_of_groups, strict=True
                )
            ]
        )
        batches = self._exchange.collect(parts)
        del parts  # frees memory before more is allocated
        if batches:
            batches = self._orthogonalize(batches)
        return self._exchange.distribute(batches)

    def momentum_ratios(self) -> Tensor:
        """See `FactorRule`."""
        return self._factors.ratios_to_gradients(self._momentum_of_groups)

    def zero_grad(self) -> None:
        self._factors.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.momentum` and so on, sharded like the factors."""
        return self._factors.state("momentum", self._momentum)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])


def advance_vectors_(
    momenta: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Moves momentum towards the gradient; returns the vectors that are to be orthogonalized.

    Args:
        momenta, grad: [vectors, width]; momenta are changed in place.
        mask: [vectors, 1] bool; a vector for which it is false has a gradient of zero, and is zero
            in the result.
        momentum, nesterov, dtype: see `optim.muon.advance_`.
    """
    (update,) = advance_(
        [momenta], [grad * mask], momentum=momentum, nesterov=nesterov, dtype=dtype
    )
    return update * mask


def subtract_from_vectors_(
    vectors: Tensor, update: Tensor, mask: Tensor, lr: Tensor | float, weight_decay: float
) -> None:
    """Moves vectors against their update, with decoupled weight decay.

    Args:
        vectors, update: [vectors, width]; vectors are changed in place.
        mask: [vectors, 1] bool; a vector for which it is false, whose update is zero, keeps its
            value.
    """
    if weight_decay:
        vectors.mul_(1 - lr * weight_decay * mask.to(vectors.dtype))
    subtract_([vectors], [update], lr, weight_decay=0)
