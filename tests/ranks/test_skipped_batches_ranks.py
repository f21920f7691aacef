"""A loss or gradient that is not finite on one rank skips the batch on all ranks."""

from functools import partial

import torch
from support.ranks import run_on_ranks
from support.skipping import SKIP, differing, outcome

LAYOUTS = {"sharded": (), "replicated": ("--parallelism.replicate", "2")}
CASES = [
    ("switchlora", "sharded", "gradient"),
    ("switchlora", "replicated", "loss"),
    ("galore", "sharded", "loss"),
    ("full_rank", "replicated", "gradient"),
]


def run_all(rank, folder):
    different = {}
    for method, layout, spoil in CASES:
        run = partial(outcome, folder, method, *SKIP, *LAYOUTS[layout], num_ranks=2, num_steps=5)
        without = run(leaves_out=True)
        spoiled = run(spoil=spoil, spoils_here=rank == 1)
        different[method, layout, spoil] = differing(spoiled, without)
    # A control: the batch matters.
    different["control"] = differing(run(), without)
    torch.save(different, folder / f"rank-{rank}.pt")


def test_a_bad_batch_on_one_rank_is_left_out_on_all_ranks(corpora):
    folder = corpora / "skipping-ranks"
    folder.mkdir()
    run_on_ranks(2, run_all, folder)
    for rank in (0, 1):
        different = torch.load(folder / f"rank-{rank}.pt")
        assert different.pop("control")
        assert different == {case: [] for case in CASES}
