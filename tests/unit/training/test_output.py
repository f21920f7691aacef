"""A run's folder is of one process at a time.

Ranks that see other folders are in tests/ranks, and killed processes in tests/faults.
"""

import os
import socket

import pytest
from support.checkpoints import refused
from support.insides import wait_for_owners

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError
from switchtitan.training.output import OWNER_FILE, lock_output_dir


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path, monkeypatch):
    wait_for_owners(monkeypatch, 0.1)
    world = start_world(ParallelismConfig())
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
