"""Candidates in bfloat16 in host memory: the same on 1, 2 and 4 ranks, and from a checkpoint on any number of them."""

import shutil

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer, train_steps, whole_tensors

KEYS = ("--method.candidates_dtype", "bfloat16", "--method.candidates_device", "host")
SAVED_STEP, NUM_STEPS = 9, 16
# Sums over ranks are taken in another order; Adam amplifies that where gradients are near zero.
RELATIVE_LOSS_TOLERANCE = 1e-5
# Factors hold candidates, up to updates that change no bit.
STILL = ("--optimizer.lr", "1e-30", "--method.freeze_steps", "0")
# By number of ranks, in the order of running: (name, steps, settings). "first" leaves a checkpoint, "second" goes on from it.
RUNS = {
    2: [("straight", NUM_STEPS, ()), ("first", SAVED_STEP, ()), ("second", NUM_STEPS - SAVED_STEP, ())],
    4: [("still", 12, (*STILL, "--parallelism.replicate", "2")), ("second", NUM_STEPS - SAVED_STEP, ())],
    1: [("still", 12, STILL)],
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
            home, "switchlora", *KEYS, *("--training.local_batch_size", "2"), *overrides, num_ranks=num_ranks
        )
        losses = train_steps(trainer, num_steps)
        results[name] = {"losses": losses, "tensors": whole_tensors(trainer)}
        if name == "first":
            trainer.checkpointer.save(num_steps, trainer.tensors(), vars(trainer.stepper.state))
            trainer.checkpointer.finish()
        trainer.stepper.close()
    if rank == 0:
        torch.save(results, result_file)


@pytest.fixture(scope="module")
def runs(corpora):
    """What was recorded: runs[number of ranks][name]."""
    folder = corpora / "host-ranks"
    folder.mkdir()
    for num_ranks in RUNS:
        run_on_ranks(num_ranks, run_all, folder, folder / f"result-{num_ranks}.pt", num_ranks)
    return {num_ranks: torch.load(folder / f"result-{num_ranks}.pt") for num_ranks in RUNS}


@pytest.mark.distributed
def test_vectors_go_and_come_as_the_same_bits_on_any_number_of_ranks(runs):
    one, several = runs[1]["still"]["tensors"], runs[4]["still"]["tensors"]
    assert one["optimizer.switch.num_switched"].min() == 14, "candidates of small layers have come back"
    for name, tensor in one.items():
        if name.startswith("model.") and (".lora_" in name or ".candidates_" in name):
            assert torch.equal(several[name], tensor), name


@pytest.mark.distributed
def test_run_goes_on_bitwise_on_as_many_ranks_and_to_rounding_on_others(runs):
    straight, second = runs[2]["straight"], runs[2]["second"]
    assert runs[2]["first"]["losses"] + second["losses"] == straight["losses"]
    assert straight["losses"][-1] < straight["losses"][0]
    for name, tensor in straight["tensors"].items():
        assert torch.equal(second["tensors"][name], tensor), name
        assert (tensor.dtype == torch.bfloat16) == (".candidates_" in name), name
    expected = straight["losses"][SAVED_STEP:]
    assert runs[4]["second"]["losses"] == pytest.approx(expected, rel=RELATIVE_LOSS_TOLERANCE)
