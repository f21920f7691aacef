"""How many cores this process may use, and the defaults of thread libraries that follow from it."""

import os
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path


def num_cores(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroups: Path = Path("/proc/self/cgroup")
) -> int:
    """Returns the number of cores that this process may use, at least 1.

    That is the number of cores in its affinity mask, or the CPU quota of its control group (cgroups
    v1 and v2, rounded down) if that is lower. `os.cpu_count` knows neither.

    Args:
        cgroup_root: where control groups are mounted.
        own_cgroups: the control groups of this process, see cgroups(7).
    """
    quota = min(_quotas(cgroup_root, own_cgroups), default=float("inf"))
    return max(1, int(min(_num_cores_by_affinity(), quota)))


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
        self._began_at = time.monotonic()
        self._began_with = self._busy_s() - _own_s()

    def num_busy_cores(self) -> float:
        """Returns how many cores of the affinity mask other processes have kept busy on average."""
        used_s = self._busy_s() - _own_s() - self._began_with
        return max(0.0, used_s / max(time.monotonic() - self._began_at, 1e-3))

    def warning(self, num_threads: int, num_cores: int) -> str | None:
        """Returns advice if `num_threads` threads must share a core with other processes.

        A parallel operation ends with its slowest thread, so that one busy core slows down all.
        """
        busy = self.num_busy_cores()
        if num_threads == 1 or num_threads + busy < num_cores + 0.5:
            return None
        return (
            f"other processes keep about {busy:.1f} of {num_cores} cores busy, and all threads "
            f"wait for the slowest: OMP_NUM_THREADS={max(1, round(num_cores - busy))} is probably "
            f"faster than {num_threads} threads; to change it, stop this run and start it again "
            "with that variable set"
        )

    def _busy_s(self) -> float:
        """Busy seconds of the cores of the affinity mask, since the system started."""
        try:
            lines = self._stat.read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0.0
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = 0
        for name, *values in (line.split() for line in lines if line.startswith("cpu")):
            if name in names:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, values[:7])
                ticks += user + nice + system + irq + softirq
        return ticks / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Processor seconds of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _num_cores_by_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _quotas(cgroup_root: Path, own_cgroups: Path) -> Iterator[float]:
    """Yields the quotas of this process's control groups and of those above them, in cores."""
    try:
        lines = own_cgroups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has one hierarchy and no controllers here; version 1 one folder for each.
        mounts = [cgroup_root / controllers, cgroup_root / "cpu"] if controllers else [cgroup_root]
        for mount in mounts:
            # A container may see its own group as the root, under another path.
            for folder in [mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents]:
                if folder == mount.parent:
                    break
                yield from _quota_v1(folder) if controllers else _quota_v2(folder)


def _quota_v2(folder: Path) -> Iterator[float]:
    """`cpu.max`: "QUOTA PERIOD" in microseconds; "max" means none."""
    words = _words(folder / "cpu.max")
    if len(words) == 2 and words[0] != "max":
        yield int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> Iterator[float]:
    """`cpu.cfs_quota_us` and `cpu.cfs_period_us`; a quota of -1 means none."""
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        yield int(quota[0]) / int(period[0])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
