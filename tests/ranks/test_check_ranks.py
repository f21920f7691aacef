"""A bit that flips on one of two ranks is found and named; without the check the run continues."""

from functools import partial

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer, train_steps
from torch import Tensor

from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError
from switchtitan.training.stepper import StepResult
from switchtitan.training.trainer import Trainer

REPLICATED = ("--parallelism.replicate", "2")
CONSTANT = ("--method.candidates", "constant")
BF16 = ("--training.frozen_dtype", "bfloat16")
BF16_MOMENTS = ("--optimizer.moments_dtype", "bfloat16")
NO_SAVES = ("--checkpoint.interval", "100", "--evaluation.interval", "100")
WEIGHT = "model.model.layers.1.mlp.up_proj.weight"
# (method, overrides) -> tensors that both ranks hold.
HELD = {
    ("switchlora", REPLICATED): [
        WEIGHT,
        "model.model.embed_tokens.weight",
        "model.model.layers.0.self_attn.q_proj.lora_a",
        "model.model.layers.0.self_attn.q_proj.candidates_b",
        "optimizer.model.layers.0.self_attn.v_proj.lora_b.exp_avg",
        "optimizer.model.norm.weight.exp_avg_sq",
        "optimizer.model.norm.weight.step",
        "optimizer.switch.vector_steps",
        "optimizer.switch.freeze_steps_left",
    ],
    ("switchlora", ()): ["optimizer.switch.vector_steps", "optimizer.lm_head.weight.step"],
    ("switchlora", CONSTANT): ["optimizer.switch.candidate_keys"],
    ("relora", BF16): ["optimizer.reset.rounding_keys"],
    ("full_rank", BF16_MOMENTS): ["optimizer.lm_head.weight.rounding_key"],
    ("galore", ()): ["optimizer.model.layers.0.mlp.up_proj.weight.basis"],
    ("fira", ()): [
        "optimizer.model.layers.0.mlp.up_proj.weight.basis",
        "optimizer.projection.update_norms",
    ],
    ("apollo", ()): [
        "optimizer.model.layers.0.mlp.up_proj.weight.basis",
        "optimizer.projection.update_norms",
    ],
    ("apollo", REPLICATED): ["optimizer.model.layers.1.mlp.down_proj.weight.basis"],
}


def flip_bit(tensor: Tensor) -> None:
    """Flips the lowest bit of the first element."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = local(tensor.detach()).view(integers[tensor.element_size()])
    bits.view(-1)[0] ^= 1


def check_that_flips_are_found(rank, folder):
    for (method, overrides), names in HELD.items():
        trainer = build(folder, method, *overrides)
        train_steps(trainer, 3)
        trainer.check_ranks()
        tensors = trainer.tensors.held()
        for name in names:
            flips = partial(flip_bit, tensors[name]) if rank == 1 else lambda: None
            flips()
            with pytest.raises(RanksDisagreeError, match=rf"\({name}: rank 0 against rank 1[;)]"):
                trainer.check_ranks()
            flips()
            trainer.check_ranks()
        trainer.stepper.close()


def check_that_other_counts_are_found(rank, folder):
    trainer = build(folder, "switchlora")
    train_steps(trainer, 3)
    optimizer, state = trainer.stepper.optimizer, trainer.stepper.state
    for holder, attribute, name in [
        (state, "tokens_seen", "training.tokens_seen"),
        (state, "num_skipped", "training.batches_skipped"),
        (optimizer._counts, "step", "optimizer.switch.step"),
        (optimizer._counts, "num_switched", "optimizer.switch.num_switched"),
        (optimizer._exchange, "history", "optimizer.switch.plans"),
    ]:
        right = getattr(holder, attribute)
        if rank == 0:
            setattr(holder, attribute, right + 1)
        with pytest.raises(RanksDisagreeError, match=rf"\({name}: rank 0 against rank 1[;)]"):
            trainer.check_ranks()
        setattr(holder, attribute, right)
        trainer.check_ranks()
    trainer.stepper.close()


def check_methods_agree(rank, folder):
    for method in ("relora", "galore", "apollo_mini"):
        trainer = build(folder, method, *REPLICATED)
        # With new projections, in step 8, and a reset of ReLoRA, after step 9.
        train_steps(trainer, 10)
        trainer.check_ranks()
        trainer.stepper.close()


def check_runs(rank, folder):
    keys = (*REPLICATED, *NO_SAVES, "--training.steps", "8", "--parallelism.check_interval")
    # Found by the first check after the flip. Without checks, only before the save at the end.
    for interval, found_at in (("3", 6), ("0", 8)):
        trainer = build(folder / interval, "switchlora", *keys, interval)
        flip_after_step(trainer, 4, rank)
        with pytest.raises(RanksDisagreeError, match=rf"{WEIGHT}: rank 0 against rank 1"):
            trainer.train()
        assert trainer.stepper.state.step == found_at
        assert not list((folder / interval / "run").glob("checkpoints/step-*"))
    # A control: without any check the run continues and saves.
    trainer = build(folder / "none", "switchlora", *keys, "0")
    trainer.tensors.check_state = lambda numbers: None
    flip_after_step(trainer, 4, rank)
    trainer.train()
    assert list((folder / "none" / "run").glob("checkpoints/step-*"))


def flip_after_step(trainer: Trainer, number: int, rank: int) -> None:
    step, weight = trainer.stepper.step, trainer.tensors()[WEIGHT]

    def flipping_step() -> StepResult:
        result = step()
        if rank == 1 and trainer.stepper.state.step == number:
            flip_bit(weight)
        return result

    trainer.stepper.step = flipping_step


def build(folder, method, *overrides):
    return tiny_trainer(folder, method, *overrides, num_ranks=2)


def check_all(rank, folder):
    check_that_flips_are_found(rank, folder / "flips")
    check_that_other_counts_are_found(rank, folder / "counts")
    check_methods_agree(rank, folder / "agree")
    check_runs(rank, folder / "runs")


def test_a_flipped_bit_on_one_rank_is_found_and_named(corpora):
    folder = corpora / "check-ranks"
    for name in ("flips", "counts", "agree", "runs"):
        (folder / name).mkdir(parents=True)
    run_on_ranks(2, check_all, folder)
