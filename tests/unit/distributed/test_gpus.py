"""GPUs that torch cannot use are distinguished from machines without one."""

import re
from pathlib import Path

import pytest
import torch

from switchtitan.distributed.gpus import own_gpu, unusable_gpu
from switchtitan.distributed.world import device_type
from switchtitan.errors import EnvironmentMismatchError


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_an_nvidia_gpu_that_torch_cannot_use_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unusable_gpu(tmp_path, tmp_path) is None
    (tmp_path / "nvidiactl").touch()
    obstacle = unusable_gpu(tmp_path, tmp_path)
    assert obstacle is not None
    # The reason is torch's own.
    assert re.search(r"cannot use it \((Torch not compiled with CUDA|Found no NVIDIA)", obstacle)
    assert "CUDA_VISIBLE_DEVICES= to train on the CPU" in obstacle
    for value in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert unusable_gpu(tmp_path, tmp_path) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert unusable_gpu(tmp_path, tmp_path) is not None


@pytest.mark.parametrize(
    ("properties", "counts"),
    [
        ("cpu_cores_count 16\nsimd_count 0\n", False),  # a processor
        ("cpu_cores_count 16\nsimd_count 8\n", False),  # a laptop's, with graphics
        ("cpu_cores_count 0\nsimd_count 1216\n", True),  # a card
    ],
)
def test_an_amd_card_counts_and_a_laptops_graphics_do_not(
    tmp_path: Path, properties: str, counts: bool
) -> None:
    (tmp_path / "kfd" / "topology" / "nodes" / "0").mkdir(parents=True)
    (tmp_path / "kfd" / "topology" / "nodes" / "0" / "properties").write_text(properties)
    assert (unusable_gpu(tmp_path, tmp_path) is not None) == counts


@pytest.mark.parametrize(
    ("library", "counts"),
    [("libdxcore.so", False), ("libcuda.so", True), ("libcuda.so.1", True)],
)
def test_an_nvidia_gpu_under_wsl_counts_and_a_laptops_graphics_do_not(
    tmp_path: Path, library: str, counts: bool
) -> None:
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (libraries / library).touch()
    # Without the device, the libraries alone do not count.
    assert unusable_gpu(tmp_path, tmp_path, libraries) is None
    (tmp_path / "dxg").touch()
    assert (unusable_gpu(tmp_path, tmp_path, libraries) is not None) == counts


def test_a_run_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("switchtitan.distributed.world.unusable_gpu", lambda: "the driver is old")
    with pytest.raises(EnvironmentMismatchError, match="the driver is old"):
        device_type()
    monkeypatch.setattr("switchtitan.distributed.world.unusable_gpu", lambda: None)
    assert device_type() == "cpu"


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "is_torchrun", "expected"),
    [
        (8, 3, True, 3),
        (8, 3, False, 3),
        (1, 0, True, 0),
        (1, 3, False, 0),  # Slurm shows each task its own GPU
        (1, 1, True, None),  # two ranks of torchrun would share it
        (4, 4, False, None),
    ],
)
def test_a_rank_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
    num_gpus: int,
    local_rank: int,
    is_torchrun: bool,
    expected: int | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if is_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    if expected is None:
        with pytest.raises(EnvironmentMismatchError, match=f"local rank {local_rank} has no GPU"):
            own_gpu()
    else:
        assert own_gpu() == torch.device("cuda", expected)
