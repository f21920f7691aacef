"""A rendezvous that cannot work is refused before a rank starts."""

import socket

import pytest
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from switchtitan.cli.launch import (
    check_options,
    describe_lost_rendezvous,
    main,
    read_options,
)
from switchtitan.cli.rendezvous import check_rendezvous, split_endpoint
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
