"""Several optimizers as one."""

from torch import Tensor

from switchtitan.contracts import TrainingOptimizer, replicated_values


class SplitOptimizer:
    """Several optimizers of disjoint parameters as one; a `contracts.TrainingOptimizer`."""

    def __init__(self, parts: list[TrainingOptimizer]) -> None:
        self._parts = parts

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        for part in self._parts:
            part.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        return {tag: value for part in self._parts for tag, value in part.metrics().items()}

    def replicated(self) -> dict[str, Tensor]:
        """Returns those of all parts; see `contracts.HoldsReplicated`."""
        return {
            key: tensor for part in self._parts for key, tensor in replicated_values(part).items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {key: tensor for part in self._parts for key, tensor in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for part in self._parts:
            part.load_state_dict(state)
