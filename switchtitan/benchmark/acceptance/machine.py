"""The GPUs of this machine, and the versions that they run with.

python -m switchtitan.benchmark.acceptance.machine      prints them as JSON
"""

import importlib.metadata
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass

import torch

from switchtitan.observability.environment import cpu_name, describe_environment


@dataclass(frozen=True)
class Machine:
    """The visible GPUs, which are alike."""

    card: str
    """The name of the GPU, e.g. "NVIDIA H100 80GB HBM3"."""
    num_gpus: int
    memory_gib: float
    """Memory of one GPU."""
    facts: dict[str, str]
    """Versions and hardware, by what they describe."""

    @property
    def slug(self) -> str:
        """A name for files, e.g. "nvidia_h100_80gb_hbm3" or "8x_nvidia_h100_80gb_hbm3"."""
        card = re.sub(r"[^a-z0-9]+", "_", self.card.lower()).strip("_") or "gpu"
        return card if self.num_gpus == 1 else f"{self.num_gpus}x_{card}"


def find_machine() -> Machine | None:
    """Returns the visible GPUs; None if torch can use none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        torch.cuda.get_device_name(0),
        torch.cuda.device_count(),
        properties.total_memory / 2**30,
        _facts(f"{properties.major}.{properties.minor}"),
    )


def read_machine(text: str) -> Machine | None:
    """Reads the last line that this module prints."""
    found = json.loads(text.splitlines()[-1])
    return None if found is None else Machine(**found)


def _facts(capability: str) -> dict[str, str]:
    environment = describe_environment()
    return {
        "compute capability": capability,
        "driver": _driver() or "unknown",
        "torch": str(environment["torch"]),
        "CUDA of torch": torch.version.cuda or f"none (HIP {torch.version.hip})",
        "NCCL": _nccl() or "none",
        "flash-attn": _version("flash-attn") or "not installed",
        "CPU": f"{cpu_name()}, {environment['num_cpus']} cores",
        "switchtitan": f"{environment['switchtitan']}, commit {environment['commit']}",
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _nccl() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    machine = find_machine()
    print(json.dumps(None if machine is None else asdict(machine)))
