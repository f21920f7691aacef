"""Peak floating-point rates of known accelerators."""

import re

# FLOP/s of dense bf16 matrix operations with fp32 accumulation, per device as torch counts them, by a pattern
# that the whole of torch.cuda.get_device_name() must match. Rates that a data sheet states with 2:4 sparsity
# are halved.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 Tensor Core GPU, data sheet, 2021: 312 (all variants).
    (r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe|NVIDIA A100-SXM-\d+GB", 312e12),
    # NVIDIA H100 Tensor Core GPU, data sheet, 2023: SXM 1979 and NVL 1671 with sparsity; 2022: PCIe 1513.
    (r"NVIDIA H100 80GB HBM3", 989.5e12),
    (r"NVIDIA H100 PCIe", 756.5e12),
    (r"NVIDIA H100 NVL", 835.5e12),
    # NVIDIA H200 Tensor Core GPU, data sheet, 2024: SXM 1979 and NVL 1671 with sparsity.
    (r"NVIDIA H200", 989.5e12),
    (r"NVIDIA H200 NVL", 835.5e12),
    # NVIDIA HGX B200, data sheet, 2025: 36 PFLOP/s with sparsity for eight.
    (r"NVIDIA B200", 2250e12),
    # NVIDIA L40S, data sheet, 2023: 362.05.
    (r"NVIDIA L40S", 362.05e12),
    # NVIDIA A10G, data sheet for Amazon EC2 G5, 2022: 70.
    (r"NVIDIA A10G", 70e12),
    # NVIDIA V100, data sheet, 2020: fp16 (it has no bf16 units), SXM2 125, PCIe 112.
    (r"(Tesla|NVIDIA) V100-SXM[23]-\d+GB(-LS)?", 125e12),
    (r"(Tesla|NVIDIA) V100-PCIE-\d+GB", 112e12),
    # NVIDIA Ampere GA102 architecture white paper, 2021, appendix A: bf16 with fp32 accumulation, 71.
    (r"NVIDIA GeForce RTX 3090", 71e12),
    # NVIDIA Ada architecture white paper, 2023, appendix A: bf16 with fp32 accumulation, 165.2.
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    # AMD Instinct MI250X, data sheet, 2021: 383 for the card, which torch sees as two devices.
    (r"AMD Instinct MI250X( / MI250)?", 191.5e12),
    # AMD Instinct MI300X, data sheet, 2023: 1307.4.
    (r"AMD Instinct MI300X", 1307.4e12),
)


def peak_flops_per_s(device_name: str) -> float | None:
    """Dense bf16 peak of the device called `device_name` (fp16 where it lacks bf16), in FLOP/s; None if
    unknown.

    Only exact names count: a slice of a GPU, a laptop's or another variant has another peak.
    """
    for pattern, peak in _PEAK_FLOPS:
        if re.fullmatch(pattern, device_name):
            return peak
    return None
