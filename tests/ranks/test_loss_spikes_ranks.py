"""All ranks roll back alike at a loss spike of one rank."""

import torch
from support.ranks import run_on_ranks
from support.spikes import (
    BAD_BATCH,
    GUARD,
    PASSED_OVER,
    raise_loss_of_batch,
    run_without_batches,
    spoil_gradient_of_batch,
)
from support.tiny import full_tensors, tiny_trainer

# (overrides, spoil)
RUNS = {
    "sharded": ((), raise_loss_of_batch),
    "replicated": (("--parallelism.replicate", "2"), spoil_gradient_of_batch),
}


def run_all(rank, folder):
    for name, (overrides, spoil) in RUNS.items():
        trainer = tiny_trainer(folder / name, "switchlora", *GUARD, *overrides, num_ranks=2)
        if rank == 1:
            spoil(trainer.stepper, BAD_BATCH)
        trainer.train()
        trainer.check_ranks()
        assert trainer.stepper.state.num_rollbacks == 1
        assert trainer.stepper.state.passed_over == PASSED_OVER
        without = run_without_batches(
            folder / f"{name}-without", "switchlora", PASSED_OVER, *overrides, num_ranks=2
        )
        expected = full_tensors(without)
        for key, tensor in full_tensors(trainer).items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_all_ranks_pass_over_the_same_batches(corpora):
    folder = corpora / "spike-ranks"
    folder.mkdir()
    run_on_ranks(2, run_all, folder)
