"""Killed at any moment, the same command continues with what would have happened."""

import random
import shutil
from pathlib import Path

import pytest
from support.fault_report import IS_LONG, record
from support.interrupted_runs import Outcome, arguments, check_folders, outcome
from support.kills import random_kill, run

NUM_CHAINS = 4 if IS_LONG else 1
KILLS_PER_CHAIN = 3 if IS_LONG else 1
MAX_RUNS = 2 * KILLS_PER_CHAIN + 3
"""A run ends without being killed if it does not reach the drawn moment."""
PHASES = ("start-up", "preparation", "training", "save", "async save", "pruning")
LONGEST_S = {
    "start-up": 0.4,
    "preparation": 0.2,
    "training": 0.05,
    "save": 0.1,
    "async save": 0.1,
    "pruning": 0.01,
}
"""About how long a phase lasts; a call that is shorter than the drawn time does not end the run,
the next one does."""


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Outcome]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(arguments(folder, is_async=True), request.param, folder / "log") == (
        [0] * request.param
    )
    return request.param, outcome(folder)


@pytest.mark.parametrize("chain", range(NUM_CHAINS))
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_ends_as_if_it_had_not_been(
    undisturbed: tuple[int, Outcome], phase: str, chain: int, tmp_path: Path
) -> None:
    num_ranks, expected = undisturbed
    source = random.Random(f"{phase} {chain} {num_ranks}")
    own = arguments(tmp_path, is_async=phase != "save")
    num_killed = 0
    for _ in range(MAX_RUNS):
        kill = random_kill(source, phase.removeprefix("async "), num_ranks, LONGEST_S[phase])
        is_killed = any(code < 0 for code in run(own, num_ranks, tmp_path / "log", kill))
        num_killed += is_killed
        check_folders(tmp_path)
        if not is_killed:  # otherwise nothing would be left to do
            shutil.rmtree(tmp_path / "run")
            shutil.rmtree(tmp_path / "corpora")
        if num_killed == KILLS_PER_CHAIN:
            break
    assert num_killed > 0
    assert run(own, num_ranks, tmp_path / "log") == [0] * num_ranks
    assert outcome(tmp_path) == expected
    record("kills", phase=phase, num_ranks=num_ranks, chains=1, kills=num_killed)


def test_another_seed_ends_otherwise(undisturbed: tuple[int, Outcome], tmp_path: Path) -> None:
    """The comparison can fail."""
    num_ranks, expected = undisturbed
    own = [*arguments(tmp_path, is_async=True), "--job.seed", "1"]
    assert run(own, num_ranks, tmp_path / "log") == [0] * num_ranks
    other = outcome(tmp_path)
    assert other.tensors != expected.tensors
    assert other.train_state != expected.train_state
    assert other.losses != expected.losses
