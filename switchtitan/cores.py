"""The cores that this process may use, and its threads on them."""

import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path


def num_cores(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")
) -> int:
    """Returns the number of cores that this process may use, at least 1.

    That is the number of cores in its affinity mask, or the CPU quota of its control group
    (cgroups(7), version 2, rounded down) if that is lower. `os.cpu_count` knows neither.
    """
    fewest, group = float(_num_cores_by_affinity()), ""
    with suppress(OSError):  # not Linux
        group = own_cgroup.read_text(encoding="utf-8").strip().rpartition("::")[2].lstrip("/")
    # A container may see its own group as the root, under another path.
    for folder in (cgroup_root / group, *(cgroup_root / group).parents):
        with suppress(OSError):
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            if quota != "max":  # microseconds
                fewest = min(fewest, int(quota) / int(period))
    return max(1, int(fewest))


def set_thread_defaults(environ: MutableMapping[str, str], num_cores: int) -> None:
    """Sets variables of OpenMP and of tokenizers that are not set. Call it before `import torch`:
    GNU's OpenMP reads its variables when it is loaded."""
    num_ranks = int(environ.get("LOCAL_WORLD_SIZE") or 1)
    has_fewer = num_cores < _num_cores_by_affinity()
    # Otherwise torch's own default is better: it uses one thread on a core with two hyperthreads.
    if num_ranks > 1 or has_fewer:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    if has_fewer:
        environ.setdefault("RAYON_NUM_THREADS", str(num_cores))


def _num_cores_by_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
