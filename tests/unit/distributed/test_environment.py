"""What machine and launcher offer a rank: GPUs, a place among ranks, files."""

import resource

import pytest
import torch
from support.checkpoints import refused
from torch.distributed.elastic.utils.distributed import get_free_port

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import device_type, own_gpu, start_world, unusable_gpu
from switchtitan.errors import EnvironmentMismatchError

PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "free"}


@pytest.fixture
def launcher(monkeypatch):
    """Environment variables as if nobody had launched this process."""
    torchrun = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES")
    for name in (*PLACE, *MEETING, *torchrun):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_hidden(tmp_path, launcher):
    driver = tmp_path / "nvidiactl"
    assert unusable_gpu(driver) is None
    driver.touch()
    assert "CUDA_VISIBLE_DEVICES=" in unusable_gpu(driver)
    for value in ("", "-1", "NoDevFiles"):
        launcher.setenv("CUDA_VISIBLE_DEVICES", value)
        assert unusable_gpu(driver) is None
    launcher.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert unusable_gpu(driver) is not None
    launcher.setattr("switchtitan.distributed.world.unusable_gpu", lambda: "the driver is old")
    with pytest.raises(EnvironmentMismatchError, match="the driver is old"):
        device_type()


def test_empty_variables_of_a_launcher_count_as_unset(launcher):
    for name in PLACE:
        launcher.setenv(name, "")
    world = start_world(ParallelismConfig())
    assert (world.size, world.rank, world.is_node_main) == (1, 0, True)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE=two", "expected integers")),
        ({"WORLD_SIZE": "0"}, ("RANK=, WORLD_SIZE=0", "to WORLD_SIZE - 1")),
        ({"RANK": "-1"}, ("RANK=-1, WORLD_SIZE=,", "from 0")),
        ({"RANK": "3", "WORLD_SIZE": "3"}, ("RANK=3, WORLD_SIZE=3",)),
        ({"LOCAL_RANK": "1.0"}, ("LOCAL_RANK=1.0", "expected integers")),
        ({**MEETING, "RANK": "", "MASTER_ADDR": ""}, ("RANK=, WORLD_SIZE=2",)),
        ({**MEETING}, ("MASTER_ADDR=localhost", "2 ranks did not meet")),
        ({**MEETING, "RANK": "1"}, ("RANK=1", "2 ranks did not meet")),
    ],
)
def test_a_place_that_no_launcher_gives_is_refused_and_ranks_that_do_not_meet_say_where(
    launcher, changes, fragments
):
    for name, value in changes.items():
        launcher.setenv(name, str(get_free_port()) if value == "free" else value)
    with refused(*fragments, error=EnvironmentMismatchError):
        start_world(ParallelismConfig(timeout_s=1))


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
    if is_torchrun:
        launcher.setenv("TORCHELASTIC_RUN_ID", "run")
    if expected is None:
        with pytest.raises(EnvironmentMismatchError, match=f"local rank {local_rank} has no GPU"):
            own_gpu(local_rank)
    else:
        assert own_gpu(local_rank) == torch.device("cuda", expected)


def test_a_rank_may_open_as_many_files_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        start_world(ParallelismConfig())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
