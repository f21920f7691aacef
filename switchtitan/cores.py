"""How many cores this process may use, and the defaults of thread libraries that follow from it."""

import os
import time
from collections.abc import MutableMapping
from pathlib import Path


def num_cores(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")
) -> int:
    """Returns the number of cores that this process may use, at least 1.

    That is the number of cores in its affinity mask, or the CPU quota of its control group
    (cgroups v2, rounded down) if that is lower. `os.cpu_count` knows neither.

    Args:
        cgroup_root: where control groups are mounted.
        own_cgroup: the control group of this process, see cgroups(7).
    """
    fewest = float(_num_cores_by_affinity())
    try:
        group = own_cgroup.read_text(encoding="utf-8").strip().rpartition("::")[2].lstrip("/")
    except OSError:  # not Linux
        return int(fewest)
    # A container may see its own group as the root, under another path.
    for folder in (cgroup_root / group, *(cgroup_root / group).parents):
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        except OSError:
            continue
        if quota != "max":  # microseconds
            fewest = min(fewest, int(quota) / int(period))
    return max(1, int(fewest))


def set_thread_defaults(environ: MutableMapping[str, str], num_cores: int) -> None:
    """Sets environment variables of OpenMP and of tokenizers; variables that are set stay.

    Call it before torch is imported, because GNU's OpenMP reads its variables when it is loaded.
    """
    num_ranks = int(environ.get("LOCAL_WORLD_SIZE") or 1)
    # Otherwise torch's own default is better: it uses one thread on a core with two hyperthreads.
    if num_ranks > 1 or num_cores < _num_cores_by_affinity():
        environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(num_cores, num_ranks)))
    if num_cores < _num_cores_by_affinity():
        environ.setdefault("RAYON_NUM_THREADS", str(num_cores))


def threads_per_process(num_cores: int, num_processes: int) -> int:
    """Returns an equal share of the cores, at least 1."""
    return max(1, num_cores // num_processes)


class OtherLoad:
    """How busy other processes keep the cores of this one, from its creation on.

    Args:
        stat: see proc(5). Without such a file the load counts as zero.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._began_at, self._began_with = time.monotonic(), self._used_by_others_s()

    def warning(self, num_threads: int, num_cores: int) -> str | None:
        """Returns advice if `num_threads` threads must share a core with other processes.

        A parallel operation ends with its slowest thread, so that one busy core slows down all.
        """
        used_s = self._used_by_others_s() - self._began_with
        busy = max(0.0, used_s / max(time.monotonic() - self._began_at, 1e-3))
        if num_threads == 1 or num_threads + busy < num_cores + 0.5:
            return None
        return (
            f"other processes keep about {busy:.1f} of {num_cores} cores busy, and all threads "
            f"wait for the slowest: OMP_NUM_THREADS={max(1, round(num_cores - busy))} is probably "
            f"faster than {num_threads} threads; to change it, stop this run and start it again "
            "with that variable set"
        )

    def _used_by_others_s(self) -> float:
        """Busy seconds of the cores of the affinity mask, without those of this process and of its
        ended children."""
        try:
            lines = self._stat.read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0.0
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = (line.split() for line in lines if line.startswith("cpu"))
        # user, nice, system, idle, iowait, irq, softirq
        ticks = sum(
            int(values[place]) for name, *values in rows if name in names for place in _BUSY
        )
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


_BUSY = (0, 1, 2, 5, 6)


def _num_cores_by_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
