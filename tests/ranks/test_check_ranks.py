"""A bit that flips on one of two ranks is found, and the tensor is named."""

import pytest
import torch
from support.layouts import asked_for
from support.ranks import run_rows_on_ranks
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError

REPLICATED = ("--parallelism.replicate", "2")
WHOLE = ("--parallelism.frozen_weights", "replicate")
CONSTANT = ("--method.candidates", "constant")
INT16 = ("--training.frozen_dtype", "int16")
NO_SAVES = ("--checkpoint.interval", "100", "--evaluation.interval", "100")
WEIGHT = "model.model.layers.1.mlp.up_proj.weight"
BASIS = "optimizer.model.layers.0.mlp.up_proj.weight.basis"
# Method and keys -> tensors that both ranks hold.
HELD = {
    ("switchlora", *REPLICATED): [
        WEIGHT,
        "model.model.embed_tokens.weight",
        "model.model.layers.0.self_attn.q_proj.lora_a",
        "model.model.layers.0.self_attn.q_proj.candidates_b",
        "optimizer.model.layers.0.self_attn.v_proj.lora_b.exp_avg",
        "optimizer.model.norm.weight.exp_avg_sq",
        "optimizer.model.norm.weight.step",
    ],
    ("switchlora", *WHOLE): [WEIGHT, "optimizer.lm_head.weight.step"],
    ("switchlora", *CONSTANT): ["optimizer.switch.candidate_keys"],
    ("relora", *INT16): ["optimizer.reset.rounding_keys"],
    ("galore",): [BASIS],
    ("fira",): [BASIS, "optimizer.projection.update_norms"],
    ("apollo", *REPLICATED): [BASIS],
}
# Number of steps between checks -> the step in which the first check finds a flip after step 4;
# without checks that before the save at the end.
FOUND_AT = {"3": 6, "0": 8}


def flip_bit(tensor):
    """Flips the lowest bit of the first element."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = local(tensor.detach()).view(integers[tensor.element_size()])
    bits.view(-1)[0] ^= 1


def check_that_flips_are_found(rank, folder, method, keys, names):
    trainer = tiny_trainer(folder, method, *keys, num_ranks=2)
    train_steps(trainer, 3)
    trainer.check_ranks()
    replicated = trainer.stepper.optimizer.replicated()
    tensors = trainer.tensors() | {f"optimizer.{name}": replicated[name] for name in replicated}
    for name in names:
        if rank == 1:
            flip_bit(tensors[name])
        check_refused(trainer, name)
        if rank == 1:
            flip_bit(tensors[name])
        trainer.check_ranks()
    trainer.stepper.close()


def check_refused(trainer, name):
    with pytest.raises(RanksDisagreeError, match=rf"\({name}[,)]"):
        trainer.check_ranks()


def check_that_other_counts_are_found(rank, folder):
    trainer = tiny_trainer(folder, "switchlora", num_ranks=2)
    train_steps(trainer, 3)
    state, optimizer = trainer.stepper.state, trainer.stepper.optimizer
    for attribute, name in (("tokens_seen", "tokens_seen"), ("num_skipped", "batches_skipped")):
        right = getattr(state, attribute)
        setattr(state, attribute, right + (rank == 0))
        check_refused(trainer, f"training.{name}")
        setattr(state, attribute, right)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    for name in ("switch.step", "switch.num_switched", "switch.last_switched"):
        optimizer.load_state_dict(saved | {name: saved[name] + (rank == 0)})
        check_refused(trainer, f"optimizer.{name}")
        optimizer.load_state_dict(saved)
    trainer.check_ranks()
    trainer.stepper.close()


def check_run(rank, folder, interval, found_at):
    """A bit of rank 1 flips after step 4 of 8."""
    keys = (*REPLICATED, *NO_SAVES, "--training.steps", "8")
    keys += ("--parallelism.check_interval", interval)
    trainer = tiny_trainer(folder, "switchlora", *keys, num_ranks=2)
    step, weight = trainer.stepper.step, trainer.tensors()[WEIGHT]

    def flipping_step():
        result = step()
        if rank == 1 and trainer.stepper.state.step == 4:
            flip_bit(weight)
        return result

    trainer.stepper.step = flipping_step
    with pytest.raises(RanksDisagreeError, match=rf"\({WEIGHT}[,)]"):
        trainer.train()
    assert trainer.stepper.state.step == found_at
    assert not list((folder / "run").glob("checkpoints/step-*"))


CHECKS = {
    **{
        " ".join((method, *keys)): (check_that_flips_are_found, method, keys, names)
        for (method, *keys), names in HELD.items()
    },
    "other counts": (check_that_other_counts_are_found,),
    **{f"checks every {n} steps": (check_run, n, found_at) for n, found_at in FOUND_AT.items()},
}


def check_one(rank, name, folder):
    check, *args = CHECKS[name]
    check(rank, folder / name, *args)


@pytest.fixture(scope="module")
def errors(corpora, request):
    folder = corpora / "check-ranks"
    folder.mkdir()
    return run_rows_on_ranks(2, check_one, asked_for(request, CHECKS), folder)


@pytest.mark.parametrize("name", CHECKS)
def test_what_differs_on_one_rank_is_found_and_named(errors, name):
    assert name not in errors, errors[name]
