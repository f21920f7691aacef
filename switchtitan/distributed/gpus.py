"""Which GPU a rank uses, and GPUs that torch cannot use."""

import os
from pathlib import Path

import torch

from switchtitan.distributed.launcher import local_rank_from_launcher
from switchtitan.errors import EnvironmentMismatchError

_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_NO_DEVICES = {"", "-1", "NoDevFiles"}
"""Values of these variables that hide all GPUs. Slurm sets the last one for jobs without GPUs."""


def own_gpu() -> torch.device:
    """Returns this rank's GPU: the one with its local rank, or the only one that it sees.

    Raises:
        EnvironmentMismatchError: if there is none.
    """
    local_rank, num_gpus = local_rank_from_launcher(), torch.cuda.device_count()
    # Slurm can show each task a GPU of its own. Under torchrun all local ranks see the same GPUs.
    if num_gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise EnvironmentMismatchError(
            f"local rank {local_rank} has no GPU: {num_gpus} are visible on this machine; "
            f"set NGPU to {num_gpus} at most"
        )
    return torch.device("cuda", local_rank)


def unusable_gpu(
    devices: Path = Path("/dev"),
    topology: Path = Path("/sys/class/kfd"),
    wsl_libraries: Path = Path("/usr/lib/wsl/lib"),
) -> str | None:
    """Returns why torch cannot use this machine's GPU and what to do; None if there is none.

    Call if torch sees no GPU. GPUs that the environment hides do not count.

    Args:
        devices: the folder of device files.
        topology: the folder in which the AMD driver describes the machine's processors.
        wsl_libraries: the folder in which Windows gives its drivers' libraries to WSL2.
    """
    if any(os.environ.get(name) in _NO_DEVICES for name in _VISIBLE_DEVICES):
        return None
    if not (
        (devices / "nvidiactl").exists()
        or _has_amd_gpu(devices, topology)
        or _has_nvidia_gpu_under_wsl(devices, wsl_libraries)
    ):
        return None
    return (
        f"this machine has a GPU, but torch {torch.__version__} cannot use it ({_reason()}); fix "
        "the driver, or install a torch that fits it (pytorch.org/get-started), or set "
        "CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def _has_amd_gpu(devices: Path, topology: Path) -> bool:
    """Whether the machine has an AMD GPU with memory of its own, unlike a laptop's processor."""
    if not (devices / "kfd").exists():
        return False
    for file in topology.glob("kfd/topology/nodes/*/properties"):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        counts = {name: value for name, _, value in (line.partition(" ") for line in lines)}
        if counts.get("simd_count", "0") != "0" and counts.get("cpu_cores_count", "0") == "0":
            return True
    return False


def _has_nvidia_gpu_under_wsl(devices: Path, libraries: Path) -> bool:
    """Whether Windows gives an NVIDIA GPU to WSL2, where all GPUs share one device file.

    A laptop's graphics have the device file too, but only NVIDIA's driver adds libcuda.
    """
    return (devices / "dxg").exists() and any(libraries.glob("libcuda.so*"))


def _reason() -> str:
    """Returns torch's first line about why it cannot use CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].strip().rstrip(".") or type(error).__name__
    return "torch.cuda.is_available() is false"
