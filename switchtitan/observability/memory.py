"""Peak memory of this process."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used since the process began, in GiB.

    On an accelerator what torch's allocator handed out there; on a CPU the process's largest resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_bytes = (
        peak if sys.platform == "darwin" else peak * 1024
    )  # getrusage(2): KiB on Linux, bytes on macOS
    return num_bytes / 2**30
