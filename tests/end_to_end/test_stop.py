"""Signals, crashes and hung ranks end a run as docs/USAGE.md says, in real processes."""

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from support.launched_runs import start, write_config
from support.ranks import run_on_ranks

from switchtitan.builders.trainer import build_trainer
from switchtitan.distributed.world import start_world
from switchtitan.job.config import parse_arguments
from switchtitan.training.signals import SAME_ACTION_S, UNWIND_S

pytestmark = pytest.mark.end_to_end


def train_on_ranks(rank: int, config: Path) -> None:
    parsed = parse_arguments(["--config", str(config), *STEPS])
    build_trainer(parsed, start_world(parsed.parallelism)).train()


def checksums(folder: Path) -> dict[str, object]:
    """Returns the checksums of the last checkpoint's tensors."""
    newest = max((folder / "run" / "checkpoints").glob("step-*"))
    assert newest.name == "step-000000040"
    files = json.loads((newest / "metadata.json").read_text())["files"]
    return {name: record for name, record in files.items() if name.endswith(".distcp")}


STEPS = ("--training.steps", "40")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_any_moment_loses_no_step_and_changes_no_bit(corpora: Path, ranks: int) -> None:
    folder, undisturbed = corpora / f"signal-{ranks}", corpora / f"undisturbed-{ranks}"
    number = random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    with start(folder, *STEPS, ranks=ranks) as run:
        run.wait_for(r"\d/40 +\d")
        time.sleep(random.uniform(0, 0.5))
        os.kill(run.process.pid, number)
        said = run.ends_with(128 + number)
    (stopped_at,) = run.saved_steps()
    assert stopped_at == run.last_step
    assert f"stopped at step {stopped_at}; the same command resumes from" in said
    assert "Traceback" not in said
    log = folder / "run" / "train.log"
    size = log.stat().st_size
    run_on_ranks(ranks, train_on_ranks, write_config(folder))
    steps = [int(step) for step in re.findall(r"(\d+)/\d+ +\d", log.read_text()[size:])]
    assert steps[0] == stopped_at + 1
    run_on_ranks(ranks, train_on_ranks, write_config(undisturbed))
    assert len(checksums(folder)) == ranks
    assert checksums(folder) == checksums(undisturbed)


SAVE_IN_STEP_5 = ("--checkpoint.interval", "5")


def test_a_second_signal_exits_at_once_and_leaves_the_checkpoint_before(corpora: Path) -> None:
    with start(corpora / "second", *STEPS, *SAVE_IN_STEP_5, fault="slow") as run:
        run.wait_for(r"7/40 +\d")
        os.killpg(run.process.pid, signal.SIGTERM)
        run.wait_for("stopping after this step")
        time.sleep(SAME_ACTION_S + 0.5)
        os.kill(run.process.pid, signal.SIGINT)
        started = time.monotonic()
        # The file of the run's lock may stay, since the main thread is writing.
        assert run.process.wait(timeout=60) == 130, run.said
        assert time.monotonic() - started < UNWIND_S + 3
    assert run.said.splitlines()[-1] == "stopped at once by SIGINT"
    assert run.saved_steps() == [5]


def test_a_save_that_takes_too_long_is_abandoned(corpora: Path) -> None:
    grace = ("--checkpoint.grace_s", "1")
    with start(corpora / "grace", *STEPS, *SAVE_IN_STEP_5, *grace, ranks=2, fault="slow") as run:
        run.wait_for(r"7/40 +\d")
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(timeout=60) == 5, run.said
    last = [line for line in run.said.splitlines() if line][-1]
    assert last.startswith("error: [checkpoint] grace_s = 1: the save was not complete")
    assert last.endswith(f"the same command resumes from {run.checkpoints / 'step-000000005'}")
    assert run.saved_steps() == [5]


def test_a_signal_before_the_first_step_ends_the_run_at_once(corpora: Path) -> None:
    with start(corpora / "early", *STEPS, ranks=2) as run:
        run.wait_for("compute dtype")
        os.killpg(run.process.pid, signal.SIGTERM)
        run.ends_with(143)
    assert run.saved_steps() == []


def test_ranks_name_the_one_that_hangs(corpora: Path) -> None:
    timeout = ("--parallelism.timeout_s", "4")
    with start(corpora / "hang", *STEPS, *timeout, ranks=2, fault="hang") as run:
        run.wait_for("; a collective failed")
        # torchrun would kill the hung rank after 30 s.
        for rank in run.ranks():
            os.kill(rank, signal.SIGKILL)
        run.process.wait(timeout=60)
        said = run.said
    assert f"rank 1 on {socket.gethostname()} did not answer within" in said
    assert "a collective failed (" in said


def test_a_rank_that_dies_is_named_and_restarted_from_the_newest_checkpoint(
    corpora: Path,
) -> None:
    arguments = ("--training.steps", "9", "--checkpoint.interval", "3")
    options = ("--max-restarts", "1")
    with start(corpora / "die", *arguments, ranks=2, fault="die", options=options) as run:
        said = run.ends_with(0)
    assert f"rank 1 on {socket.gethostname()} did not answer" in said
    assert f"resuming from {run.checkpoints / 'step-000000006'}" in said
    assert run.saved_steps() == [6, 9]


def test_a_signal_to_one_rank_stops_all(corpora: Path) -> None:
    with start(corpora / "one", *STEPS, ranks=2, options=("--max-restarts", "3")) as run:
        run.wait_for(r"4/40 +\d")
        os.kill(run.ranks()[-1], signal.SIGTERM)
        said = run.ends_with(143)
    assert said.splitlines()[-1] == "stopped by SIGTERM"
    assert run.saved_steps() == [run.last_step]
