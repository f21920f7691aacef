"""No thread but the main one keeps an OpenMP team, since a team slows down all others."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from switchtitan.checkpoint import CheckpointConfig, Checkpointer
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world

values = torch.randn(1 << 20)
growth = {}


def num_other_threads():
    values.exp()  # the main thread has its team
    return len(os.listdir("/proc/self/task")) - threading.active_count()


@contextmanager
def measured(name, expected):
    before = num_other_threads()
    yield
    wait_for(before + expected)
    growth[name] = num_other_threads() - before


def wait_for(number):  # threads that have ended disappear a moment later
    deadline = time.monotonic() + 10
    while num_other_threads() != number and time.monotonic() < deadline:
        time.sleep(0.01)


def keep_team():
    torch.set_num_threads(2)
    values.exp()
    has_team.set()
    may_end.wait()


world = start_world(ParallelismConfig())
# A plan of more than 32 KiB, and a tensor that is copied in parallel.
tensors = {f"weight{index}": torch.ones(3) for index in range(500)} | {"large": values}
for kind in ("synchronous", "asynchronous"):
    config, folder = CheckpointConfig(async_save=kind == "asynchronous"), Path(sys.argv[1], kind)
    checkpointer = Checkpointer(
        folder,
        config,
        identity={},
        metadata={},
        is_main=True,
        group=world.host_group,
        background_group=world.new_host_group(),
    )
    with measured(kind, 0):
        for step in (1, 2):
            checkpointer.save(step, tensors, {})
            checkpointer.finish()

may_end, has_team = threading.Event(), threading.Event()
num_before = num_other_threads()
with measured("planted", 1):
    planted = threading.Thread(target=keep_team)
    planted.start()
    has_team.wait()
may_end.set()
planted.join()
wait_for(num_before)

torch.set_num_threads(2)  # undoes the limit for threads that start later
group = dist.new_group(backend="gloo")
with measured("without the limit", 1):
    dist.all_gather_object([None], list(range(100_000)), group=group)
print(json.dumps(growth | {"num_threads": torch.get_num_threads()}))
"""


def test_saves_leave_no_openmp_team_behind(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert json.loads(output.splitlines()[-1]) == {
        "synchronous": 0,
        "asynchronous": 0,
        # The count sees a thread that keeps a team, and a group's thread without the limit.
        "planted": 1,
        "without the limit": 1,
        "num_threads": 2,
    }
