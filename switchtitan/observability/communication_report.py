"""What each rank sends in a training step, counted once in a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from switchtitan.distributed.count_collectives import CountCommunication
from switchtitan.observability.metrics import Reporter

logger = logging.getLogger(__name__)

_STEPS_BEFORE = 2
"""Steps of a run before the counted one, in which everything is compiled."""


class StepCommunication:
    """Counts the collectives of one step, says what they send, and reports it; see `CountCommunication` for what a byte is.

    One step is enough: what is gathered and reduced is the same in all. Of what grows rarer during a run, such as switches, an
    early step's is the upper end. On one rank nothing is sent, and nothing counted.

    Args:
        start_step: steps done before this run.
    """

    def __init__(self, reporter: Reporter, num_ranks: int, start_step: int) -> None:
        self._reporter = reporter
        self._num_ranks = num_ranks
        self._counted_step = start_step + _STEPS_BEFORE + 1
        self._counter: CountCommunication | None = None
        self.mib_per_step: float | None = None
        """What each rank sends; None until it has been counted, and where it cannot be."""

    @contextmanager
    def counted(self, step: int) -> Iterator[None]:
        """A context in which step `step`, from 1, is taken; again, if its update was skipped."""
        if self._num_ranks == 1 or step != self._counted_step:
            yield
            return
        with CountCommunication() as self._counter:
            yield

    def report(self, step: int) -> None:
        """Says what was counted in step `step`, if it was; call it after each that was not skipped."""
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        try:
            sent = {kind: count for kind, count in counter.counts.items() if count.num_calls}
        except NotImplementedError as error:
            logger.warning("What a step sends cannot be told: %s", error)
            return
        mib = {kind: count.bytes_sent / 2**20 for kind, count in sent.items()}
        self.mib_per_step = sum(mib.values())
        self._reporter.report(step, {f"communication/{kind}_mib": value for kind, value in mib.items()})
        logger.info(
            "each rank sent %.2f MiB in step %d, counted as in a ring of ranks: %s",
            self.mib_per_step,
            step,
            ", ".join(f"{kind} {mib[kind]:.2f} MiB in {count.num_calls}" for kind, count in sent.items()),
        )
