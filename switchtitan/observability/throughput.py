"""Training speed, MFU and peak memory."""

import resource
import time
from dataclasses import dataclass

import torch


@dataclass(kw_only=True, eq=False)
class Throughput:
    """Tokens per second, model FLOP/s and model FLOP/s utilization (MFU) from the times of steps,
    and the time left.

    MFU counts the FLOPs of full-rank training for every method, so that it compares methods by
    speed. (PaLM, arXiv 2204.02311, appendix B)
    """

    tokens_per_step: int
    flops_per_token: float
    """Of forward and backward, per device."""
    peak_flops_per_s: float | None
    """Of one device; None if unknown, then MFU is not reported."""
    num_steps: int
    start_step: int = 0
    """Steps done before this run, of `num_steps`."""

    def __post_init__(self) -> None:
        self._began_at = time.perf_counter()
        self._first: tuple[int, float] | None = None
        """Step and time of the first call of `measure`."""
        self._step, self._num_timed, self._timed_s = self.start_step, 0, 0.0

    def measure(self, step: int, step_s: float) -> dict[str, float]:
        """Returns the metrics since the last call, by TensorBoard tag. The first of several calls
        returns nothing, since its steps include compilation: call it after one step.

        Args:
            step_s: mean seconds of the steps since the last call, without evaluations and saves.
        """
        now, num_steps = time.perf_counter(), step - self._step
        self._step = step
        if self._first is None:
            self._first = step, now
            if step < self.num_steps:
                return {}
        self._num_timed += num_steps
        self._timed_s += num_steps * step_s
        flops_per_s = self.tokens_per_step / step_s * self.flops_per_token
        # The time left has evaluations and saves.
        first_step, first_at = self._first
        s_per_step = (now - first_at) / max(1, step - first_step)
        values = {
            "throughput/tokens_per_s": self.tokens_per_step / step_s,
            "throughput/tflop_per_s_per_device": flops_per_s / 1e12,
            "throughput/eta_s": (self.num_steps - step) * s_per_step,
        }
        if self.peak_flops_per_s is not None:
            values["throughput/mfu"] = flops_per_s / self.peak_flops_per_s
        return values

    def means(self) -> dict[str, float | None]:
        """Returns means of what `measure` has returned, and the seconds since this object was
        created, by name."""
        tokens_per_s = mfu = None
        if self._num_timed:
            tokens_per_s = self._num_timed * self.tokens_per_step / self._timed_s
            if self.peak_flops_per_s is not None:
                mfu = tokens_per_s * self.flops_per_token / self.peak_flops_per_s
        return {
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/mfu": mfu,
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
