import pytest

from switchtitan.observability import peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA A10", 125),
        ("NVIDIA A30", 165),
        ("NVIDIA A40", 149.7),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI325X", 1307.4),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name, teraflops):
    assert peak_flops_per_s(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "Tesla V100-SXM2-16GB",  # multiplies no bf16
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A30 MIG 1g.6gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_other_devices_have_no_known_peak(name):
    assert peak_flops_per_s(name) is None
