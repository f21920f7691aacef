"""Optimizers on several ranks train as on one, and resume on another number of ranks."""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.packages import HAS_TORCHAO
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_trainer, train_steps

NUM_STEPS, SAVED_STEP = 10, 4
KEYS = {
    "adafactor": ("--optimizer.name", "adafactor", "--optimizer.lr", "0.1"),
    "adamw_bf16": ("--optimizer.lr", "1e-2", "--optimizer.moments_dtype", "bfloat16"),
    "adamw8bit": ("--optimizer.name", "adamw8bit", "--optimizer.lr", "1e-2"),
    "muon": ("--optimizer.name", "muon", "--optimizer.lr", "2e-2"),
    "scale": ("--optimizer.name", "scale", "--optimizer.lr", "1e-2"),
    "sgd": ("--optimizer.name", "sgd", "--optimizer.lr", "0.3", "--optimizer.nesterov", "true"),
}
if not HAS_TORCHAO:
    del KEYS["adamw8bit"]
# Sums over ranks have another order.
RELATIVE_LOSS_TOLERANCE = 1e-5


def build(folder, optimizer, num_ranks):
    keys = (*KEYS[optimizer], "--training.local_batch_size", "2")
    return tiny_trainer(folder, "full_rank", *keys, num_ranks=num_ranks)


def run_all(rank, folder, num_ranks):
    results = {}
    for optimizer in KEYS:
        straight = build(folder / f"{optimizer}-{num_ranks}", optimizer, num_ranks)
        losses = train_steps(straight, SAVED_STEP)
        if num_ranks == 2:
            straight.save()
            straight.checkpointer.finish()
            check_that_ranks_agree(straight)
        losses += train_steps(straight, NUM_STEPS - SAVED_STEP)
        straight.stepper.close()
        home = folder / f"{optimizer}-resumed-{num_ranks}"
        if rank == 0:
            shutil.copytree(folder / f"{optimizer}-2", home)
        dist.barrier()
        resumed = build(home, optimizer, num_ranks)
        assert resumed.stepper.state.step == SAVED_STEP
        after = train_steps(resumed, NUM_STEPS - SAVED_STEP)
        resumed.stepper.close()
        results[optimizer] = {"losses": losses, "resumed": after, "tensors": full_tensors(resumed)}
    if rank == 0:
        torch.save(results, folder / f"{num_ranks}.pt")


def check_that_ranks_agree(trainer):
    """Unsharded state is bitwise equal on every rank."""
    for name, tensor in trainer.stepper.optimizer.state_dict().items():
        if not hasattr(tensor, "full_tensor"):
            first = tensor.clone()
            dist.broadcast(first, src=0)
            assert torch.equal(tensor, first), name


@pytest.fixture(scope="module")
def runs(corpora):
    folder = corpora / "optimizers-ranks"
    folder.mkdir()
    for num_ranks in (2, 1):
        run_on_ranks(num_ranks, run_all, folder, num_ranks)
    return {num_ranks: torch.load(folder / f"{num_ranks}.pt") for num_ranks in (2, 1)}


@pytest.mark.parametrize("optimizer", KEYS)
def test_two_ranks_train_as_one(runs, optimizer):
    one, two = runs[1][optimizer], runs[2][optimizer]
    assert one["losses"][-1] < one["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)


@pytest.mark.parametrize("optimizer", KEYS)
def test_a_save_on_two_ranks_resumes_bitwise_on_two_and_also_on_one(runs, optimizer):
    straight = runs[2][optimizer]["losses"][SAVED_STEP:]
    assert runs[2][optimizer]["resumed"] == straight
    assert runs[1][optimizer]["resumed"] == pytest.approx(straight, rel=RELATIVE_LOSS_TOLERANCE)
    one, two = runs[1][optimizer]["tensors"], runs[2][optimizer]["tensors"]
    assert one.keys() == two.keys()
    assert any(name.startswith("optimizer.") for name in one)
