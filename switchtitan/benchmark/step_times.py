"""Statistics of alternated steps: medians, and ratios with confidence intervals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one configuration's training steps on this rank; all arrays [rounds, steps]."""

    step_s: NDArray[np.float64]
    """Full steps, including reading the batch."""
    forward_backward_s: NDArray[np.float64]
    """From the start of the step to its update: batch, forward, backward and clipping."""
    optimizer_s: NDArray[np.float64]
    """The optimizer's update, including the method's work in it, such as switches."""
    tokens_per_step: int
    """Tokens of the global batch, over all ranks."""

    @property
    def median_s(self) -> float:
        """The median over all steps."""
        return float(np.median(self.step_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """The first and the third quartile over all steps."""
        low, high = np.quantile(self.step_s, [0.25, 0.75])
        return float(low), float(high)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the median step."""
        return self.tokens_per_step / self.median_s


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two sides."""

    value: float
    low: float
    """Lower end of the 95 % bootstrap interval; `high` is the upper end."""
    high: float


def ratio_of_steps(times: StepTimes, reference: StepTimes) -> Ratio:
    """`ratio_of_rounds` of training steps."""
    return ratio_of_rounds(times.step_s, reference.step_s)


def ratio_of_rounds(times_s: NDArray[np.float64], reference_s: NDArray[np.float64]) -> Ratio:
    """Returns the median over rounds of (median of `times_s`) / (median of `reference_s`).

    Rounds are compared pairwise, so that a slowdown longer than a round affects both. The interval
    is the percentile bootstrap over rounds (Efron 1979), from 2000 resamples with a fixed seed; it
    is rough for few rounds.

    Args:
        times_s, reference_s: [rounds, times] each.

    Raises:
        ValueError: if the numbers of rounds differ.
    """
    if len(times_s) != len(reference_s):
        raise ValueError(
            f"{len(times_s)} rounds and {len(reference_s)} rounds: not timed side by side"
        )
    ratios = np.median(times_s, axis=1) / np.median(reference_s, axis=1)
    draws = np.random.default_rng(0).integers(len(ratios), size=(_NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
