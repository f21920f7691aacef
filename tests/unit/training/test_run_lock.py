"""One process at a time owns a run's folder, which can be written; one that died keeps nothing.

Real processes are in tests/faults/test_processes.py.
"""

import errno
import fcntl
import json
import os
import random
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.checkpoints import refused
from support.locks import (
    LEASE_S,
    hide_proc,
    hold_kernel_lock,
    refuse_kernel_locks,
    shorten_waits,
    write_owner,
)
from support.tiny import tiny_config

from switchtitan.cli import train
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError
from switchtitan.training.lock_owner import Owner, may_be_alive, this_process
from switchtitan.training.output_folder import check_output_dir, check_writable, create_folder
from switchtitan.training.run_lock import LOCK_FILE, lock_output_dir

HOST = socket.gethostname()
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def world():
    return start_world(ParallelismConfig())


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for variable in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def requeued(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


@pytest.fixture
def output_dir(tmp_path):
    return tmp_path / "outputs" / "run"


def owner_of(output_dir):
    return json.loads((output_dir / LOCK_FILE).read_text())


def check_refused(output_dir, world, *parts):
    """Owning the folder is refused by a message with these parts, and changes no file."""
    before = (output_dir / LOCK_FILE).read_bytes()
    with (
        refused("[job] output_dir", *parts, error=ConfigError),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert (output_dir / LOCK_FILE).read_bytes() == before
    assert {file.name for file in output_dir.iterdir()} == {LOCK_FILE}


# With kernel locks.


def test_the_owner_is_named_while_it_runs_and_leaves_nothing(output_dir, world):
    with lock_output_dir(output_dir, world):
        assert owner_of(output_dir)["pid"] == os.getpid()
    assert not output_dir.parent.exists()


def test_a_process_of_this_host_is_respected_at_once(output_dir, world, monkeypatch, caplog):
    caplog.set_level("INFO", "switchtitan")
    write_owner(output_dir)
    hold_kernel_lock(monkeypatch)
    check_refused(output_dir, world, f"process {os.getpid()} on {HOST}")
    assert caplog.messages == [], "waits"


def test_a_file_without_its_kernel_lock_is_of_a_killed_process(output_dir, world):
    write_owner(output_dir, has_kernel_lock=True)
    with lock_output_dir(output_dir, world):
        assert owner_of(output_dir)["pid"] == os.getpid()
    assert not (output_dir / LOCK_FILE).exists()


def test_the_lock_of_another_host_is_waited_for(output_dir, world, monkeypatch, caplog):
    caplog.set_level("INFO", "switchtitan")
    shorten_waits(monkeypatch)
    write_owner(output_dir, host="elsewhere", has_kernel_lock=True)
    hold_kernel_lock(monkeypatch, num_tries=3)
    with lock_output_dir(output_dir, world):
        assert owner_of(output_dir)["pid"] == os.getpid()
    assert caplog.messages == ["waiting for the lock of elsewhere"]


@pytest.mark.parametrize("values", [{"host": "elsewhere"}, {"boot_id": "of a clone"}])
def test_a_lock_that_another_machine_keeps_is_respected(
    output_dir, world, monkeypatch, caplog, values
):
    caplog.set_level("INFO", "switchtitan")
    shorten_waits(monkeypatch)
    write_owner(output_dir, **values)
    hold_kernel_lock(monkeypatch)
    host, started = values.get("host", HOST), time.monotonic()
    check_refused(output_dir, world, f"process {os.getpid()} on {host}", f"delete {output_dir}")
    assert time.monotonic() - started >= LEASE_S
    assert caplog.messages == [f"waiting for the lock of {host}"]


def test_an_owner_that_has_not_replaced_the_name_of_a_killed_one_is_waited_for(
    output_dir, world, monkeypatch
):
    def name_owner(number):
        if number > 1:
            write_owner(output_dir, since="2026-01-02")

    write_owner(output_dir, start_ticks=1)
    hold_kernel_lock(monkeypatch, at_try=name_owner)
    with (
        refused(f"process {os.getpid()} on {HOST}, started 2026-01-02", error=ConfigError),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert owner_of(output_dir)["since"] == "2026-01-02"


def test_a_training_run_says_that_it_waits_for_a_lock(tmp_path, monkeypatch, capsys):
    config = tiny_config(tmp_path, "lora")
    shorten_waits(monkeypatch)
    write_owner(config.job.output_dir, host="elsewhere")
    hold_kernel_lock(monkeypatch)
    (file,) = tmp_path.glob("*.toml")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--config", str(file)])
    said = capsys.readouterr()
    assert said.out == "waiting for the lock of elsewhere\n"
    assert "[job] output_dir" in said.err


@pytest.fixture(params=["with locks", "without locks"])
def with_or_without_locks(request, monkeypatch):
    if request.param == "without locks":
        monkeypatch.setattr(fcntl, "lockf", refuse_kernel_locks)


WRITES = [("with locks", function) for function in ("open", "ftruncate", "pwrite", "fsync")]
WRITES += [("without locks", function) for function in ("fsync", "link")]


@pytest.mark.parametrize(
    ("with_or_without_locks", "function"), WRITES, indirect=["with_or_without_locks"]
)
def test_a_disk_without_space_is_an_error_of_the_user(
    output_dir, world, with_or_without_locks, monkeypatch, function
):
    original = getattr(os, function)

    def fail(target, *args):
        if function == "open" and not str(target).endswith(LOCK_FILE):
            return original(target, *args)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as planted:
        planted.setattr(os, function, fail)
        with (
            refused("[job] output_dir", "Disk quota exceeded", error=ConfigError),
            lock_output_dir(output_dir, world),
        ):
            pass
    assert not output_dir.parent.exists()
    with lock_output_dir(output_dir, world):
        pass


def test_the_user_of_a_lock_that_cannot_be_opened_is_named(output_dir, world, monkeypatch):
    write_owner(output_dir)
    user, original = (output_dir / LOCK_FILE).owner(), os.open

    def refuse(path, flags, *args):
        if str(path).endswith(LOCK_FILE) and not flags & os.O_EXCL:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    check_refused(output_dir, world, LOCK_FILE, f"user {user}", "Permission denied")


@pytest.mark.parametrize("target", ["missing", "notes.txt"])
def test_a_link_in_place_of_the_lock_is_refused_and_not_followed(output_dir, world, target):
    output_dir.mkdir(parents=True)
    (output_dir / "notes.txt").write_text("notes")
    (output_dir / LOCK_FILE).symlink_to(target)
    with refused(LOCK_FILE, "link", error=ConfigError), lock_output_dir(output_dir, world):
        pass
    assert (output_dir / "notes.txt").read_text() == "notes"
    assert not (output_dir / "missing").exists()


# Without kernel locks.


@pytest.mark.parametrize(
    "values", [{}, {"boot_id": "other", "start_ticks": 1}, {"host": "elsewhere"}]
)
def test_an_owner_that_may_live_is_respected(output_dir, world, with_or_without_locks, values):
    # With locks: another node may see the same file system without.
    write_owner(output_dir, **values)
    host = values.get("host", HOST)
    check_refused(output_dir, world, f"process {os.getpid()} on {host}", f"delete {output_dir}")


@pytest.mark.parametrize("with_or_without_locks", ["without locks"], indirect=True)
def test_the_file_of_a_process_that_has_ended_is_taken_over(
    output_dir, world, with_or_without_locks, requeued
):
    write_owner(output_dir, host="elsewhere", slurm_job="71", slurm_restarts=0)
    with lock_output_dir(output_dir, world):
        assert (owner_of(output_dir)["pid"], owner_of(output_dir)["slurm_restarts"]) == (
            os.getpid(),
            1,
        )
        others = write_owner(output_dir, host="elsewhere")
    assert (output_dir / LOCK_FILE).read_bytes() == others, "deleted the file of a new owner"


@pytest.mark.parametrize("with_or_without_locks", ["without locks"], indirect=True)
def test_an_unknown_owner_is_respected_and_an_empty_file_is_deleted_after_some_time(
    output_dir, world, with_or_without_locks, monkeypatch
):
    shorten_waits(monkeypatch)
    output_dir.mkdir(parents=True)
    (output_dir / LOCK_FILE).write_text("of an unknown kind")
    check_refused(output_dir, world, f"delete {output_dir}")
    (output_dir / LOCK_FILE).write_text("")
    with lock_output_dir(output_dir, world):
        assert owner_of(output_dir)["pid"] == os.getpid()


# Whether an owner may still run.


@pytest.fixture
def own():
    return this_process(has_kernel_lock=False)


@needs_proc
def test_of_this_host_only_a_running_process_is_alive(own):
    assert may_be_alive(own, own)
    assert not may_be_alive(own.model_copy(update={"pid": 2**22 + 1}), own)  # above all
    assert not may_be_alive(own.model_copy(update={"start_ticks": 1}), own)  # used again
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < own.start_ticks <= uptime_s * os.sysconf("SC_CLK_TCK")


@needs_proc
def test_a_process_that_its_parent_has_not_waited_for_has_ended(own):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not may_be_alive(own.model_copy(update={"pid": child, "start_ticks": None}), own)
    os.waitpid(child, 0)


@needs_proc
@pytest.mark.parametrize("where", [{"boot_id": "other"}, {"pid_namespace": "pid:[1]"}])
def test_a_process_of_another_boot_or_container_may_be_alive(own, monkeypatch, where):
    owner = own.model_copy(update={"start_ticks": 1, "slurm_job": "71", **where})
    assert may_be_alive(owner, own)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not may_be_alive(owner, this_process(has_kernel_lock=False))


def test_without_proc_a_process_id_counts(own, monkeypatch):
    hide_proc(monkeypatch)
    without = this_process(has_kernel_lock=False)
    assert may_be_alive(own, without)
    assert may_be_alive(without, without)


def test_an_owner_of_an_older_version_may_be_alive(requeued):
    for host in (HOST, "elsewhere"):
        written = {"host": host, "pid": os.getpid(), "since": "2026-01-02", "job": "71"}
        assert may_be_alive(Owner.model_validate(written), this_process(has_kernel_lock=False))


@pytest.mark.parametrize(
    ("of_owner", "of_job", "has_ended"),
    [
        ({"slurm_job": "71"}, ("71", "1"), True),
        # Slurm's second step of the same job.
        ({"slurm_job": "71"}, ("71", "0"), False),
        ({"slurm_job": "71", "slurm_restarts": 1}, ("71", "1"), False),
        ({"slurm_job": "71"}, ("72", "1"), False),
        ({}, ("71", "1"), False),
        ({}, ("", "1"), False),
        ({"slurm_job": "71", "host": HOST}, ("71", "1"), False),
    ],
)
def test_on_another_host_only_a_requeued_job_has_ended(
    own, monkeypatch, of_owner, of_job, has_ended
):
    owner = own.model_copy(update={"host": "elsewhere", **of_owner})
    for variable, value in zip(("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), of_job, strict=True):
        monkeypatch.setenv(variable, value)
    assert may_be_alive(owner, this_process(has_kernel_lock=False)) is not has_ended


# Whether a folder can be written.


def test_a_writable_folder_stays_as_it_was(tmp_path, world):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "kept" / "b"):
        check_output_dir(folder, world)
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


@pytest.mark.parametrize("function", ["touch", "mkdir"])
def test_a_write_that_fails_despite_permissions_names_the_key(
    tmp_path, world, monkeypatch, function
):
    def fail(path, *args, **keys):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, function, fail)
    with refused("[job] output_dir", "No space left on device", error=ConfigError):
        check_output_dir(tmp_path / "a" / "b", world)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_deleted_once", [True, False], ids=["once", "each time"])
def test_a_folder_that_another_process_deletes_meanwhile_is_created_again(
    tmp_path, world, monkeypatch, is_deleted_once
):
    original, deleted = Path.mkdir, []

    def delete_the_parent_first(path, *args, **keys):
        if path.parent == tmp_path / "a" and not (is_deleted_once and deleted):
            (tmp_path / "a").rmdir()
            deleted.append(path)
        original(path, *args, **keys)

    monkeypatch.setattr(Path, "mkdir", delete_the_parent_first)
    if is_deleted_once:
        check_output_dir(tmp_path / "a" / "b", world)
        assert deleted
    else:
        with refused("No such file or directory", error=ConfigError):
            check_output_dir(tmp_path / "a" / "b", world)
    assert not list(tmp_path.iterdir())


def test_folders_that_another_thread_creates_and_deletes_are_no_error(tmp_path):
    has_ended = threading.Event()

    def create_and_delete():
        choose = random.Random(0)
        while not has_ended.is_set():
            for change in (Path.mkdir, Path.rmdir):
                with suppress(OSError):
                    change(tmp_path / "a")
                time.sleep(choose.uniform(0.0, 2e-4))

    other = threading.Thread(target=create_and_delete)
    other.start()
    try:
        for _ in range(200):
            check_writable(tmp_path / "a" / "b")
            with ExitStack() as created:
                create_folder(tmp_path / "a" / "b", created)
                assert (tmp_path / "a" / "b").is_dir()
    finally:
        has_ended.set()
        other.join()
