"""AdamW with one step count for each vector of the factors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.compilation import compile_if
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.factor_groups import FactorGroups, stacked, zero_all_
from switchtitan.methods.switchlora.schedule import VectorSpan
from switchtitan.methods.switchlora.switch import fill_vectors_, places_in_table, scale_rows_
from switchtitan.optim import AdamWConfig

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


class VectorAdamW:
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count.

    A `FactorRule` (SwitchLoRA, arXiv 2406.06564, sec. 3). Equals torch's AdamW as long as no vector
    is reset or frozen. Factors of one width are updated as one matrix, see `FactorGroups`.

    Args:
        layers: by qualified name, all of one rank.
        compile_step: fuse the update of a matrix into one kernel.

    Attributes:
        num_steps: [2, layers, rank] fp32, the updates of each vector, including those while it was
            frozen; the same on every rank.
        momentum: beta1.
    """

    def __init__(
        self, config: AdamWConfig, layers: dict[str, LowRankLinear], compile_step: bool
    ) -> None:
        self._config = config
        self.momentum = config.betas[0]
        self._factors = FactorGroups(layers)
        first = self._factors.factors[0]
        self.num_steps = torch.zeros(self._factors.table_shape, device=first.device)
        # A tensor: torch.compile would recompile for every new Python number.
        self._lr = torch.tensor(config.lr, dtype=first.dtype, device=first.device)
        self._exp_avg_of_groups = self._factors.new_moments()
        self._exp_avg_sq_of_groups = self._factors.new_moments()
        self._exp_avg = self._factors.rows_of(self._exp_avg_of_groups)
        self._exp_avg_sq = self._factors.rows_of(self._exp_avg_sq_of_groups)
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
        zero_all_(
            self._factors.views(self._exp_avg, spans) + self._factors.views(self._exp_avg_sq, spans)
        )

    @torch.no_grad()
    def reset_momentum(self, spans: list[VectorSpan]) -> None:
        """Zeroes only these vectors' first moments."""
        zero_all_(self._factors.views(self._exp_avg, spans))

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
        moments = [self._exp_avg_sq[self._factors.index_of(span)] for span in spans]
        scale_rows_(moments, [span.vectors for span in spans], ratios.where(is_usable, 0))

    def momentum_ratios(self) -> Tensor:
        """See `FactorRule`."""
        return self._factors.ratios_to_gradients(self._exp_avg_of_groups)

    @torch.no_grad()
    def step(self, update_mask: Tensor) -> None:
        """Updates every vector.

        Args:
            update_mask: [2, layers, rank] bool; a vector for which it is false gets a gradient of
                zero and does not change, not even by weight decay. Its step count still increases.
        """
        config, (beta1, beta2) = self._config, self._config.betas
        self.num_steps += 1
        if not self._factors.groups:
            return
        coefficients = self._coefficients(
            self.num_steps,
            update_mask,
            self._factors.places,
            self._lr,
            beta1=beta1,
            beta2=beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        grads = self._factors.gradients()
        for (group, vectors), exp_avg, exp_avg_sq in zip(
            self._factors.matrices(),
            self._exp_avg_of_groups,
            self._exp_avg_sq_of_groups,
            strict=True,
        ):
            self._update(
                vectors,
                stacked(grads, group),
                exp_avg,
                exp_avg_sq,
                *(coefficient[group.vectors] for coefficient in coefficients),
                beta1=beta1,
                beta2=beta2,
            )

    def zero_grad(self) -> None:
        self._factors.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.exp_avg` and so on, sharded like the factors, and
        `switch.vector_steps`, which is `num_steps`."""
        exp_avg = self._factors.state("exp_avg", self._exp_avg)
        exp_avg_sq = self._factors.state("exp_avg_sq", self._exp_avg_sq)
        return exp_avg | exp_avg_sq | {"switch.vector_steps": self.num_steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])


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
