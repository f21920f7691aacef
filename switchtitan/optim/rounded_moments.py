"""AdamW's update for moments stored in bf16."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from switchtitan.distributed.rounding import random_bit_pairs, round_to_bf16, rounding_key
from switchtitan.distributed.seeds import splitmix32
from switchtitan.distributed.shards import local, row_range

_MAX_ELEMENTS = 1 << 24
"""The most elements that one uncompiled call updates, which bounds its temporary memory."""


class RoundedUpdate:
    """Updates parameters by AdamW, with moments computed in fp32 and stored in bf16.

    Moments are rounded stochastically: the decision for an element is a pure function of the seed,
    the parameter's name and step count, and the element's place in the full parameter. Nothing is
    stored for it, a resumed run repeats it, and it does not depend on the number of ranks.

    Args:
        parameters: by name.
        seed: the job's seed.
        compile_step: fuse the update of a parameter into one kernel.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        betas: tuple[float, float],
        eps: float,
        seed: int,
        compile_step: bool,
    ) -> None:
        self._betas, self._eps = betas, eps
        self._keys: dict[str, Tensor] = {}
        self._first_rows = {name: row_range(p).start for name, p in parameters.items()}
        if parameters:
            device = local(next(iter(parameters.values()))).device
            keys = [rounding_key(seed, f"{name}.moments") for name in parameters]
            on_device = torch.tensor(keys, dtype=torch.int32, device=device)
            self._keys = dict(zip(parameters, on_device.unbind(), strict=True))
        self._is_compiled = compile_step
        # Dynamic: one graph instead of one for each shape.
        self._update: Callable[..., None] = (
            torch.compile(update_and_round_, fullgraph=True, dynamic=True)
            if compile_step
            else update_and_round_
        )

    def __call__(
        self,
        name: str,
        parameter: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        num_steps: Tensor,
        lr: Tensor | float,
        weight_decay: float,
    ) -> None:
        """Updates one parameter and its moments in place.

        Args:
            parameter, grad, exp_avg, exp_avg_sq: local shards.
            num_steps: 0-dim, this step included.
        """
        tensors = [_as_matrix(t) for t in (parameter, grad, exp_avg, exp_avg_sq)]
        num_rows, num_columns = tensors[0].shape
        rows_per_call = max(1, num_rows)
        if not self._is_compiled:
            rows_per_call = max(1, _MAX_ELEMENTS // max(1, num_columns))
        for start in range(0, num_rows, rows_per_call):
            self._update(
                *(t[start : start + rows_per_call] for t in tensors),
                num_steps,
                self._keys[name],
                lr,
                first_row=self._first_rows[name] + start,
                weight_decay=weight_decay,
                betas=self._betas,
                eps=self._eps,
            )

    def replicated(self) -> dict[str, Tensor]:
        """Returns the parameters' keys, which are the same on every rank."""
        return {f"{name}.rounding_key": key for name, key in self._keys.items()}


def update_and_round_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    num_steps: Tensor,
    key: Tensor,
    lr: Tensor | float,
    *,
    first_row: int,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One update by AdamW (arXiv 1711.05101, Algorithm 2) in fp32; rounds the new moments.

    The parameter is updated from the moments before rounding.

    Args:
        parameter: [rows, width] fp32, changed in place.
        exp_avg, exp_avg_sq: [rows, width] bf16, changed in place.
        num_steps: 0-dim, this step included.
        key: 0-dim int32, the parameter's `rounding_key`.
        first_row: index of the first row in the full parameter.
    """
    beta1, beta2 = betas
    mean = torch.lerp(exp_avg.to(torch.float32), grad, 1 - beta1)
    square = torch.addcmul(exp_avg_sq.to(torch.float32) * beta2, grad, grad, value=1 - beta2)
    denominator = square.sqrt() / (1 - beta2**num_steps).sqrt() + eps
    if weight_decay:
        parameter.mul_(1 - lr * weight_decay)
    parameter.sub_(mean / denominator * (lr / (1 - beta1**num_steps)))
    step_key = splitmix32(key, num_steps.to(torch.int32))
    mean_bits, square_bits = random_bit_pairs(step_key, first_row, *mean.shape)
    exp_avg.copy_(round_to_bf16(mean, mean_bits))
    exp_avg_sq.copy_(round_to_bf16(square, square_bits))


def _as_matrix(tensor: Tensor) -> Tensor:
    """Returns a view with two dimensions; vectors become columns."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.new_empty(0, 0)
