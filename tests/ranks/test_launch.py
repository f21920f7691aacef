"""Errors and crashes of several ranks are reported once, with the right exit status."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from switchtitan.cli.launch import first_cause, num_ranks_of

CONFIG = """\
[job]
name = "tiny"
output_dir = "outputs/tiny"
[model]
name = "llama"
size = "9m"
[method]
name = "full_rank"
[optimizer]
name = "adamw"
lr = 0.02
[training]
steps = 40
global_batch_size = 12
local_batch_size = 2
"""


def launch(
    folder: Path, script: str, *argv: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    (folder / "job.toml").write_text(CONFIG)
    (folder / "ranks.py").write_text(script)
    options = (
        *options,
        "--nnodes",
        "1",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    )
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "switchtitan",
            "launch",
            *options,
            "ranks.py",
            "--config",
            "job.toml",
            *argv,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_an_invalid_configuration_starts_no_rank(tmp_path: Path) -> None:
    done = launch(tmp_path, "print('started')", "--training.global_batch_size", "6")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: invalid configuration (1 error)",
        "values that do not fit together:",
        "  [training] global_batch_size = 6: expected a multiple of ranks x local_batch_size "
        "= 2 x 2 = 4; write 4 or 8",
    ]


def test_an_error_on_all_ranks_is_printed_once(tmp_path: Path) -> None:
    script = (
        "from switchtitan.errors import CorpusError, exit_for\n"
        "exit_for(CorpusError('no such corpus'))\n"
    )
    done = launch(tmp_path, script)
    assert done.returncode == 2
    assert done.stderr == "error: no such corpus\n"


@pytest.mark.parametrize(("status", "num_starts"), [(2, 1), (6, 3)])
def test_only_a_crash_or_a_lost_rank_is_restarted(
    tmp_path: Path, status: int, num_starts: int
) -> None:
    script = (
        "import os\n"
        "from switchtitan.errors import UserError, exit_for\n"
        "open(f'{os.environ[\"RANK\"]}-{os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}', 'w')\n"
        "error = UserError('broken')\n"
        f"error.exit_status = {status}\n"
        "exit_for(error)\n"
    )
    done = launch(tmp_path, script, options=("--max-restarts", "2"))
    assert (done.returncode, done.stderr) == (status, "error: broken\n")
    assert len({file.name[-1] for file in tmp_path.glob("[01]-*")}) == num_starts


def test_the_first_cause_is_not_a_rank_that_torchrun_terminated(tmp_path: Path) -> None:
    """A rank that torchrun terminates may end before the failed one, or after the same message."""
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": "no such corpus", "timestamp": 2, "exit_status": 2}))
    ended = ProcessFailure(0, 11, -signal.SIGTERM, "none")
    ended.timestamp = 1
    mistaken = ProcessFailure(1, 12, 2, str(file))
    ended_with_its_message = ProcessFailure(2, 13, -signal.SIGTERM, str(file))
    crashed = ProcessFailure(3, 14, 1, "none")
    crashed.timestamp = 1
    assert first_cause([ended, mistaken]) is mistaken
    assert first_cause([ended, ended_with_its_message]) is ended_with_its_message
    assert first_cause([mistaken, crashed]) is crashed
    assert first_cause([ended]) is ended
    file = tmp_path / "stop.json"
    file.write_text(json.dumps({"message": "stopped", "timestamp": 1, "exit_status": 143}))
    stopped = ProcessFailure(4, 15, 143, str(file))
    assert first_cause([stopped, crashed]) is crashed
    assert first_cause([stopped, ended]) is stopped


def test_the_rank_that_names_a_hung_one_is_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    recorded = {"message": "rank 1 hangs", "exit_status": 6, "is_consequence": True}
    file.write_text(json.dumps(recorded | {"timestamp": 100}))
    names_it = ProcessFailure(0, 11, 6, str(file))
    killed = ProcessFailure(1, 12, -signal.SIGKILL, "none")
    killed.timestamp = 130
    assert first_cause([names_it, killed]) is names_it
    killed.timestamp = 99  # not by torchrun
    assert first_cause([names_it, killed]) is killed


def test_a_crash_keeps_its_traceback(tmp_path: Path) -> None:
    done = launch(tmp_path, "raise RuntimeError('broken')\n")
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
    assert "exitcode  : 1" in done.stderr


def test_status_2_without_a_message_is_a_crash(tmp_path: Path) -> None:
    assert launch(tmp_path, "raise SystemExit(2)\n").returncode == 1


def test_successful_ranks_exit_with_status_0(tmp_path: Path) -> None:
    # A file for each rank, since concurrent output may interleave.
    script = (
        "import os\n"
        "open(f'rank {os.environ[\"RANK\"]} of {os.environ[\"WORLD_SIZE\"]}', 'w').close()\n"
    )
    done = launch(tmp_path, script)
    assert done.returncode == 0
    assert sorted(file.name for file in tmp_path.glob("rank *")) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize(
    ("num_nodes", "num_processes", "expected"),
    [("2", "4", 8), ("1:4", "4", None), ("1", "gpu", None)],
)
def test_ranks_are_counted_if_known(
    num_nodes: str, num_processes: str, expected: int | None
) -> None:
    assert num_ranks_of(num_nodes, num_processes) == expected


def test_a_machine_that_nobody_joins_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    (tmp_path / "job.toml").write_text(CONFIG)
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "static"]
    options += ["--node_rank", "1", "--rdzv_endpoint", endpoint, "--rdzv_conf", "timeout=1"]
    done = subprocess.run(
        [sys.executable, "-m", "switchtitan", "launch", *options, "train", "--config", "job.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: RDZV_ENDPOINT={endpoint}: the 2 machines did not all meet")
