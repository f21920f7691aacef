"""Starting ranks: what the launcher checks on this machine, and how it ends."""

import json
import os
import socket

import pytest
from support.commands import run
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from switchtitan.cli import launch
from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks, split_endpoint
from switchtitan.errors import EnvironmentMismatchError

BATCH_SCRIPT = {"SLURM_NTASKS": "8"}
SHELL = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
TASK = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
SEPARATE_RUN = {"SLURM_STEP_NUM_TASKS": "8"}


@pytest.fixture
def set_slurm(monkeypatch):
    """Sets variables of Slurm; the others are unset."""

    def set_variables(variables):
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "num_nodes", "is_refused"),
    [
        ({}, 1, False),
        (BATCH_SCRIPT, 1, False),
        (SHELL, 1, False),
        (SEPARATE_RUN, 1, False),
        (TASK, 1, True),
        (TASK, 7, True),
        (TASK, 8, False),  # one launcher per machine, as scripts/slurm/train.sbatch starts them
    ],
)
def test_tasks_of_slurm_must_not_train_one_by_one(set_slurm, variables, num_nodes, is_refused):
    set_slurm(variables)
    if not is_refused:
        check_slurm_tasks(num_nodes)
        return
    with pytest.raises(EnvironmentMismatchError, match=rf"SLURM_NTASKS=8, NNODES={num_nodes}"):
        check_slurm_tasks(num_nodes)


def test_commands_refuse_to_be_one_of_slurms_tasks_unless_it_is_a_rank(set_slurm):
    set_slurm(TASK)
    missing = ("train", "--config", "missing.toml")
    run(*missing).check_refused("SLURM_NTASKS=8", "NNODES=1")
    run("launch", "--nnodes", "1:4", *missing).check_refused("SLURM_NTASKS=8", "NNODES=4")
    set_slurm(TASK | {"WORLD_SIZE": "8", "RANK": "3"})
    run(*missing).check_refused("missing.toml", "no such file")


def test_an_endpoint_is_a_host_and_a_port():
    assert split_endpoint("node-1:29500") == ("node-1", 29500)
    assert split_endpoint("10.0.0.1:65535") == ("10.0.0.1", 65535)
    assert split_endpoint("[fe80::1]:29500") == ("fe80::1", 29500)
    check_rendezvous("localhost:0", num_nodes=1, node_rank=0)  # a single machine needs no address


def test_the_port_must_be_free_on_the_host_only():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        endpoint = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(EnvironmentMismatchError, match="in use"):
            check_rendezvous(endpoint, num_nodes=2, node_rank=0)
        check_rendezvous(endpoint, num_nodes=2, node_rank=1)
    check_rendezvous(endpoint, num_nodes=2, node_rank=0)


def test_only_the_last_start_of_this_run_tells_how_it_ended(tmp_path):
    for number, folder in enumerate(("old/attempt_11", "run/attempt_2", "run/attempt_10")):
        (tmp_path / folder / "0").mkdir(parents=True)
        recorded = {"message": folder, "exit_status": number}
        (tmp_path / folder / "0" / "error.json").write_text(json.dumps(recorded))
    last = launch.last_start(tmp_path, [tmp_path / "old" / "attempt_11"])
    assert [end["message"] for end in launch.recorded_ends(last)] == ["run/attempt_10"]
    assert launch.last_start(tmp_path / "old" / "attempt_11", []) == []


def test_a_lost_rendezvous_is_a_users_mistake_unless_ranks_ran_or_say_why(tmp_path):
    options = launch.read_options(["--nnodes", "2", "--rdzv_endpoint", "node-1:29500", "train"])
    error = RendezvousTimeoutError("nobody came")
    message, status = launch.describe_lost_rendezvous(options, error, [])
    assert "node-1:29500" in message
    assert "nobody came" in message
    assert status == 2
    assert launch.describe_lost_rendezvous(options, error, [tmp_path])[1] == 1
    (tmp_path / "0").mkdir()
    recorded = {"message": "no corpus", "exit_status": 2}
    (tmp_path / "0" / "error.json").write_text(json.dumps(recorded))
    assert launch.describe_lost_rendezvous(options, error, [tmp_path]) == ("no corpus", 2)


@pytest.mark.parametrize(("num_ranks", "expected"), [("4", "1"), ("2", "2")])
def test_launched_ranks_share_the_quota_of_cores(monkeypatch, num_ranks, expected):
    threads = []
    monkeypatch.setattr(launch, "num_cores", lambda: 4)
    monkeypatch.setattr(launch, "raise_file_limit", lambda: None)
    monkeypatch.setattr(
        launch, "run_ranks", lambda _: threads.append(os.environ["OMP_NUM_THREADS"])
    )
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    monkeypatch.delenv("OMP_NUM_THREADS")
    run("launch", "--standalone", "--nproc_per_node", num_ranks, "benchmark")
    assert threads == [expected]
