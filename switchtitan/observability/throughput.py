"""Training speed, MFU and peak memory."""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Throughput:
    """Measures tokens per second, model FLOP/s, model FLOP/s utilization (MFU) and the time left.

    MFU counts the FLOPs of full-rank training for every method, so that it compares methods by
    speed. (PaLM, arXiv 2204.02311, appendix B)

    Args:
        tokens_per_step: of the global batch, which `num_devices` share.
        flops_per_token: of forward and backward.
        peak_flops_per_s: of one device; None if unknown, then MFU is not reported.
        synchronize: waits until the device has done all queued work.
        start_step: steps done before this run, of `num_steps`.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        num_devices: int,
        peak_flops_per_s: float | None,
        num_steps: int,
        synchronize: Callable[[], None],
        start_step: int = 0,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token_and_device = flops_per_token / num_devices
        self._peak = peak_flops_per_s
        self._num_steps, self._step = num_steps, start_step
        self._synchronize = synchronize
        self._began_at = self._window_began_at = time.perf_counter()
        self._excluded_s = 0.0
        self._first: tuple[int, float] | None = None
        """Step and time of the first call of `measure`."""
        self._steady_steps, self._steady_s = 0, 0.0
        self._tokens_per_s = 0.0

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time inside (evaluation, saving) from the speed, not from the time left."""
        self._synchronize()  # what is inside may wait for steps that are queued
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
        self._tokens_per_s = num_steps * self._tokens_per_step / elapsed_s
        self._step, self._window_began_at, self._excluded_s = step, now, 0.0
        if self._first is None:
            self._first = (step, now)
            if step < self._num_steps:
                return {}
        else:
            self._steady_steps += num_steps
            self._steady_s += elapsed_s
        flops_per_s = self._tokens_per_s * self._flops_per_token_and_device
        values = {
            "throughput/tokens_per_s": self._tokens_per_s,
            "throughput/tflop_per_s_per_device": flops_per_s / 1e12,
            "throughput/eta_s": self._time_left_s(*self._first),
        }
        if self._peak is not None:
            values["throughput/mfu"] = flops_per_s / self._peak
        return values

    def _time_left_s(self, first_step: int, began_at: float) -> float:
        """At the mean speed since the first window, with what is excluded from the speed."""
        if self._step == self._num_steps:
            return 0.0
        s_per_step = (self._window_began_at - began_at) / (self._step - first_step)
        return (self._num_steps - self._step) * s_per_step

    @property
    def wall_time_s(self) -> float:
        """Seconds since this object was created."""
        return time.perf_counter() - self._began_at

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
    # Data sheets of NVIDIA: A100 2021; H100 2023 (SXM and NVL, with sparsity) and 2022 (PCIe);
    # GH200 2023; H200 2024; HGX B200 2025 (36 PFLOP/s with sparsity for 8 GPUs); GB200 NVL72 2024
    # (360 PFLOP/s with sparsity for 72). A800 and H800 differ in NVLink and fp64; H20 2023.
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe|NVIDIA A100-SXM-\d+GB", 312e12),
    (r"NVIDIA A800-SXM4-\d+GB|NVIDIA A800 80GB PCIe", 312e12),
    (r"NVIDIA H100 PCIe", 756.5e12),
    (r"NVIDIA (H100 80GB HBM3|H800|H200|GH200 (480GB|120GB))", 989.5e12),
    (r"NVIDIA (H100|H200) NVL", 835.5e12),
    (r"NVIDIA H20", 148e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA GB200", 2500e12),
    # Data sheets: L40S, L4 and L40 (with sparsity) 2023; A10, A30 and A40 2021; A10G, Amazon EC2
    # G5, 2022.
    (r"NVIDIA L40S", 362.05e12),
    (r"NVIDIA L40", 181.05e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA A10G", 70e12),
    # White papers with bf16 and fp32 accumulation: Ampere GA102 2021, Ada 2023.
    (r"NVIDIA RTX A6000", 154.8e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    # Data sheets of AMD: MI250X 2021, which torch sees as two devices; MI300X 2023, MI325X 2024.
    (r"AMD Instinct MI250X( / MI250)?", 191.5e12),
    (r"AMD Instinct MI3(00|25)X", 1307.4e12),
)


def peak_flops_per_s(device_name: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s; None if unknown.

    Requires the exact name: a MIG slice, a laptop GPU or another variant has another peak.
    """
    peaks = (peak for pattern, peak in _PEAK_FLOPS if re.fullmatch(pattern, device_name))
    return next(peaks, None)
