"""A run's folder is of one process at a time, and can be written.

Ranks that see other folders are in tests/ranks, and killed processes in tests/faults.
"""

import os
import socket

import pytest
from support.checkpoints import refused
from support.insides import wait_for_owners

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.errors import ConfigError
from switchtitan.training.output import OWNER_FILE, lock_output_dir


@pytest.fixture(scope="module")
def world():
    yield start_world(ParallelismConfig())
    stop_world()


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path, world, monkeypatch):
    wait_for_owners(monkeypatch, 0.1)
    folder = tmp_path / "outputs" / "run"
    owner = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    with lock_output_dir(folder, world):
        assert (folder / OWNER_FILE).read_text().startswith(owner)
        with refused("[job] output_dir", owner, error=ConfigError), lock_output_dir(folder, world):
            pytest.fail("owns the folder too")
        assert (folder / OWNER_FILE).exists()
    assert not list(tmp_path.iterdir())
    with lock_output_dir(folder, world):
        (folder / "train.log").touch()
    assert [file.name for file in folder.iterdir()] == ["train.log"]


def make_file(tmp_path):
    (tmp_path / "a").touch()


def make_read_only(tmp_path):
    (tmp_path / "a").mkdir(mode=0o555)
    if os.access(tmp_path / "a", os.W_OK):
        pytest.skip("root may write everywhere")


@pytest.mark.parametrize("make", [make_file, make_read_only])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, world, make):
    make(tmp_path)
    parts = ("[job] output_dir", str(tmp_path / "a"))
    with refused(*parts, error=ConfigError), lock_output_dir(tmp_path / "a" / "b", world):
        pytest.fail("owns a folder that does not exist")
