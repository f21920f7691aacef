"""Signals and hung ranks end a run as docs/USAGE.md says, in real processes."""

import os
import random
import signal
import socket
import time
from pathlib import Path

from support.launched_runs import start

from switchtitan.training.signals import SAME_ACTION_S, UNWIND_S

STEPS = ("--training.steps", "40")
SAVE_IN_STEP_5 = ("--checkpoint.interval", "5")


def test_the_launcher_passes_a_signal_on_and_no_step_is_lost(corpora: Path) -> None:
    number = random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    with start(corpora / "signal", *STEPS, ranks=2) as run:
        run.wait_for(r"\d/40 +\d")
        time.sleep(random.uniform(0, 0.2))
        os.kill(run.process.pid, number)
        said = run.ends_with(128 + number)
    assert run.saved_steps() == [run.last_step]
    assert f"stopped at step {run.last_step}; the same command resumes from" in said
    assert "Traceback" not in said


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


def test_a_signal_while_a_rank_hangs_names_that_rank_once(corpora: Path) -> None:
    with start(corpora / "hang-signal", *STEPS, ranks=2, fault="hang") as run:
        run.wait_for(r" 7/40 +\d")
        os.kill(run.ranks()[0], signal.SIGTERM)
        run.wait_for("cannot save: rank 1 ")
        time.sleep(UNWIND_S + 1)
        for rank in run.ranks():
            os.kill(rank, signal.SIGKILL)
        run.process.wait(timeout=60)
        said = run.said
    # At once, and as the reason at the end, which the launcher may not live to print.
    assert said.count("error: cannot save: rank 1 ") in (1, 2), said


def test_a_signal_to_one_rank_stops_all(corpora: Path) -> None:
    with start(corpora / "one", *STEPS, ranks=2, options=("--max-restarts", "3")) as run:
        run.wait_for(r"4/40 +\d")
        os.kill(run.ranks()[-1], signal.SIGTERM)
        said = run.ends_with(143)
    assert said.splitlines()[-1] == "stopped by SIGTERM"
    assert run.saved_steps() == [run.last_step]
