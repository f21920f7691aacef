"""Bytes that each rank sends in a training step, counted once in a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from switchtitan.observability.collectives import CountCommunication
from switchtitan.observability.metrics import COUNTED_STEP, Reporter

logger = logging.getLogger(__name__)


class StepCommunication:
    """Counts and reports the collectives of one step; `CountCommunication` defines the bytes.

    A `training.hooks.Hook`. One step is enough: every step gathers and reduces the same tensors.
    For events that become rarer during a run, such as switches, an early step is an upper bound.

    Args:
        start_step: steps done before this run.
    """

    def __init__(self, reporter: Reporter, start_step: int) -> None:
        self._reporter = reporter
        self._counted_step = start_step + COUNTED_STEP
        self._counter: CountCommunication | None = None
        self.mib_per_step: float | None = None
        """MiB that each rank sends; None before the counted step, or if counting failed."""

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Returns a context for step `step`, from 1; entered again if the update was skipped."""
        if step != self._counted_step:
            yield
            return
        with CountCommunication() as self._counter:
            yield

    def is_due(self, step: int) -> bool:
        """Whether the step just done is the counted one."""
        return step == self._counted_step

    def after(self, step: int) -> None:
        """Reports the counts."""
        counter, self._counter = self._counter, None
        assert counter is not None
        try:
            sent = {kind: count for kind, count in counter.counts.items() if count.num_calls}
        except NotImplementedError as error:
            logger.warning("could not count communication: %s", error)
            return
        mib = {kind: count.bytes_sent / 2**20 for kind, count in sent.items()}
        self.mib_per_step = sum(mib.values())
        self._reporter.report(
            step, {f"communication/{kind}_mib": value for kind, value in mib.items()}
        )
        logger.info(
            "each rank sent %.2f MiB in step %d (ring algorithm): %s",
            self.mib_per_step,
            step,
            ", ".join(
                f"{kind} {mib[kind]:.2f} MiB in {count.num_calls}" for kind, count in sent.items()
            ),
        )

    def results(self) -> dict[str, float | None]:
        """Returns the figures for `results.json`."""
        return {"communication/mib_per_step": self.mib_per_step}
