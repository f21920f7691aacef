"""Starting ranks: what the launcher checks on this machine, and how it ends."""

import json
import os
import signal

import pytest
from support.commands import run
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from switchtitan.cli import launch
from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks
from switchtitan.errors import EnvironmentMismatchError

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
    check_rendezvous("localhost:65535", num_nodes=2, node_rank=1)
    check_rendezvous("[::1]:29500", num_nodes=2, node_rank=None)
    check_rendezvous("localhost:0", num_nodes=1, node_rank=0)  # a single machine needs no address


def test_only_the_last_start_of_this_run_tells_how_it_ended(tmp_path):
    for number, folder in enumerate(("old/attempt_11", "run/attempt_2", "run/attempt_10")):
        (tmp_path / folder / "0").mkdir(parents=True)
        recorded = {"message": folder, "exit_status": number}
        (tmp_path / folder / "0" / "error.json").write_text(json.dumps(recorded))
    attempts = launch.attempts_in(tmp_path, [tmp_path / "old"])
    assert [end["message"] for end in launch.recorded_ends(attempts)] == ["run/attempt_10"]
    assert launch.recorded_ends([]) == []


def ended(folder, status, timestamp, **recorded):
    """A rank's end; with what it has recorded of it, if it has."""
    file = folder / f"{len(list(folder.iterdir()))}.json"
    if recorded:
        file.write_text(json.dumps({"timestamp": timestamp, **recorded}))
    failure = ProcessFailure(0, 11, status, str(file) if recorded else "none")
    failure.timestamp = timestamp
    return failure


def test_the_first_cause_is_not_a_rank_that_torchrun_terminated(tmp_path):
    """A rank that torchrun terminates may end before the failed one, or after the same message."""
    mistake = {"message": "no such corpus", "exit_status": 2}
    terminated = ended(tmp_path, -signal.SIGTERM, 1)
    mistaken = ended(tmp_path, 2, 2, **mistake)
    terminated_with_its_message = ended(tmp_path, -signal.SIGTERM, 2, **mistake)
    crashed = ended(tmp_path, 1, 1)
    stopped = ended(tmp_path, 143, 1, message="stopped", exit_status=143)
    for failures, cause in (
        ([terminated, mistaken], mistaken),
        ([terminated, terminated_with_its_message], terminated_with_its_message),
        ([mistaken, crashed], crashed),
        ([terminated], terminated),
        ([stopped, crashed], crashed),
        ([stopped, terminated], stopped),
    ):
        assert launch.first_cause(failures) is cause


def test_launched_ranks_share_the_quota_of_cores(monkeypatch):
    def start(_):
        threads.append(os.environ["OMP_NUM_THREADS"])

    threads = []
    monkeypatch.setattr(launch, "num_cores", lambda: 4)
    monkeypatch.setattr(launch, "raise_file_limit", lambda: None)
    monkeypatch.setattr(launch, "run_ranks", start)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    for num_ranks in (4, 2):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        run("launch", "--standalone", "--nproc_per_node", num_ranks, "benchmark")
    assert threads == ["1", "2"]
