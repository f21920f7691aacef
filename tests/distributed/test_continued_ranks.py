"""A tied head and biases train alike on one rank and two, sharded or replicated."""

from pathlib import Path

import pytest
import torch
from support.continued import write_continued_config
from support.folders import save_random_model
from support.ranks import run_on_ranks
from support.tiny import full_tensors, train_steps

from switchtitan.builders.trainer import build_trainer
from switchtitan.distributed.world import start_world
from switchtitan.job.config import parse_arguments

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

KINDS = ("llama3, tied", "qwen2", "qwen2, tied")
RUNS = [(kind, method) for kind in KINDS for method in ("switchlora", "full_rank")]
NUM_STEPS = 6
LAYOUTS = {1: (), 2: (), 4: ("--parallelism.replicate", "2")}
TOLERANCE = 1e-5
"""Of losses: sums over ranks have another order, which Adam amplifies."""


def train_all(rank: int, home: Path, num_ranks: int) -> None:
    results = {}
    for kind, method in RUNS:
        folder = home / f"{num_ranks} ranks" / f"{kind} {method}"
        file = write_continued_config(folder, home / kind, method)
        config = parse_arguments(["--config", str(file), *LAYOUTS[num_ranks]], num_ranks)
        trainer = build_trainer(config, start_world(config.parallelism))
        initial = full_tensors(trainer)
        losses = train_steps(trainer, NUM_STEPS)
        trainer.tensors.check_replicas()
        trainer.stepper.close()
        final = {name: value for name, value in full_tensors(trainer).items() if "model." in name}
        results[kind, method] = {"initial": initial, "losses": losses, "final": final}
    if rank == 0:
        torch.save(results, home / f"{num_ranks}.pt")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[int, dict]:
    home = corpora / "continued-ranks"
    for kind in KINDS:
        save_random_model(kind, home / kind)
    for num_ranks in LAYOUTS:
        run_on_ranks(num_ranks, train_all, home, num_ranks)
    return {num_ranks: torch.load(home / f"{num_ranks}.pt") for num_ranks in LAYOUTS}


@pytest.mark.parametrize(("kind", "method"), RUNS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_and_weights_are_those_of_one_rank(
    runs: dict[int, dict], num_ranks: int, kind: str, method: str
) -> None:
    one, many = runs[1][kind, method], runs[num_ranks][kind, method]
    assert many["initial"].keys() == one["initial"].keys()
    for name, value in one["initial"].items():
        assert torch.equal(many["initial"][name], value), name
    assert many["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert one["losses"][-1] < one["losses"][0] - 0.3
    names = [name for name in one["final"] if name.endswith(("embed_tokens.weight", ".bias"))]
    assert any(name.endswith(".bias") for name in names) == kind.startswith("qwen2")
    for name in names:
        moved = (one["final"][name] - one["initial"][name]).norm()
        assert moved > 0
        assert (many["final"][name] - one["final"][name]).norm() < 1e-2 * moved, name


def test_a_tied_head_is_stored_once(runs: dict[int, dict]) -> None:
    for (kind, _), result in runs[2].items():
        heads = [name for name in result["initial"] if "lm_head" in name]
        assert bool(heads) != ("tied" in kind)
