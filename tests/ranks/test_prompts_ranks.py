"""Two ranks continue prompts as one rank does, however weights are sharded, and train on."""

import json

import torch
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world

PROMPTS = json.dumps(["def main(", "größe", ""])
KEYS = ("--evaluation.prompts", PROMPTS, "--evaluation.prompt_tokens", "6")
CASES = {
    "full_rank": ("full_rank",),
    "freed after forward": ("full_rank", "--parallelism.reshard_after_forward", "true"),
    "tied head": ("full_rank", "--model.tied_head", "true"),
    "low rank": ("switchlora",),
    "gathered once": ("switchlora", "--parallelism.frozen_weights", "gather_once"),
    "replicated": ("switchlora", "--parallelism.frozen_weights", "replicate"),
    "recomputed": ("switchlora", "--activation_checkpoint.mode", "selective"),
}


def continue_prompts(rank, folder, num_ranks):
    """Writes the continuations of the initial weights, the same for any number of ranks."""
    found = {}
    for name, (method, *overrides) in CASES.items():
        own = folder / f"{num_ranks}-{name.replace(' ', '-')}"
        trainer = tiny_trainer(own, method, *overrides, *KEYS, num_ranks=num_ranks)
        found[name] = trainer.evaluators.prompts(trainer.stepper.model)
        ends = []
        for is_interrupted in (True, False):
            if not is_interrupted:
                trainer = tiny_trainer(own, method, *overrides, *KEYS, num_ranks=num_ranks)
            for _ in range(3):
                train_steps(trainer, 1)
                if is_interrupted:
                    trainer.evaluators.prompts(trainer.stepper.model)
            ends.append(full_tensors(trainer))
            trainer.close()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1]), name
    (folder / f"continuations-{num_ranks}-{rank}.json").write_text(json.dumps(found))


def test_two_ranks_continue_prompts_as_one_and_train_on_as_without(corpora):
    folder = corpora / "prompts-ranks"
    folder.mkdir()
    continue_prompts(0, folder, 1)
    stop_world()
    run_on_ranks(2, continue_prompts, folder, 2)
    one, *two = [
        json.loads((folder / f"continuations-{num_ranks}-{rank}.json").read_text())
        for num_ranks, rank in ((1, 0), (2, 0), (2, 1))
    ]
    assert two == [one, one]
    assert all(any(text for _, text in one[name]) for name in CASES)
