"""Rescaled second moments are equal on 1, 2 and 4 ranks, and take no further collective."""

from pathlib import Path

import pytest
import torch
from support.layouts import LAYOUTS, RELATIVE_LOSS_TOLERANCE, run_in_layouts
from support.tiny import full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.count_collectives import CountCommunication

NUM_STEPS = 12


def train(rank: int, folder: Path, layout: str) -> None:
    num_ranks, placement = LAYOUTS[layout]
    results = {}
    for reset in ("rescaled", "momentum"):
        keys = ("--method.reset_moments", reset, *placement)
        trainer = tiny_trainer(
            folder / f"{layout} {reset}", "switchlora", *keys, num_ranks=num_ranks
        )
        losses = train_steps(trainer, NUM_STEPS)
        trainer.tensors.check_replicas()
        before = full_tensors(trainer)
        with CountCommunication() as communication:
            trainer.stepper.optimizer.switch()
        results[reset] = {
            "losses": losses,
            "before": before,
            "after": full_tensors(trainer),
            "calls": {str(key): count.num_calls for key, count in communication.counts.items()},
        }
        trainer.stepper.close()
    if rank == 0:
        torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[str, dict]:
    return run_in_layouts(corpora / "rescaled-moments", train)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_factors_of_moments_are_equal_on_any_number_of_ranks(runs, layout):
    one, several = runs["one"]["rescaled"], runs[layout]["rescaled"]
    assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert one["losses"] != runs["one"]["momentum"]["losses"]
    num_rescaled = 0
    for key, before in one["before"].items():
        if ".lora_" not in key or not key.endswith(".exp_avg_sq"):
            continue
        # [rank] each: the mean over a vector is multiplied by the same number.
        factors = [run["after"][key].mean(1) / run["before"][key].mean(1) for run in (one, several)]
        torch.testing.assert_close(factors[1], factors[0], rtol=1e-3, atol=0)
        num_rescaled += int((factors[0] != 1).sum())
        assert before.shape == several["before"][key].shape
    # 14 layers switch 6 / 5 vectors of each factor per step.
    assert num_rescaled >= 2 * 14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rescaling_takes_no_further_collective(runs, layout):
    rescaled, momentum = (runs[layout][reset]["calls"] for reset in ("rescaled", "momentum"))
    assert rescaled == momentum
    assert sum(rescaled.values()) == (0 if layout == "one" else 1)
