"""Starting ranks: what the launcher checks on this machine, and how it ends."""

import os
import signal

import pytest
from support.commands import run
from torch.distributed.elastic.multiprocessing.api import SignalException

from switchtitan.cli import launch
from switchtitan.distributed.world import check_slurm_tasks
from switchtitan.errors import ENDED, EnvironmentMismatchError

TASK = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.fixture
def set_slurm(monkeypatch):
    """Sets variables of Slurm; the others are unset."""

    def set_variables(variables):
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_tasks_of_slurm_must_not_train_one_by_one(set_slurm):
    batch_script, separate_run = {"SLURM_NTASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "8"}
    shell = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    for variables in ({}, batch_script, shell, separate_run):
        set_slurm(variables)
        check_slurm_tasks(1)
    set_slurm(TASK)
    check_slurm_tasks(8)  # one launcher per machine, as scripts/slurm/train.sbatch starts them
    for num_nodes in (1, 7):
        with pytest.raises(EnvironmentMismatchError, match=f"NTASKS=8, NNODES={num_nodes}"):
            check_slurm_tasks(num_nodes)


def test_commands_refuse_to_be_one_of_slurms_tasks_unless_it_is_a_rank(set_slurm):
    set_slurm(TASK)
    missing = ("train", "--config", "missing.toml")
    run(*missing).check_refused("SLURM_NTASKS=8", "NNODES=1")
    run("launch", "--nnodes", "1:4", *missing).check_refused("SLURM_NTASKS=8", "NNODES=4")
    set_slurm(TASK | {"WORLD_SIZE": "8", "RANK": "3"})
    run(*missing).check_refused("missing.toml", "no such file")


def test_an_endpoint_is_a_host_and_a_port():
    launch.check_rendezvous("localhost:65535")
    launch.check_rendezvous("[::1]:29500")


def test_the_first_process_on_any_machine_tells_the_batch_script_why_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv(ENDED, str(tmp_path / "ended"))
    for key in ("--training.step", "--data.pth"):
        ended = run("launch", "--nproc_per_node", 2, "train", key, "x")
        assert (ended.status, ended.errors) == (2, "")
    status, *message = (tmp_path / "ended").read_text().splitlines()
    assert status == "2"
    assert "--training.step x" in message[-1]
    monkeypatch.setenv(ENDED, str(tmp_path / "on a full disk" / "ended"))
    run("train", "--data.pth", "x").check_refused("--data.pth x")


def test_signals_that_come_while_the_launcher_ends_are_ignored(monkeypatch):
    """srun sends SIGTERM once another machine's launcher has ended."""

    def interrupt(number, _):
        raise SignalException("", signal.Signals(number))

    def end(_):
        signal.signal(signal.SIGTERM, interrupt)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(launch.torchrun, "run", end)
    monkeypatch.setattr(launch, "recorded_end", lambda: signal.raise_signal(signal.SIGTERM))
    assert run("launch", "--nproc_per_node", 2, "benchmark").status == 143


def test_launched_ranks_share_the_quota_of_cores(monkeypatch):
    def start(_):
        threads.append(os.environ["OMP_NUM_THREADS"])

    threads = []
    monkeypatch.setattr(launch, "num_cores", lambda: 4)
    monkeypatch.setattr(launch, "raise_file_limit", lambda: None)
    monkeypatch.setattr(launch.torchrun, "run", start)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    for num_ranks in (4, 2):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        run("launch", "--standalone", "--nproc_per_node", num_ranks, "benchmark")
    assert threads == ["1", "2"]
