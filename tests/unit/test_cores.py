import os
import subprocess
import sys
from pathlib import Path

import pytest

from switchtitan import cores
from switchtitan.cores import OtherLoad, num_cores, set_thread_defaults, threads_per_process


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param("0::/\n", {}, 8, id="no quota"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 8, id="v2, unlimited"),
        pytest.param("0::/\n", {"cpu.max": "300000 100000"}, 3, id="v2, in a container"),
        pytest.param("0::/\n", {"cpu.max": "3200000 100000"}, 8, id="v2, more than the affinity"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000"}, 2, id="v2, rounded down"),
        pytest.param("0::/\n", {"cpu.max": "20000 100000"}, 1, id="v2, less than one"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "2 1", "a/b/cpu.max": "5 1"}, 2, id="v2, parent"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "6 1", "a/b/cpu.max": "5 1"}, 5, id="v2, own"),
        pytest.param("0::/b\n", {"a/cpu.max": "2 1"}, 8, id="v2, of another group"),
        pytest.param("0::/host/x\n", {"cpu.max": "4 1"}, 4, id="v2, the host's path"),
        pytest.param(
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150", "cpu,cpuacct/a/cpu.cfs_period_us": "50"},
            3,
            id="v1",
        ),
        pytest.param(
            "4:cpuset,cpu:/a\n",
            {"cpu/cpu.cfs_quota_us": "400", "cpu/cpu.cfs_period_us": "100"},
            4,
            id="v1, linked and in a container",
        ),
        pytest.param(
            "4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "9"}, 8, id="-1"
        ),
        pytest.param(
            "4:cpuset:/\n",
            {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"},
            8,
            id="v1, another controller",
        ),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    tmp_path: Path, own: str, files: dict[str, str], expected: int
) -> None:
    root, own_cgroups = tmp_path / "cgroup", tmp_path / "own"
    own_cgroups.write_text(own)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert num_cores(root, own_cgroups) == expected


def test_a_system_without_control_groups_has_its_affinity(tmp_path: Path) -> None:
    assert num_cores(tmp_path / "missing", tmp_path / "missing") == 8


@pytest.mark.parametrize(
    ("environ", "cores_left", "expected"),
    [
        ({}, 8, set()),
        ({}, 3, {"OMP_NUM_THREADS", "RAYON_NUM_THREADS"}),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, {"OMP_NUM_THREADS"}),
        ({"LOCAL_WORLD_SIZE": ""}, 8, set()),
        ({"OMP_NUM_THREADS": "5", "RAYON_NUM_THREADS": "6"}, 3, set()),
    ],
)
def test_only_unset_variables_get_a_default(
    environ: dict[str, str], cores_left: int, expected: set[str]
) -> None:
    changed = dict(environ)
    set_thread_defaults(changed, cores_left)
    assert changed.items() >= environ.items()
    assert changed.keys() - environ.keys() == expected


def test_ranks_share_the_cores() -> None:
    assert [threads_per_process(8, ranks) for ranks in (1, 3, 8, 9)] == [8, 2, 1, 1]
    environ = {"LOCAL_WORLD_SIZE": "3"}
    set_thread_defaults(environ, 8)
    assert environ["OMP_NUM_THREADS"] == "2"


def test_commands_set_the_defaults_before_torch_is_imported() -> None:
    program = "import sys, switchtitan.cli.main; print('torch' in sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output == "False\n", "GNU's OpenMP would read its variables too early"


def stat_lines(busy_s: dict[int, float]) -> str:
    """/proc/stat with user seconds by core, and idle seconds that do not count."""
    ticks = os.sysconf("SC_CLK_TCK")
    cores = [
        f"cpu{core} {round(seconds * ticks)} 0 0 9 9 0 0 0" for core, seconds in busy_s.items()
    ]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8", *cores, "intr 5"])


@pytest.mark.parametrize(
    ("busy_s", "num_threads", "advised"),
    [
        pytest.param({0: 10.0, 1: 0.0}, 8, 7, id="one busy core"),
        pytest.param({0: 10.0, 1: 10.0, 2: 6.0}, 8, 5, id="several"),
        pytest.param({0: 10.0, 1: 0.0}, 7, None, id="enough cores are left"),
        pytest.param({0: 2.0, 1: 1.0}, 8, None, id="hardly busy"),
        pytest.param({0: 10.0, 1: 10.0}, 1, None, id="one thread"),
        pytest.param({8: 10.0, 9: 10.0}, 8, None, id="cores outside the affinity"),
        pytest.param(dict.fromkeys(range(8), 10.0), 8, 1, id="all busy"),
    ],
)
def test_threads_that_share_cores_with_other_processes_are_advised_against(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    busy_s: dict[int, float],
    num_threads: int,
    advised: int | None,
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(stat_lines(dict.fromkeys(busy_s, 0.0)))
    now = [100.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: now[0])
    load = OtherLoad(stat)
    now[0] += 10
    stat.write_text(stat_lines(busy_s))
    warning = load.warning(num_threads, 8)
    assert (warning is None) == (advised is None)
    assert advised is None or f"OMP_NUM_THREADS={advised} is" in str(warning)


def test_own_work_is_not_other_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text(stat_lines({0: 0.0}))
    now, own = [100.0], [5.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cores, "_own_s", lambda: own[0])
    load = OtherLoad(stat)
    now[0], own[0] = 110.0, 14.0
    stat.write_text(stat_lines({0: 9.5}))
    assert load.num_busy_cores() == pytest.approx(0.05)
    assert OtherLoad(tmp_path / "missing").num_busy_cores() == 0
