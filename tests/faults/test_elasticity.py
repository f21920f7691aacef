"""A run that is resumed on other numbers of ranks, again and again, is the run on one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.long_form import IS_LONG
from support.ranks import run_on_ranks
from support.tiny import COMPILED, full_tensors, tiny_trainer, train_steps

from switchtitan.training.trainer import Trainer

NUM_STEPS = 5
"""Of each leg: the fourth reaches a full turn of the switches."""
LEGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ()),
    (1, ("--method.candidates_device", "host")),
    (4, ("--parallelism.frozen_weights", "gather_once")),
    (4, ("--parallelism.replicate", "2", "--method.candidates_device", "host")),
    # Compiling takes longer than everything else.
    (1, COMPILED if IS_LONG else ()),
)
"""Number of ranks and keys of each leg; all but the first resume."""
RELATIVE_LOSS_TOLERANCE = 1e-5
"""Sums over ranks have another order; Adam amplifies that for gradients near zero."""


def watch_data(trainer: Trainer) -> list[list[list[int]]]:
    """Returns a list that gets the sequences of each global batch, sorted: ranks share them."""
    batches: list[list[list[int]]] = []
    stepper = trainer.stepper
    forward_backward = stepper.forward_backward

    def watched(micro_batches: list) -> torch.Tensor:
        own = [row for batch in micro_batches for row in batch.tokens.tolist()]
        of_ranks: list[list[list[int]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
        batches.append(sorted(row for rows in of_ranks for row in rows))
        return forward_backward(micro_batches)

    stepper.forward_backward = watched  # type: ignore[method-assign]
    return batches


def train_leg(rank: int, home: Path, num_steps: int, leg: int, file: Path) -> None:
    num_ranks, keys = LEGS[leg]
    trainer = tiny_trainer(home, "switchlora", *keys, num_ranks=num_ranks)
    state = trainer.stepper.state
    first_step = state.step
    batches = watch_data(trainer)
    losses = train_steps(trainer, num_steps)
    trainer.tensors.check_replicas()
    trainer.checkpointer.save(state.step, trainer.tensors(), vars(state))
    trainer.checkpointer.finish()
    trainer.stepper.close()
    final, metrics = full_tensors(trainer), trainer.stepper.optimizer.metrics()  # collective
    if rank == 0:
        facts = {"tokens_seen": state.tokens_seen, "next_batch": state.next_batch}
        torch.save(
            {
                "first_step": first_step,
                "losses": losses,
                "batches": batches,
                "final": final,
                "state": {**facts, "step": state.step},
                "metrics": metrics,
            },
            file,
        )


def integers_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Counts and plans: all integers, and all of the switch's own state."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or name.startswith("optimizer.switch.")
    }


@pytest.fixture(scope="module")
def straight(corpora: Path) -> dict[str, Any]:
    """The run on one rank, without a stop."""
    folder = corpora / "elastic-straight"
    folder.mkdir()
    run_on_ranks(1, train_leg, folder, NUM_STEPS * len(LEGS), 1, folder / "result.pt")
    return torch.load(folder / "result.pt")


def check_chain(home: Path, expected: dict[str, Any]) -> float:
    """Trains all legs and compares each; returns the greatest relative difference of a loss."""
    home.mkdir()
    greatest = 0.0
    for leg, (num_ranks, _) in enumerate(LEGS):
        run_on_ranks(num_ranks, train_leg, home, NUM_STEPS, leg, home / f"{leg}.pt")
        found = torch.load(home / f"{leg}.pt")
        own = slice(leg * NUM_STEPS, (leg + 1) * NUM_STEPS)
        assert found["first_step"] == own.start
        assert found["batches"] == expected["batches"][own]
        assert found["losses"] == pytest.approx(
            expected["losses"][own], rel=RELATIVE_LOSS_TOLERANCE
        )
        pairs = zip(found["losses"], expected["losses"][own], strict=True)
        greatest = max(greatest, *(abs(loss / other - 1) for loss, other in pairs))
    assert found["state"] == expected["state"]
    assert found["final"].keys() == expected["final"].keys()
    integers = integers_of(expected["final"])
    assert "optimizer.switch.num_switched" in integers
    for name, tensor in integers.items():
        assert torch.equal(found["final"][name], tensor), name
    assert (
        found["metrics"]["switch/vectors_switched_total"]
        == expected["metrics"]["switch/vectors_switched_total"]
    )
    return greatest


def test_a_run_on_changing_numbers_of_ranks_is_the_run_on_one(
    corpora: Path, straight: dict[str, Any]
) -> None:
    assert straight["losses"][-1] < straight["losses"][0]
    check_chain(corpora / "elastic", straight)


def test_another_order_of_the_data_is_noticed(corpora: Path, straight: dict[str, Any]) -> None:
    """The comparison can fail."""
    batches = straight["batches"]
    other = {**straight, "batches": [batches[1], batches[0], *batches[2:]]}
    with pytest.raises(AssertionError):
        check_chain(corpora / "elastic-other", other)
