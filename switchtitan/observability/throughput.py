"""How fast training goes and when it will be done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Measures tokens per second, model FLOP/s, its share of the device's peak (MFU), and the time left.

    MFU counts the operations that the model needs at full rank, whatever the method really computes, so that
    it compares methods by speed. (PaLM, arXiv 2204.02311, appendix B)

    Args:
        tokens_per_step: of the global batch.
        flops_per_token: forward and backward.
        num_devices: that share the batch.
        peak_flops_per_s: of one device; None if unknown, and then there is no MFU.
        num_steps: at which training ends.
        start_step: steps done before this run.
        clock: seconds, rising.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        num_devices: int,
        peak_flops_per_s: float | None,
        num_steps: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token_and_device = flops_per_token / num_devices
        self._peak = peak_flops_per_s
        self._num_steps = num_steps
        self._clock = clock
        self._began_at = clock()
        self._step = start_step
        self._window_began_at = self._began_at
        self._excluded_s = 0.0
        self._first_window_ended: tuple[int, float] | None = None
        self._steady_steps = 0
        self._steady_s = 0.0
        self._tokens_per_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving, exporting a trace) counts for the time left, not for the
        speed."""
        began_at = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - began_at

    def measure(self, step: int) -> dict[str, float]:
        """Returns the metrics since the last call, by TensorBoard tag.

        Call it when the device has finished `step` steps, e.g. after the loss was read. The first call of several gives no time
        left: compilation is in what it measures.
        """
        now = self._clock()
        num_steps = step - self._step
        assert num_steps > 0, f"measured twice at step {step}"
        elapsed_s = max(now - self._window_began_at - self._excluded_s, 1e-9)
        self._tokens_per_s = num_steps * self._tokens_per_step / elapsed_s
        flops_per_s = self._tokens_per_s * self._flops_per_token_and_device
        values = {
            "throughput/tokens_per_s": self._tokens_per_s,
            "throughput/tflop_per_s_per_device": flops_per_s / 1e12,
        }
        if self._peak is not None:
            values["throughput/mfu"] = flops_per_s / self._peak
        num_steps_left = self._num_steps - step
        if self._first_window_ended is None:
            self._first_window_ended = (step, now)
            if num_steps_left == 0:
                values["throughput/eta_s"] = 0.0
        else:
            first_step, first_time = self._first_window_ended
            values["throughput/eta_s"] = num_steps_left * (now - first_time) / (step - first_step)
            self._steady_steps += num_steps
            self._steady_s += elapsed_s
        self._step, self._window_began_at, self._excluded_s = step, now, 0.0
        return values

    @property
    def wall_time_s(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._began_at

    @property
    def mean_tokens_per_s(self) -> float:
        """Over all measured windows but the first, which contains compilation; over that one if it is the
        only one."""
        if self._steady_steps == 0:
            return self._tokens_per_s
        return self._steady_steps * self._tokens_per_step / self._steady_s
