"""The cores of this process, and signals to it."""

import os
import signal
import sys
import time
import weakref

import pytest

from switchtitan.cores import OtherLoad, num_cores, set_thread_defaults
from switchtitan.errors import interrupt_on_sigterm


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param("0::/\n", {}, 8, id="no quota"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 8, id="unlimited"),
        pytest.param("0::/\n", {"cpu.max": "3200000 100000"}, 8, id="more than the affinity"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000"}, 2, id="rounded down"),
        pytest.param("0::/\n", {"cpu.max": "20000 100000"}, 1, id="less than one"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "2 1", "a/b/cpu.max": "5 1"}, 2, id="parent"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "6 1", "a/b/cpu.max": "5 1"}, 5, id="own"),
        pytest.param("0::/b\n", {"a/cpu.max": "2 1"}, 8, id="of another group"),
        pytest.param("1:cpu:/\n0::/b\n", {"b/cpu.max": "3 1"}, 3, id="with v1"),
        pytest.param("0::/host/x\n", {"cpu.max": "4 1"}, 4, id="the host's path"),
    ],
)
def test_cores_are_those_of_affinity_and_quota(eight_cores, tmp_path, own, files, expected):
    root, own_cgroups = tmp_path / "cgroup", tmp_path / "own"
    own_cgroups.write_text(own)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert num_cores(root, own_cgroups) == expected


def test_a_system_without_control_groups_has_its_affinity(eight_cores, tmp_path):
    assert num_cores(tmp_path / "missing", tmp_path / "missing") == 8


@pytest.mark.parametrize(
    ("environ", "cores_left", "expected"),
    [
        ({}, 8, {}),
        ({}, 3, {"OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "3"}),
        ({"LOCAL_WORLD_SIZE": "3"}, 8, {"OMP_NUM_THREADS": "2"}),
        ({"LOCAL_WORLD_SIZE": "9"}, 8, {"OMP_NUM_THREADS": "1"}),
        ({"LOCAL_WORLD_SIZE": ""}, 8, {}),
        ({"OMP_NUM_THREADS": "5", "RAYON_NUM_THREADS": "6"}, 3, {}),
    ],
)
def test_only_unset_variables_of_threads_get_a_share_of_the_cores(
    eight_cores, environ, cores_left, expected
):
    changed = dict(environ)
    set_thread_defaults(changed, cores_left)
    assert changed == environ | expected


def stat_lines(busy_s):
    """/proc/stat with user seconds by core, and idle seconds that do not count."""
    ticks = os.sysconf("SC_CLK_TCK")
    cores = [
        f"cpu{core} {round(seconds * ticks)} 0 0 9 9 0 0 0" for core, seconds in busy_s.items()
    ]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8", *cores, "intr 5"])


@pytest.mark.parametrize(
    ("busy_s", "own_s", "num_threads", "advised"),
    [
        pytest.param({0: 10.0, 1: 10.0, 2: 6.0}, 0, 8, 5, id="several busy cores"),
        pytest.param({0: 10.0, 1: 0.0}, 0, 7, None, id="enough cores are left"),
        pytest.param({0: 2.0, 1: 1.0}, 0, 8, None, id="hardly busy"),
        pytest.param({0: 10.0, 1: 10.0}, 0, 1, None, id="one thread"),
        pytest.param({8: 10.0, 9: 10.0}, 0, 8, None, id="cores outside the affinity"),
        pytest.param(dict.fromkeys(range(8), 10.0), 0, 8, 1, id="all busy"),
        pytest.param({0: 10.0, 1: 10.0}, 20, 8, None, id="own work"),
    ],
)
def test_threads_that_share_cores_with_other_processes_are_advised_against(
    eight_cores, tmp_path, monkeypatch, caplog, busy_s, own_s, num_threads, advised
):
    stat, began, own = tmp_path / "stat", time.monotonic(), os.times()
    stat.write_text(stat_lines(dict.fromkeys(busy_s, 0.0)))
    monkeypatch.setattr(time, "monotonic", lambda: began)
    monkeypatch.setattr(os, "times", lambda: own)
    load = OtherLoad(stat)
    stat.write_text(stat_lines(busy_s))
    monkeypatch.setattr(time, "monotonic", lambda: began + 10)
    used = os.times_result((own.user + own_s, *own[1:]))
    monkeypatch.setattr(os, "times", lambda: used)
    load.warn(num_threads, 8)
    assert caplog.text.count("OMP_NUM_THREADS") == (advised is not None)
    assert advised is None or f"OMP_NUM_THREADS={advised} " in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_in_a_callback_of_a_weakref_is_not_lost(monkeypatch, number):
    class Thing:
        pass

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under `nohup`
    things = [Thing()]
    reference = weakref.ref(things[0], lambda _: signal.raise_signal(number))

    def work():
        things.clear()
        time.sleep(30)

    interrupt_on_sigterm()
    try:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            work()
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert reference() is None
    assert interrupt.value.args == (number,)
