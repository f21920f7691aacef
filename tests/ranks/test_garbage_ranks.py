"""Sharded training leaves no tensors to the garbage collector."""

from support.leftovers import tensors_left_by_fifteen_steps
from support.ranks import run_on_ranks
from support.tiny import COMPILED, METHOD_KEYS, tiny_trainer

REPLICATED = ["--parallelism.frozen_weights", "replicate"]
STEPS_TO_WATCH = [
    *((method, []) for method in METHOD_KEYS),
    *((method, REPLICATED) for method in METHOD_KEYS if "lora" in method),
    ("galore", COMPILED),
]


def count_leftovers(rank, folder):
    for method, overrides in STEPS_TO_WATCH:
        # Several micro-batches per step, so that gradients accumulate.
        batch = "--training.local_batch_size", "2"
        trainer = tiny_trainer(folder / method, method, *batch, *overrides, num_ranks=2)
        assert tensors_left_by_fifteen_steps(trainer) <= 0, (method, overrides)


def test_steps_on_two_ranks_leave_no_tensors_to_the_garbage_collector(corpora):
    run_on_ranks(2, count_leftovers, corpora / "leftovers-ranks")
