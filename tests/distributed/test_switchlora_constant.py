"""Candidates that are drawn when needed: the same on 1, 2 and 4 ranks, and from a checkpoint on any number of them."""

import shutil

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer, train_steps, whole_tensors

NUM_STEPS, SAVED_STEP = 16, 8
# Sums over ranks are taken in another order; Adam amplifies that where gradients are near zero.
RELATIVE_LOSS_TOLERANCE = 1e-5
# Factors hold candidates, up to updates that change no bit.
STILL = ("--optimizer.lr", "1e-30", "--method.freeze_steps", "0")
REPLICATED = ("--parallelism.replicate", "2")
# By number of ranks, in the order of running: (name, steps, settings). "first" leaves a checkpoint, "second" goes on from it.
RUNS = {
    2: [("straight", NUM_STEPS, ()), ("first", SAVED_STEP, ()), ("second", NUM_STEPS - SAVED_STEP, ())],
    4: [("straight", NUM_STEPS, ()), ("replicated", NUM_STEPS, REPLICATED), ("still", 4, STILL)],
    1: [("straight", NUM_STEPS, ()), ("still", 4, STILL), ("second", NUM_STEPS - SAVED_STEP, ())],
}


def run_all(rank, folder, result_file, num_ranks):
    """Several runs in the same processes, since those take longest to start."""
    results = {}
    for name, num_steps, overrides in RUNS[num_ranks]:
        home = folder / f"{name}-{num_ranks}"
        if name == "second" and rank == 0:
            shutil.copytree(folder / "first-2", home)
        torch.distributed.barrier()
        trainer = tiny_trainer(
            home,
            "switchlora",
            *("--method.candidates", "constant", "--training.local_batch_size", "2"),
            *overrides,
            num_ranks=num_ranks,
        )
        assert trainer.stepper.state.step == (SAVED_STEP if name == "second" else 0)
        initial = whole_tensors(trainer)
        losses = train_steps(trainer, num_steps)
        results[name] = {"initial": initial, "losses": losses, "final": whole_tensors(trainer)}
        if name == "first":
            trainer.checkpointer.save(num_steps, trainer.tensors(), vars(trainer.stepper.state))
            trainer.checkpointer.finish()
        trainer.stepper.close()
    if rank == 0:
        torch.save(results, result_file)


@pytest.fixture(scope="module")
def runs(corpora):
    """What was recorded: runs[number of ranks][name]."""
    folder = corpora / "constant-ranks"
    folder.mkdir()
    for num_ranks in RUNS:
        run_on_ranks(num_ranks, run_all, folder, folder / f"result-{num_ranks}.pt", num_ranks)
    return {num_ranks: torch.load(folder / f"result-{num_ranks}.pt") for num_ranks in RUNS}


@pytest.mark.distributed
def test_any_number_of_ranks_starts_and_trains_alike(runs):
    one = runs[1]["straight"]
    assert one["losses"][-1] < one["losses"][0]
    assert not any("candidates" in name for name in one["final"])
    for several in (runs[2]["straight"], runs[4]["straight"], runs[4]["replicated"]):
        for name, tensor in one["initial"].items():
            assert torch.equal(several["initial"][name], tensor), name
        assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
        for name, tensor in one["final"].items():
            if name.startswith("optimizer.switch."):
                assert torch.equal(several["final"][name], tensor), name


@pytest.mark.distributed
def test_vectors_switched_in_are_the_same_bits_on_any_number_of_ranks(runs):
    one, several = runs[1]["still"], runs[4]["still"]
    num_changed = 0
    for name, tensor in one["final"].items():
        if name.startswith("model.") and ".lora_" in name:
            assert torch.equal(several["final"][name], tensor), name
            num_changed += not torch.equal(one["initial"][name], tensor)
    assert num_changed == 28, "every factor of 14 layers took candidates in"


@pytest.mark.distributed
def test_run_goes_on_bitwise_on_as_many_ranks_and_to_rounding_on_others(runs):
    straight = runs[2]["straight"]
    assert runs[2]["first"]["losses"] == straight["losses"][:SAVED_STEP]
    assert runs[2]["second"]["losses"] == straight["losses"][SAVED_STEP:]
    for name, tensor in straight["final"].items():
        assert torch.equal(runs[2]["second"]["final"][name], tensor), name
    others = runs[1]["second"]["losses"]
    assert others == pytest.approx(straight["losses"][SAVED_STEP:], rel=RELATIVE_LOSS_TOLERANCE)
