"""Environments of launchers in which ranks cannot meet."""

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import set_group_timeout, start_world, stop_world
from switchtitan.errors import EnvironmentMismatchError

COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A launcher other than torchrun sets the variables of `COMPLETE`."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["RANK"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_missing_variables_are_named(launcher: pytest.MonkeyPatch, missing: list[str]) -> None:
    for name in missing:
        launcher.delenv(name)
    names = ", ".join(missing)
    with pytest.raises(EnvironmentMismatchError, match=rf"^WORLD_SIZE=2 is set, but not {names};"):
        start_world(ParallelismConfig(replicate=1))


def test_a_port_that_is_no_number_is_named(launcher: pytest.MonkeyPatch) -> None:
    launcher.setenv("MASTER_PORT", "http")
    with pytest.raises(
        EnvironmentMismatchError, match=r"^MASTER_ADDR=localhost, MASTER_PORT=http:"
    ):
        start_world(ParallelismConfig())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_stay_alone_are_told_so(launcher: pytest.MonkeyPatch, rank: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher.setenv("MASTER_PORT", str(port))
    launcher.setenv("RANK", rank)
    with pytest.raises(EnvironmentMismatchError, match=rf"{port}: 2 ranks did not meet there"):
        start_world(ParallelismConfig(timeout_s=1))


def test_timeouts_are_set_by_the_public_function_where_torch_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = start_world(ParallelismConfig())
    calls: list[tuple] = []
    monkeypatch.setattr(dist, "set_timeout", lambda *given: calls.append(given), raising=False)
    set_group_timeout(world.host_group, timedelta(seconds=7))
    assert calls == [(timedelta(seconds=7), world.host_group)]
    monkeypatch.undo()
    set_group_timeout(world.host_group, timedelta(seconds=7))
    assert len(calls) == 1
    stop_world()
