"""What data sheets say of GPUs. Imports no torch: `benchmark.gpu.device` needs it before torch."""

import re
from typing import NamedTuple


class Architecture(NamedTuple):
    """What torch.compile asks of a card: the first one of `CARDS` with this architecture."""

    num_processors: int
    threads_per_processor: int
    shared_kib: int
    """The most shared memory of a block."""


# CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"; processors:
# white papers of A100 (2020), H100 (2022) and Ada (2023).
ARCHS = {
    "sm_80": Architecture(108, 2048, 163),
    "sm_89": Architecture(128, 1536, 99),
    "sm_90": Architecture(132, 2048, 227),
}


class Card(NamedTuple):
    """A card with bounds."""

    arch: str
    device_name: str
    bandwidth: float
    """Bytes per second of device memory."""
    float32_flops_per_s: float
    """Without TF32."""

    def flops_per_s(self, dtype: str) -> float:
        """Returns the dense peak of products in "float32", or else of those in bf16."""
        peak = peak_flops_per_s(self.device_name)
        assert peak is not None
        return self.float32_flops_per_s if dtype == "float32" else peak


# Data sheets: A100 2021, H100 2023, H200 2024, L4 2023; Ada white paper 2023, appendix A.
CARDS = {
    "A100 80GB SXM": Card("sm_80", "NVIDIA A100-SXM4-80GB", 2.039e12, 19.5e12),
    "H100 SXM": Card("sm_90", "NVIDIA H100 80GB HBM3", 3.35e12, 67e12),
    "H200": Card("sm_90", "NVIDIA H200", 4.8e12, 67e12),
    "RTX 4090": Card("sm_89", "NVIDIA GeForce RTX 4090", 1.008e12, 82.6e12),
    "L4": Card("sm_89", "NVIDIA L4", 0.3e12, 30.3e12),
}


def card_of(arch: str) -> Card:
    """Returns the first card of an architecture."""
    return next(card for card in CARDS.values() if card.arch == arch)


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
    return next((peak for name, peak in _PEAK_FLOPS if re.fullmatch(name, device_name)), None)
