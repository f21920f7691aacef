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

pytestmark = pytest.mark.timeout(900)

KINDS = ("llama3, tied", "qwen2", "qwen2, tied")
RUNS = [(kind, method) for kind in KINDS for method in ("switchlora", "full_rank")]
NUM_STEPS = 6
LAYOUTS = {
    "one": (1, ()),
    "two": (2, ()),
    "two, one unit": (
        2,
        (
            *("--parallelism.blocks_per_unit", "2", "--parallelism.reshard_after_forward", "false"),
            *("--activation_checkpoint.mode", "full", "--training.local_batch_size", "1"),
        ),
    ),
    "two by two": (4, ("--parallelism.replicate", "2")),
}
TOLERANCE = 1e-5
"""Of losses: sums over ranks have another order, which Adam amplifies."""


def train_all(rank: int, home: Path, layout: str) -> None:
    results = {}
    num_ranks, keys = LAYOUTS[layout]
    for kind, method in RUNS:
        folder = home / layout / f"{kind} {method}"
        file = write_continued_config(folder, home / kind, method)
        config = parse_arguments(["--config", str(file), *keys], num_ranks)
        trainer = build_trainer(config, start_world(config.parallelism))
        initial = full_tensors(trainer)
        losses = train_steps(trainer, NUM_STEPS)
        trainer.tensors.check_replicas()
        trainer.stepper.close()
        final = {name: value for name, value in full_tensors(trainer).items() if "model." in name}
        results[kind, method] = {"initial": initial, "losses": losses, "final": final}
    if rank == 0:
        torch.save(results, home / f"{layout}.pt")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[str, dict]:
    home = corpora / "continued-ranks"
    for kind in KINDS:
        save_random_model(kind, home / kind)
    for layout, (num_ranks, _) in LAYOUTS.items():
        run_on_ranks(num_ranks, train_all, home, layout)
    return {layout: torch.load(home / f"{layout}.pt") for layout in LAYOUTS}


@pytest.mark.parametrize(("kind", "method"), RUNS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
def test_losses_and_weights_are_those_of_one_rank(
    runs: dict[str, dict], layout: str, kind: str, method: str
) -> None:
    one, many = runs["one"][kind, method], runs[layout][kind, method]
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


def test_a_tied_head_is_stored_once(runs: dict[str, dict]) -> None:
    for (kind, _), result in runs["two"].items():
        heads = [name for name in result["initial"] if "lm_head" in name]
        assert bool(heads) != ("tied" in kind)
