"""What machine and launcher offer a rank: GPUs, a place among ranks, files; and how ranks end."""

import json
import resource
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from switchtitan.cli.launch import first_cause, num_ranks_of
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.gpus import own_gpu, unusable_gpu
from switchtitan.distributed.launcher import (
    is_launched,
    local_rank_from_launcher,
    num_local_ranks_from_launcher,
    num_ranks_from_launcher,
    rank_from_launcher,
)
from switchtitan.distributed.limits import num_open_files, raise_file_limit
from switchtitan.distributed.world import device_type, set_group_timeout, start_world
from switchtitan.errors import EnvironmentMismatchError

REPOSITORY = Path(__file__).parents[3]
PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def launcher(monkeypatch):
    """Environment variables as if nobody had launched this process."""
    for name in (*PLACE, *MEETING, "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# GPUs.
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_an_nvidia_gpu_that_torch_cannot_use_is_an_error_unless_it_is_hidden(tmp_path, launcher):
    assert unusable_gpu(tmp_path, tmp_path) is None
    (tmp_path / "nvidiactl").touch()
    assert "CUDA_VISIBLE_DEVICES=" in unusable_gpu(tmp_path, tmp_path)
    for value in ("", "-1", "NoDevFiles"):
        launcher.setenv("CUDA_VISIBLE_DEVICES", value)
        assert unusable_gpu(tmp_path, tmp_path) is None
    launcher.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert unusable_gpu(tmp_path, tmp_path) is not None


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("kfd/topology/nodes/0/properties", "cpu_cores_count 16\nsimd_count 0\n", False),
        # A laptop's graphics, and a card.
        ("kfd/topology/nodes/0/properties", "cpu_cores_count 16\nsimd_count 8\n", False),
        ("kfd/topology/nodes/0/properties", "cpu_cores_count 0\nsimd_count 1216\n", True),
        # Under WSL.
        ("libdxcore.so", "", False),
        ("libcuda.so.1", "", True),
    ],
)
def test_a_card_of_amd_or_under_wsl_counts_and_a_laptops_graphics_do_not(
    tmp_path, launcher, file, text, counts
):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "dxg").touch()
    assert (unusable_gpu(tmp_path, tmp_path, tmp_path) is not None) == counts


def test_a_run_does_not_fall_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("switchtitan.distributed.world.unusable_gpu", lambda: "the driver is old")
    with pytest.raises(EnvironmentMismatchError, match="the driver is old"):
        device_type()
    monkeypatch.setattr("switchtitan.distributed.world.unusable_gpu", lambda: None)
    assert device_type() == "cpu"


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "is_torchrun", "expected"),
    [
        (8, 3, True, 3),
        (1, 3, False, 0),  # Slurm shows each task its own GPU
        (1, 1, True, None),  # two ranks of torchrun would share it
        (4, 4, False, None),
    ],
)
def test_a_rank_takes_its_own_gpu(launcher, num_gpus, local_rank, is_torchrun, expected):
    launcher.setattr(torch.cuda, "device_count", lambda: num_gpus)
    launcher.setenv("LOCAL_RANK", str(local_rank))
    if is_torchrun:
        launcher.setenv("TORCHELASTIC_RUN_ID", "run")
    if expected is None:
        with pytest.raises(EnvironmentMismatchError, match=f"local rank {local_rank} has no GPU"):
            own_gpu()
    else:
        assert own_gpu() == torch.device("cuda", expected)


# The launcher's variables.
def place():
    return (
        is_launched(),
        num_ranks_from_launcher(),
        rank_from_launcher(),
        local_rank_from_launcher(),
        num_local_ranks_from_launcher(),
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("", "", "", ""), (False, 1, 0, 0, 1)),
        # All ranks are local unless the launcher says otherwise.
        (("4", "3", "1", ""), (True, 4, 3, 1, 4)),
        (("4", "3", "1", "2"), (True, 4, 3, 1, 2)),
    ],
)
def test_empty_variables_of_a_launcher_count_as_unset(launcher, values, expected):
    for name, value in zip(PLACE, values, strict=True):
        launcher.setenv(name, value)
    assert place() == expected


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE=two", "integer >= 1")),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0", "integer >= 1")),
        ({"RANK": "-1"}, ("RANK=-1", "integer >= 0")),
        ({"RANK": "3"}, ("RANK=3", "WORLD_SIZE")),
        ({"RANK": "3", "WORLD_SIZE": "3"}, ("RANK=3", "WORLD_SIZE=3")),
        ({"LOCAL_RANK": "1.0"}, ("LOCAL_RANK=1.0", "integer >= 0")),
        ({"LOCAL_WORLD_SIZE": "0"}, ("LOCAL_WORLD_SIZE=0", "integer >= 1")),
    ],
)
def test_places_that_are_no_numbers_or_too_large_are_refused(launcher, changes, fragments):
    for name, value in changes.items():
        launcher.setenv(name, value)
    with pytest.raises(EnvironmentMismatchError) as error:
        place()
    assert all(fragment in str(error.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"RANK": ""}, ("WORLD_SIZE=2", "RANK")),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, ("WORLD_SIZE=2", "MASTER_ADDR, MASTER_PORT")),
        ({"MASTER_PORT": "http"}, ("MASTER_ADDR=localhost", "MASTER_PORT=http")),
        ({"MASTER_PORT": "free"}, ("2 ranks did not meet",)),
        ({"MASTER_PORT": "free", "RANK": "1"}, ("2 ranks did not meet",)),
    ],
)
def test_ranks_that_cannot_meet_say_where(launcher, changes, fragments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (MEETING | changes).items():
        launcher.setenv(name, str(port) if value == "free" else value)
    with pytest.raises(EnvironmentMismatchError) as error:
        start_world(ParallelismConfig(timeout_s=1))
    assert all(fragment in str(error.value) for fragment in fragments)


def test_timeouts_are_set_by_the_public_function_where_torch_has_it(monkeypatch):
    world = start_world(ParallelismConfig())
    calls = []
    monkeypatch.setattr(dist, "set_timeout", lambda *given: calls.append(given), raising=False)
    set_group_timeout(world.host_group, timedelta(seconds=7))
    assert calls == [(timedelta(seconds=7), world.host_group)]
    monkeypatch.undo()
    set_group_timeout(world.host_group, timedelta(seconds=7))
    assert len(calls) == 1


# The limit of open files.
def test_512_gpus_need_the_documented_number_of_files_and_less_than_the_usual_hard_limit():
    assert num_open_files(512, "cuda") == 1122
    assert "512 GPU ranks need 1122 files" in (REPOSITORY / "docs" / "MULTINODE.md").read_text()
    assert max(num_open_files(512, device) for device in ("cpu", "cuda")) < 4096


@pytest.mark.parametrize("hard", [4096, resource.RLIM_INFINITY])
@pytest.mark.parametrize(
    ("soft", "is_raised"), [(1024, True), (2048, False), (resource.RLIM_INFINITY, False)]
)
def test_a_soft_limit_is_raised_to_what_is_needed(monkeypatch, soft, hard, is_raised):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.append(values))
    raise_file_limit(512, "cuda")
    assert limits == [(1122, hard)] * is_raised


def test_a_hard_limit_that_is_too_low_is_refused(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: None)
    raise_file_limit(300, "cpu")
    with pytest.raises(EnvironmentMismatchError, match=r"400 ranks .* 1024"):
        raise_file_limit(400, "cpu")


# What a launcher makes of its ranks' ends.
@pytest.mark.parametrize(
    ("num_nodes", "num_processes", "expected"),
    [("2", "4", 8), ("1:4", "4", None), ("1", "gpu", None)],
)
def test_ranks_are_counted_if_known(num_nodes, num_processes, expected):
    assert num_ranks_of(num_nodes, num_processes) == expected


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
    assert first_cause([terminated, mistaken]) is mistaken
    assert first_cause([terminated, terminated_with_its_message]) is terminated_with_its_message
    assert first_cause([mistaken, crashed]) is crashed
    assert first_cause([terminated]) is terminated
    assert first_cause([stopped, crashed]) is crashed
    assert first_cause([stopped, terminated]) is stopped
