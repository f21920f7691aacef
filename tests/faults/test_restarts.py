"""After a rank was killed, `--max-restarts` resumes the run, with and without kernel locks."""

import re
import socket
from pathlib import Path

import pytest
from support.fault_report import IS_LONG, record
from support.launched_runs import start

RUN = ("--training.steps", "9", "--checkpoint.interval", "3")


@pytest.mark.parametrize("has_locks", [False, True] if IS_LONG else [False])
def test_a_rank_that_dies_is_named_and_all_restart_from_the_newest_checkpoint(
    tmp_path: Path, has_locks: bool
) -> None:
    """Rank 1 is killed first. Then rank 0, so that the lock file of a killed process is left."""
    options = ("--max-restarts", "2")
    with start(tmp_path, *RUN, ranks=2, fault="die", has_locks=has_locks, options=options) as run:
        said = run.ends_with(0)
    assert f"rank 1 on {socket.gethostname()} did not answer" in said
    assert said.count(f"resuming from {run.checkpoints / 'step-000000006'}") == 2
    steps = [int(step) for step in re.findall(r"(\d+)/9 +\d", said)]
    assert steps == [*range(1, 8), 7, 7, 8, 9]
    assert run.saved_steps() == [6, 9]
    record("restarts", lock="kernel lock" if has_locks else "file", restarts=2)
