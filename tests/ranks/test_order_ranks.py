"""1, 2 and 4 ranks switch the same vectors first, and measure them in the switch's collective."""

from pathlib import Path

import pytest
import torch
from support.layouts import LAYOUTS, RELATIVE_LOSS_TOLERANCE, run_in_layouts
from support.tiny import full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.count_collectives import CountCommunication

# 0.75 switches per step: half a lap of 6 vectors takes 4 steps.
KEYS = ("--method.interval", "8", "--method.order")
NUM_STEPS = 18


def train(rank: int, folder: Path, layout: str) -> None:
    num_ranks, placement = LAYOUTS[layout]
    results = {}
    for order in ("least_moving", "ring"):
        keys = (*KEYS, order, *placement)
        trainer = tiny_trainer(
            folder / f"{layout} {order}", "switchlora", *keys, num_ranks=num_ranks
        )
        losses, orders, num_calls = [], [], []
        for _ in range(NUM_STEPS):
            with CountCommunication() as communication:
                losses += train_steps(trainer, 1)
            num_calls.append({str(key): of.num_calls for key, of in communication.counts.items()})
            state = trainer.stepper.optimizer.state_dict()
            orders.append(state.get("switch.order"))
        trainer.tensors.check_replicas()
        results[order] = {
            "losses": losses,
            "orders": orders,
            "num_calls": num_calls,
            "final": full_tensors(trainer),
        }
        trainer.stepper.close()
    if rank == 0:
        torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[str, dict]:
    return run_in_layouts(corpora / "orders", train)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orders_are_equal_on_any_number_of_ranks(runs, layout):
    one, several = runs["one"]["least_moving"], runs[layout]["least_moving"]
    assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    for step, (order, expected) in enumerate(zip(several["orders"], one["orders"], strict=True)):
        assert torch.equal(order, expected), step
    # In ring order, both halves of the vectors are sorted.
    halves = one["orders"][-1].view(14, 2, 3)
    assert (halves.sort(dim=2).values != halves).any(dim=(1, 2)).sum() > 7
    assert one["losses"] != runs["one"]["ring"]["losses"]
    assert not any(".switch.order" in name for name in runs[layout]["ring"]["final"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measurements_take_no_further_collective(runs, layout):
    measured, ring = (runs[layout][order]["num_calls"] for order in ("least_moving", "ring"))
    assert measured == ring
    # One is that of the loss.
    is_alone = all(sum(calls.values()) == 1 for calls in measured)
    assert is_alone == (layout == "one")
