"""Killed or stopped at any moment, the same command ends as if nothing had happened."""

import random
import shutil
from functools import lru_cache
from itertools import product

import pytest
from support.interrupted import (
    NUM_STEPS,
    arguments,
    outcome,
    random_interrupt,
    run,
    saved_steps,
    steps_in,
)
from support.long_form import IS_LONG, num_cases
from support.preparation import start_preparation
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.checkpoint.load import verify
from switchtitan.data.config import DataConfig

SHORT = [*product(("killed", "stopped"), ("start-up", "training", "async save"), (2,))]
IN_BOTH = ("start-up", "training", "save", "async save")
LONG = [
    *product(("killed",), (*IN_BOTH, "preparation", "pruning"), (1, 2)),
    *product(("stopped",), (*IN_BOTH, "evaluation"), (1, 2, 4)),
]
"""End, phase and number of ranks."""
NUM_CHAINS, INTERRUPTS = num_cases(4, 1), num_cases(3, 1)
"""Chains of a row, and interrupts of a chain."""
MAX_RUNS = 2 * INTERRUPTS + 6
"""A run ends undisturbed if it does not reach the drawn moment."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def undisturbed(home):
    """The outcome for a number of ranks."""

    @lru_cache
    def outcome_on(num_ranks):
        folder = home / str(num_ranks)
        own = arguments(folder, home / "corpora", is_async=True)
        assert run(own, num_ranks, folder / "log") == [0] * num_ranks
        return outcome(folder)

    return outcome_on


def check_stop(folder, stop, codes, printed, step_before):
    """Checks a run that resumed from a step and was told to stop; it has lost no step."""
    status = 128 + stop.number
    if stop.phase == "start-up":
        # The others may miss the first rank that ends before they get their own signal.
        assert status in codes, printed
        assert set(codes) <= {status, 1}
        return
    assert codes == [status] * len(codes), printed
    assert "Traceback" not in printed
    assert not (folder / "run" / "run.owner").exists()
    steps = steps_in(printed)
    newest, last_step = max(saved_steps(folder), default=0), step_before + len(steps)
    assert steps == list(range(step_before + 1, last_step + 1))
    assert newest == last_step, printed
    if steps and last_step < NUM_STEPS:
        assert f"stopped at step {last_step}; the same command resumes from" in printed


@pytest.mark.parametrize("chain", range(NUM_CHAINS))
@pytest.mark.parametrize(("end", "phase", "num_ranks"), LONG if IS_LONG else SHORT)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    undisturbed, home, end, phase, num_ranks, chain, tmp_path
):
    expected = undisturbed(num_ranks)
    source = random.Random(f"{end} {phase} {num_ranks} {chain}")
    cache_dir = (tmp_path if phase == "preparation" else home) / "corpora"
    own = arguments(tmp_path, cache_dir, is_async=phase != "save")
    log, is_killed, num_interrupts = tmp_path / "log", end == "killed", 0
    for _ in range(MAX_RUNS):
        interrupt = random_interrupt(
            source, phase.removeprefix("async "), num_ranks, is_killed=is_killed
        )
        before = max(saved_steps(tmp_path), default=0)
        size = log.stat().st_size if log.exists() else 0
        codes = run(own, num_ranks, log, interrupt)
        for step in saved_steps(tmp_path):
            verify(tmp_path / "run" / "checkpoints" / f"step-{step:09d}")
        if codes == [0] * num_ranks:  # otherwise nothing would be left to do
            shutil.rmtree(tmp_path / "run")
            shutil.rmtree(tmp_path / "corpora", ignore_errors=True)
            log.unlink()
            continue
        if not is_killed:
            check_stop(tmp_path, interrupt, codes, log.read_text()[size:], before)
        num_interrupts += 1
        if num_interrupts == INTERRUPTS:
            break
    assert num_interrupts == INTERRUPTS
    assert run(own, num_ranks, log) == [0] * num_ranks
    assert outcome(tmp_path) == expected
    if not is_killed:
        assert steps_in(log.read_text()) == list(range(1, NUM_STEPS + 1))


def test_two_processes_prepare_one_corpus_once(tmp_path):
    write_json_lines(tmp_path / "in" / "a.jsonl", make_documents(120))
    keys = {"dataset": "jsonl", "path": tmp_path / "in", "vocab_size": 300}
    config = DataConfig(**keys, cache_dir=tmp_path / "corpora")
    both = [start_preparation(config) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    found = sorted(path.name.split("-")[0] + path.suffix for path in config.cache_dir.iterdir())
    assert found == ["jsonl", "jsonl.lock"]
