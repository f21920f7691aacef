"""This process: its cores, threads and packages, and the progress bars that it shows."""

import os
import sys
import time
from collections.abc import Iterable, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROGRESS_DELAY_S = 3.0
"""Shorter work has no bar."""
_BUSY = (0, 1, 2, 5, 6)
"""Columns of /proc/stat: user, nice, system, irq, softirq; the others are idle and iowait."""


def num_cores(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")
) -> int:
    """Returns the number of cores that this process may use, at least 1.

    That is the number of cores in its affinity mask, or the CPU quota of its control group
    (cgroups(7), version 2, rounded down) if that is lower. `os.cpu_count` knows neither.
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
    """Sets variables of OpenMP and of tokenizers that are not set.

    Call it before torch is imported: GNU's OpenMP reads its variables when it is loaded.
    """
    num_ranks = int(environ.get("LOCAL_WORLD_SIZE") or 1)
    has_fewer = num_cores < _num_cores_by_affinity()
    # Otherwise torch's own default is better: it uses one thread on a core with two hyperthreads.
    if num_ranks > 1 or has_fewer:
        environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(num_cores, num_ranks)))
    if has_fewer:
        environ.setdefault("RAYON_NUM_THREADS", str(num_cores))


def threads_per_process(num_cores: int, num_processes: int) -> int:
    """Returns an equal share of the cores, at least 1."""
    return max(1, num_cores // num_processes)


class OtherLoad:
    """How busy other processes keep the cores of this one, from its creation on, by proc(5)."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._began_at, self._began_with = time.monotonic(), self._used_by_others_s()

    def warning(self, num_threads: int, num_cores: int) -> str | None:
        """Returns advice if threads must share a core with other processes; one slows down all."""
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


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    spec = find_spec(package)
    # A folder of this name in the working directory has no origin: wandb writes one.
    return spec is not None and spec.origin is not None


def progress_bar(
    description: str, items: Iterable[Any] | None = None, *, total: float | None, unit: str
) -> "tqdm[Any]":
    """Returns a bar on the first rank's standard error if that is a terminal; removed at its end.

    Args:
        items: iterating over the bar yields them and advances it; else `update` advances it.
        unit: of what is counted, e.g. `"tensors"`; "B" counts bytes.
    """
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        delay=PROGRESS_DELAY_S,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=os.environ.get("RANK", "0") != "0" or None,
    )
