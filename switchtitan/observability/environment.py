"""The environment of a measurement: hardware, versions, threads and the commit."""

import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

import switchtitan
from switchtitan.cores import num_cores
from switchtitan.distributed.dtype import bf16_support
from switchtitan.distributed.world import device_name, device_type


def describe_environment() -> dict[str, str | int | None]:
    """Describes this process and its machine, for JSON."""
    device = torch.device(device_type())
    return {
        "device": cpu_name() if device.type == "cpu" else device_name(device),
        "bfloat16": bf16_support(device).evidence,
        "num_cpus": num_cores(),
        "num_threads": torch.get_num_threads(),
        **versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of torch and this package, for files.

    Without torch's build, such as "+cu130": the device is recorded with them.
    """
    torch_version = torch.__version__.partition("+")[0]
    return {"torch": torch_version, "switchtitan": switchtitan.__version__}


def cpu_name() -> str:
    """Returns the processor's model name (proc(5), cpuinfo), or its architecture if unknown."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if name := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return name[1]
    return platform.machine()


def commit() -> str | None:
    """Returns the commit of this code, with "-dirty" for local changes; None outside a checkout."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(switchtitan.__file__).parent
    if not (folder.parent / ".git").exists():  # installed in an environment of another repository
        return None
    try:
        found = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
