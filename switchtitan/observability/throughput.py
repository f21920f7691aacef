"""Training speed, MFU and peak memory."""

import re
import resource
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter

import torch


class Throughput:
    """Measures tokens per second, model FLOP/s, model FLOP/s utilization (MFU) and the time left.

    MFU counts the FLOPs of full-rank training for every method, so that it compares methods by
    speed. (PaLM, arXiv 2204.02311, appendix B)

    Args:
        tokens_per_step: tokens of the global batch.
        flops_per_token: of forward and backward.
        num_devices: devices that share the batch.
        peak_flops_per_s: of one device; None if unknown, then MFU is not reported.
        num_steps: total training steps.
        start_step: steps done before this run.
        clock: a monotonic clock, in seconds.
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
        self._num_steps, self._step = num_steps, start_step
        self._clock = clock
        self._began_at = self._window_began_at = clock()
        self._excluded_s = 0.0
        self._marks: list[tuple[int, float]] = []
        self._steady_steps, self._steady_s = 0, 0.0
        self._tokens_per_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time inside (evaluation, saving) from the speed, not from the time left."""
        began_at = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - began_at

    def measure(self, step: int) -> dict[str, float]:
        """Returns the metrics since the last call, by TensorBoard tag.

        Call it when the device has finished `step` steps. The first of several calls returns
        nothing, since its window includes compilation: call it after one step.
        """
        now = self._clock()
        num_steps = step - self._step
        assert num_steps > 0, f"measured twice at step {step}"
        elapsed_s = max(now - self._window_began_at - self._excluded_s, 1e-9)
        self._tokens_per_s = num_steps * self._tokens_per_step / elapsed_s
        self._step, self._window_began_at, self._excluded_s = step, now, 0.0
        is_first = not self._marks
        self._marks.append((step, now))
        if is_first and step < self._num_steps:
            return {}
        if not is_first:
            self._steady_steps += num_steps
            self._steady_s += elapsed_s
        flops_per_s = self._tokens_per_s * self._flops_per_token_and_device
        values = {
            "throughput/tokens_per_s": self._tokens_per_s,
            "throughput/tflop_per_s_per_device": flops_per_s / 1e12,
            "throughput/eta_s": self._time_left_s(),
        }
        if self._peak is not None:
            values["throughput/mfu"] = flops_per_s / self._peak
        return values

    def _time_left_s(self) -> float:
        """At the mean speed of the later half of the measured steps, with what is excluded."""
        (first_step, _), (step, now) = self._marks[0], self._marks[-1]
        if step == self._num_steps:
            return 0.0
        middle = bisect_right(self._marks, (first_step + step) / 2, key=itemgetter(0)) - 1
        begin_step, began_at = self._marks[middle]
        return (self._num_steps - step) * (now - began_at) / (step - begin_step)

    @property
    def wall_time_s(self) -> float:
        """Seconds since this object was created."""
        return self._clock() - self._began_at

    @property
    def mean_tokens_per_s(self) -> float:
        """Mean without the first window, which includes compilation, unless it is the only one."""
        if self._steady_steps == 0:
            return self._tokens_per_s
        return self._steady_steps * self._tokens_per_step / self._steady_s

    @property
    def mean_mfu(self) -> float | None:
        """MFU at `mean_tokens_per_s`; None if the device's peak FLOP/s is unknown."""
        if self._peak is None:
            return None
        return self.mean_tokens_per_s * self._flops_per_token_and_device / self._peak


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory since the process started, in GiB.

    On a GPU: of tensors in torch's allocator; nvidia-smi shows more, with what that reserves, the
    CUDA context and NCCL's buffers. On a CPU: the process's peak resident set size.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # getrusage(2): KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Dense bf16 FLOP/s with fp32 accumulation, per torch device, by a pattern that must match the full
# torch.cuda.get_device_name(). Rates that a data sheet states with 2:4 sparsity are halved.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 Tensor Core GPU, data sheet, 2021: 312 (all variants).
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe|NVIDIA A100-SXM-\d+GB", 312e12),
    # NVIDIA H100 Tensor Core GPU, data sheet, 2023: SXM 1979 and NVL 1671 with sparsity;
    # 2022: PCIe 1513.
    (r"NVIDIA H100 80GB HBM3", 989.5e12),
    (r"NVIDIA H100 PCIe", 756.5e12),
    (r"NVIDIA H100 NVL", 835.5e12),
    # Variants of A100 and H100 for China differ in NVLink and fp64; H20 has 148 (data sheet, 2023).
    (r"NVIDIA A800-SXM4-\d+GB|NVIDIA A800 80GB PCIe", 312e12),
    (r"NVIDIA H800", 989.5e12),
    (r"NVIDIA H20", 148e12),
    # NVIDIA GH200 Grace Hopper Superchip, data sheet, 2023: 1979 with sparsity.
    (r"NVIDIA GH200 (480GB|120GB)", 989.5e12),
    # NVIDIA H200 Tensor Core GPU, data sheet, 2024: SXM 1979 and NVL 1671 with sparsity.
    (r"NVIDIA H200", 989.5e12),
    (r"NVIDIA H200 NVL", 835.5e12),
    # NVIDIA HGX B200, data sheet, 2025: 36 PFLOP/s with sparsity for eight.
    (r"NVIDIA B200", 2250e12),
    # NVIDIA GB200 NVL72, data sheet, 2024: 360 PFLOP/s with sparsity for 72.
    (r"NVIDIA GB200", 2500e12),
    # NVIDIA L40S, data sheet, 2023: 362.05.
    (r"NVIDIA L40S", 362.05e12),
    # NVIDIA L4 and L40, data sheets, 2023: 242 and 362.1 with sparsity.
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40", 181.05e12),
    # NVIDIA A10, A30 and A40, data sheets, 2021: 125, 165 and 149.7.
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    # NVIDIA A10G, data sheet for Amazon EC2 G5, 2022: 70.
    (r"NVIDIA A10G", 70e12),
    # NVIDIA Ampere GA102 architecture white paper, 2021, appendices: bf16 with fp32 accumulation,
    # RTX 3090 71, RTX A6000 154.8.
    (r"NVIDIA RTX A6000", 154.8e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    # NVIDIA Ada architecture white paper, 2023, appendix A: bf16 with fp32 accumulation, 165.2.
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    # AMD Instinct MI250X, data sheet, 2021: 383 for the card, which torch sees as two devices.
    (r"AMD Instinct MI250X( / MI250)?", 191.5e12),
    # AMD Instinct MI300X, data sheet, 2023, and MI325X, 2024: 1307.4.
    (r"AMD Instinct MI3(00|25)X", 1307.4e12),
)


def peak_flops_per_s(device_name: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s; None if unknown.

    Requires the exact name: a MIG slice, a laptop GPU or another variant has another peak.
    """
    peaks = (peak for pattern, peak in _PEAK_FLOPS if re.fullmatch(pattern, device_name))
    return next(peaks, None)
