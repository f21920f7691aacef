"""The cores that this process may use, its threads on them, and how busy others keep them."""

import logging
import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_BUSY = (0, 1, 2, 5, 6)
"""Columns of /proc/stat: user, nice, system, irq, softirq; the others are idle and iowait."""


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


class OtherLoad:
    """How busy other processes keep the cores of this one, from its creation on, by proc(5)."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._began_at, self._began_with = time.monotonic(), self._used_by_others_s()

    def warn(self, num_threads: int, num_cores: int) -> None:
        """Warns if threads must share a core with other processes; one slows down all."""
        used_s = self._used_by_others_s() - self._began_with
        busy = max(0.0, used_s / max(time.monotonic() - self._began_at, 1e-3))
        if num_threads > 1 and num_threads + busy >= num_cores + 0.5:
            logger.warning(
                "other processes keep about %.1f of %d cores busy, and all threads wait for the "
                "slowest: OMP_NUM_THREADS=%d is probably faster than %d threads; to change it, "
                "stop this run and start it again with that variable set",
                busy,
                num_cores,
                max(1, round(num_cores - busy)),
                num_threads,
            )

    def _used_by_others_s(self) -> float:
        """Busy seconds of the cores of the affinity mask, without this process and its children."""
        try:
            rows = map(str.split, self._stat.read_text(encoding="utf-8").splitlines())
        except OSError:  # not Linux
            return 0.0
        own_cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = [int(row[1 + column]) for row in rows if row[0] in own_cores for column in _BUSY]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _num_cores_by_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
