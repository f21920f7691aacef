"""The contract of the rules that update the factors."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from switchtitan.methods.switchlora.schedule import VectorSpan


class FactorRule(Protocol):
    """Updates A and B of all layers, and resets the state of the vectors that a switch names.

    Its methods never make the host wait for the device. State and updates of a vector do not depend
    on the number of ranks, up to rounding.

    Attributes:
        momentum: beta of the running mean of gradients, m = beta m + (1 - beta) g.
    """

    momentum: float

    def step(self, update_mask: Tensor) -> None:
        """Update every vector from its gradient; collective.

        Args:
            update_mask: [2, layers, rank] bool, the same on every rank; a vector for which it is
                false gets a gradient of zero and does not change, not even by weight decay.
        """
        ...

    def reset(self, spans: list[VectorSpan]) -> None:
        """Set all state of these vectors to its initial value."""
        ...

    def reset_momentum(self, spans: list[VectorSpan]) -> None:
        """Zero only the means of these vectors' gradients."""
        ...

    def momentum_ratios(self) -> Tensor:
        """Return |m| / |g| of each vector, its mean gradient and its gradient, [2, layers, rank].

        Zero for a gradient of zero, and for vectors of other ranks. `step` comes after it.
        """
        ...

    def zero_grad(self) -> None: ...

    def set_lr(self, lr_factor: float) -> None:
        """Set the learning rate to its configured value times `lr_factor`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state by keys that no other part of the optimizer has.

        To restore it, load into these tensors in place, then call `load_state_dict`.
        """
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state from a dict that may have further keys."""
        ...


@runtime_checkable
class HasSecondMoments(Protocol):
    """A `FactorRule` whose updates shrink with the mean square of earlier gradients."""

    def rescale_second_moments(self, spans: list[VectorSpan], ratios: Tensor) -> None:
        """Multiply these vectors' second moments by `ratios`.

        Args:
            ratios: [vectors], in the order of `spans`; the same on every rank.
        """
        ...
