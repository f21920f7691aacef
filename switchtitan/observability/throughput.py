"""Training speed, MFU and peak memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(kw_only=True, eq=False)
class Throughput:
    """Measures tokens per second, model FLOP/s, model FLOP/s utilization (MFU) and the time left.

    MFU counts the FLOPs of full-rank training for every method, so that it compares methods by
    speed. (PaLM, arXiv 2204.02311, appendix B)
    """

    tokens_per_step: int
    flops_per_token: float
    """Of forward and backward, per device."""
    peak_flops_per_s: float | None
    """Of one device; None if unknown, then MFU is not reported."""
    num_steps: int
    synchronize: Callable[[], None]
    """Waits until the device has done all queued work."""
    start_step: int = 0
    """Steps done before this run, of `num_steps`."""

    def __post_init__(self) -> None:
        self._step = self.start_step
        self._began_at = self._window_began_at = time.perf_counter()
        self._excluded_s = 0.0
        self._first_step, self._first_at = 0, 0.0
        """Step and time of the first call of `measure`, from which means are taken."""
        self._steady_s = 0.0
        self._tokens_per_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time inside (evaluation, saving) from the speed, not from the time left."""
        self.synchronize()  # what is inside may wait for steps that are queued
        began_at = time.perf_counter()
        try:
            yield
        finally:
            self._excluded_s += time.perf_counter() - began_at

    def measure(self, step: int) -> dict[str, float]:
        """Returns the metrics since the last call, by TensorBoard tag.

        Call it when the device has finished `step` steps. The first of several calls returns
        nothing, since its window includes compilation: call it after one step.
        """
        now = time.perf_counter()
        num_steps = step - self._step
        assert num_steps > 0, f"measured twice at step {step}"
        elapsed_s = max(now - self._window_began_at - self._excluded_s, 1e-9)
        self._tokens_per_s = num_steps * self.tokens_per_step / elapsed_s
        self._step, self._window_began_at, self._excluded_s = step, now, 0.0
        if self._first_at == 0.0:
            self._first_step, self._first_at = step, now
            if step < self.num_steps:
                return {}
        else:
            self._steady_s += elapsed_s
        flops_per_s = self._tokens_per_s * self.flops_per_token
        # With what is excluded from the speed.
        s_per_step = (now - self._first_at) / max(1, step - self._first_step)
        values = {
            "throughput/tokens_per_s": self._tokens_per_s,
            "throughput/tflop_per_s_per_device": flops_per_s / 1e12,
            "throughput/eta_s": (self.num_steps - step) * s_per_step,
        }
        if self.peak_flops_per_s is not None:
            values["throughput/mfu"] = flops_per_s / self.peak_flops_per_s
        return values

    def means(self) -> dict[str, float | None]:
        """Returns means of the run, and the seconds since this object was created, by name. Without
        the first window, which includes compilation, unless it is the only one."""
        tokens_per_s = self._tokens_per_s
        if self._steady_s > 0.0:
            num_steps = self._step - self._first_step
            tokens_per_s = num_steps * self.tokens_per_step / self._steady_s
        peak = self.peak_flops_per_s
        return {
            "throughput/tokens_per_s": tokens_per_s or None,
            "throughput/mfu": None if peak is None else tokens_per_s * self.flops_per_token / peak,
            "throughput/wall_time_s": time.perf_counter() - self._began_at,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory since the process started, in GiB.

    On a GPU: of tensors in torch's allocator; nvidia-smi shows more, with what that reserves, the
    CUDA context and NCCL's buffers. On a CPU: the process's peak resident set size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB
