"""A rendezvous that cannot work is refused before a rank starts."""

import socket

import pytest
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from switchtitan.cli import launch, train
from switchtitan.cli.launch import (
    check_options,
    describe_lost_rendezvous,
    main,
    read_options,
)
from switchtitan.cli.rendezvous import check_rendezvous, check_slurm_tasks, split_endpoint
from switchtitan.errors import EnvironmentMismatchError


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("node-1:29500", ("node-1", 29500)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[fe80::1]:29500", ("fe80::1", 29500)),
    ],
)
def test_an_endpoint_is_a_host_and_a_port(endpoint: str, expected: tuple[str, int]) -> None:
    assert split_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint",
    ["node-1", "node-1:", "node-1:0", "node-1:65536", ":29500", "a b:1", "fe80::1:1x"],
)
def test_other_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"^RDZV_ENDPOINT=.*expected HOST:PORT"):
        check_rendezvous(endpoint, num_nodes=2, node_rank=None)


BATCH_SCRIPT = {"SLURM_NTASKS": "8"}
SHELL = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
TASK = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
SEPARATE_RUN = {"SLURM_STEP_NUM_TASKS": "8"}


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
def test_tasks_of_slurm_must_not_train_one_by_one(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], num_nodes: int, is_refused: bool
) -> None:
    for name in TASK:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not is_refused:
        check_slurm_tasks(num_nodes)
        return
    with pytest.raises(EnvironmentMismatchError, match=rf"^SLURM_NTASKS=8, NNODES={num_nodes}: "):
        check_slurm_tasks(num_nodes)


@pytest.mark.parametrize(
    "command",
    [
        (train.main, ["--config", "missing.toml"]),
        (main, ["--nnodes", "1", "--nproc_per_node", "2", "train", "--config", "missing.toml"]),
        (main, ["--nnodes", "1:4", "--nproc_per_node", "2", "train"]),
    ],
)
def test_commands_refuse_to_be_one_of_slurms_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple
) -> None:
    monkeypatch.setattr(launch, "run_ranks", lambda options: pytest.fail("started ranks"))
    monkeypatch.setenv("WORLD_SIZE", "")
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    run, argv = command
    with pytest.raises(SystemExit) as stop:
        run(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: SLURM_NTASKS=8, NNODES=")
    assert "scripts/slurm/train.sbatch" in message
    assert "docs/MULTINODE.md" in message


def test_tasks_of_slurm_that_are_ranks_may_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (TASK | {"WORLD_SIZE": "8", "RANK": "3"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train.main(["--config", "missing.toml"])
    assert "missing.toml: no such file" in capsys.readouterr().err


def test_an_empty_endpoint_counts_as_unset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "", "train"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: RDZV_ENDPOINT is not set: expected HOST:PORT, the same on every machine"
    )


def test_older_options_of_the_address_are_named_instead_of_an_empty_endpoint() -> None:
    address = ["--master_addr", "no-such-host.invalid", "--master_port", "29501"]
    options = read_options(["--nnodes", "2", *address, "train"])
    message, _ = describe_lost_rendezvous(options, RendezvousTimeoutError("nobody came"), [])
    named = "--master_addr no-such-host.invalid --master_port 29501: "
    assert message.startswith(f"{named}the 2 machines")
    with pytest.raises(EnvironmentMismatchError, match=rf"^{named}the host name"):
        check_options(options)


def test_a_single_machine_needs_no_address() -> None:
    check_rendezvous("localhost:0", num_nodes=1, node_rank=None)
    check_rendezvous("localhost:0", num_nodes=1, node_rank=0)


def test_a_host_name_must_be_known() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"no-such-host\.invalid cannot be resolved"):
        check_rendezvous("no-such-host.invalid:29500", num_nodes=2, node_rank=None)


@pytest.mark.parametrize("node_rank", [2, 3])
def test_an_index_must_be_below_the_number_of_machines(node_rank: int) -> None:
    with pytest.raises(EnvironmentMismatchError, match=rf"^NODE_RANK={node_rank}: .*NNODES=2"):
        check_rendezvous("localhost:29500", num_nodes=2, node_rank=node_rank)


def test_the_port_must_be_free_on_the_host_only() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        endpoint = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(EnvironmentMismatchError, match=r"in use; choose another"):
            check_rendezvous(endpoint, num_nodes=2, node_rank=0)
        check_rendezvous(endpoint, num_nodes=2, node_rank=1)
    check_rendezvous(endpoint, num_nodes=2, node_rank=0)


def test_the_launcher_refuses_before_it_starts_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node-1", "train"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: RDZV_ENDPOINT=node-1: expected HOST:PORT")


def test_machines_that_do_not_come_are_a_users_error(tmp_path) -> None:
    options = read_options(["--nnodes", "2", "--rdzv_endpoint", "node-1:29500", "train"])
    error = RendezvousTimeoutError("nobody came")
    message, status = describe_lost_rendezvous(options, error, [])
    assert status == 2
    assert "node-1:29500: the 2 machines did not all meet there (nobody came)" in message
    # With ranks running, the connection is lost, unless one of them tells why.
    assert describe_lost_rendezvous(options, error, [tmp_path])[1] == 1
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text('{"message": "no corpus", "exit_status": 2}')
    assert describe_lost_rendezvous(options, error, [tmp_path]) == ("no corpus", 2)
