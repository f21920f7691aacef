"""A process that has ended is distinguished from one that may run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from switchtitan.training import lock_owner
from switchtitan.training.lock_owner import Owner, may_be_alive, this_process

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def own() -> Owner:
    return this_process(has_kernel_lock=False)


def test_this_process_is_alive(own):
    assert may_be_alive(own, own)


def test_a_process_of_this_host_that_has_ended_is_not_alive(own):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not may_be_alive(own.model_copy(update={"pid": ended.pid}), own)


@needs_proc
def test_a_process_that_its_parent_has_not_waited_for_has_ended(own):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    owner = own.model_copy(update={"pid": ended.pid, "start_ticks": None})
    assert not may_be_alive(owner, own)
    ended.wait()


@needs_proc
def test_a_process_id_that_is_used_again_does_not_keep_a_lock(own):
    assert not may_be_alive(own.model_copy(update={"start_ticks": 1}), own)


@needs_proc
def test_a_process_of_another_boot_may_be_alive_on_a_machine_with_the_same_name(own, monkeypatch):
    owner = own.model_copy(update={"boot_id": "other", "start_ticks": 1, "slurm_job": "71"})
    assert may_be_alive(owner, own)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not may_be_alive(owner, this_process(has_kernel_lock=False))


@needs_proc
def test_a_process_of_another_container_may_be_alive(own):
    owner = own.model_copy(update={"pid_namespace": "pid:[1]", "start_ticks": 1})
    assert may_be_alive(owner, own)


@needs_proc
def test_a_process_started_before_now_and_runs(own):
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert own.start_ticks is not None
    assert 0 < own.start_ticks <= uptime_s * os.sysconf("SC_CLK_TCK")


def test_without_proc_a_process_id_counts(own, monkeypatch):
    monkeypatch.setattr(lock_owner, "_stat", lambda pid: None)
    monkeypatch.setattr(lock_owner, "_boot_id", lambda: None)
    monkeypatch.setattr(lock_owner, "_pid_namespace", lambda: None)
    without = this_process(has_kernel_lock=False)
    assert without.start_ticks is None
    assert may_be_alive(own, without)
    assert may_be_alive(without, without)


def test_an_owner_of_an_older_version_may_be_alive(own, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for host in (socket.gethostname(), "elsewhere"):
        written = {"host": host, "pid": os.getpid(), "since": "2026-01-02", "job": "71"}
        assert may_be_alive(Owner.model_validate(written), this_process(has_kernel_lock=False))


@pytest.mark.parametrize(
    ("of_owner", "own_variables", "is_ended"),
    [
        # Requeued.
        ({"slurm_job": "71"}, {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "1"}, True),
        # Slurm's second step of the same job.
        ({"slurm_job": "71"}, {"SLURM_JOB_ID": "71"}, False),
        (
            {"slurm_job": "71", "slurm_restarts": 1},
            {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        ({"slurm_job": "71"}, {"SLURM_JOB_ID": "72", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {"SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {"SLURM_RESTART_COUNT": "1"}, False),
        # Two launches may have the same RDZV_ID.
        ({}, {"TORCHELASTIC_RUN_ID": "71", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
    ],
)
def test_on_another_host_only_a_requeued_job_has_ended(
    own, monkeypatch, of_owner, own_variables, is_ended
):
    owner = own.model_copy(update={"host": "elsewhere", **of_owner})
    for variable, value in own_variables.items():
        monkeypatch.setenv(variable, value)
    assert may_be_alive(owner, this_process(has_kernel_lock=False)) is not is_ended


def test_a_live_process_of_this_host_is_respected_by_a_requeued_job(own, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owner = own.model_copy(update={"slurm_job": "71"})
    assert may_be_alive(owner, this_process(has_kernel_lock=False))
