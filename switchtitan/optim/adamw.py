"""AdamW over whole tensors, on each rank's shards."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from switchtitan.optim.config import AdamWConfig


class AdamW:
    """torch's AdamW on the local parts of parameters; a `contracts.TrainingOptimizer`.

    The update is torch's own, fused, or the same compiled; only the bookkeeping is ours, since torch's optimizer classes step
    through DTensor's dispatcher and cannot be compiled whole.

    Args:
        named_parameters: those to train, fp32.
        local_part: gives a sharded tensor's part on this rank, sharing memory.
    """

    def __init__(
        self,
        config: AdamWConfig,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        local_part: Callable[[Tensor], Tensor],
        compile_step: bool = False,
    ) -> None:
        self._local_part = local_part
        self._parameters = dict(named_parameters)
        self._exp_avg = {name: _zeros_like(parameter) for name, parameter in self._parameters.items()}
        self._exp_avg_sq = {name: _zeros_like(parameter) for name, parameter in self._parameters.items()}
        self._num_steps = {
            name: torch.zeros((), device=parameter.device) for name, parameter in self._parameters.items()
        }
        self._peak_lr = config.lr
        # A tensor: a compiled update would be compiled anew for every Python number.
        device = next((parameter.device for parameter in self._parameters.values()), torch.device("cpu"))
        self._lr = torch.tensor(config.lr, device=device) if compile_step else config.lr
        self._update = _build_update(config, compile_step)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        local = self._local_part
        names = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        if not names:
            return
        self._update(
            [local(self._parameters[name]) for name in names],
            [local(self._parameters[name].grad) for name in names],  # type: ignore[arg-type]
            [local(self._exp_avg[name]) for name in names],
            [local(self._exp_avg_sq[name]) for name in names],
            [],  # the largest second moments, which only AMSGrad has
            [self._num_steps[name] for name in names],
            lr=self._lr,
        )

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def set_lr(self, lr_factor: float) -> None:
        lr = self._peak_lr * lr_factor
        if isinstance(self._lr, Tensor):
            self._lr.fill_(lr)
        else:
            self._lr = lr

    def metrics(self) -> dict[str, float]:
        return {"optimizer/lr": float(self._lr)}

    def state_dict(self) -> dict[str, Tensor]:
        """`<parameter>.exp_avg`, `<parameter>.exp_avg_sq` (like the parameter) and `<parameter>.step` (0-dim)."""
        moments = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": self._num_steps}
        return {
            f"{name}.{key}": tensors[name] for name in self._parameters for key, tensors in moments.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self.state_dict().items():
                tensor.copy_(state[key])


def _zeros_like(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False, memory_format=torch.preserve_format)


def _build_update(config: AdamWConfig, compile_step: bool) -> partial[None]:
    update = partial(
        adamw,
        foreach=compile_step,
        capturable=compile_step,
        fused=not compile_step,
        differentiable=False,
        amsgrad=False,
        maximize=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=config.weight_decay,
        eps=config.eps,
    )
    if not compile_step:
        return update
    return partial(torch.compile(update.func, fullgraph=True, dynamic=False), **update.keywords)
