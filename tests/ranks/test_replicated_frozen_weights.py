"""Replicated frozen weights train like sharded ones, are bitwise equal on all ranks, and have the
same checkpoints."""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps
from torch.distributed.tensor import DTensor

from switchtitan.checkpoint.metadata import read_tensors_index
from switchtitan.distributed.shards import gather_on_main
from switchtitan.errors import RanksDisagreeError
from switchtitan.methods import METHODS
from switchtitan.methods.lowrank import low_rank_layers

NUM_STEPS, SAVED_STEP = 12, 6
# Sums over ranks have another order; Adam amplifies that for gradients near zero.
RELATIVE_LOSS_TOLERANCE = 1e-5
REPLICATED = ("--parallelism.frozen_weights", "replicate")
TWO_BY_TWO = ("--parallelism.replicate", "2")
BF16 = ("--training.frozen_dtype", "bfloat16")
CONSTANT = ("--method.candidates", "constant")
# By number of ranks, in running order: name -> (method, overrides). ReLoRA resets after 9 steps.
STRAIGHT = {
    2: {
        "lora": ("lora", REPLICATED),
        "relora": ("relora", REPLICATED),
        "switchlora": ("switchlora", REPLICATED),
        "constant": ("switchlora", (*REPLICATED, *CONSTANT)),
        "rounded": ("switchlora", (*REPLICATED, *BF16)),
        "rounded relora": ("relora", BF16),
    },
    1: {
        "lora": ("lora", ()),
        "relora": ("relora", ()),
        "switchlora": ("switchlora", ()),
        "constant": ("switchlora", CONSTANT),
        "rounded": ("switchlora", BF16),
        "rounded relora": ("relora", BF16),
        "replicated": ("switchlora", REPLICATED),
    },
    4: {"switchlora": ("switchlora", (*REPLICATED, *TWO_BY_TWO)), "rounded": ("switchlora", BF16)},
}
# Placement of frozen weights in a resumed run, by number of ranks and placement when saved.
RESUMED = {
    2: {"shard": REPLICATED, "replicated": REPLICATED},
    1: {"replicated": ()},
    4: {"shard": REPLICATED, "replicated": TWO_BY_TWO},
}


def build(folder, method, overrides, num_ranks):
    batch = "--training.local_batch_size", "2"
    return tiny_trainer(folder, method, *batch, *overrides, num_ranks=num_ranks)


def run_all(rank, folder, num_ranks):
    """Several runs in the same processes, which are slow to start."""
    results = {
        name: run_straight(folder / f"{name}-{num_ranks}", method, overrides, num_ranks)
        for name, (method, overrides) in STRAIGHT[num_ranks].items()
    }
    if num_ranks == 2:
        for name, overrides in (("shard", ()), ("replicated", REPLICATED)):
            save_early(folder / f"saved-{name}", overrides, num_ranks)
        check_that_a_rank_apart_is_found_out(rank, folder / "apart")
    for saved, overrides in RESUMED[num_ranks].items():
        home = folder / f"resumed-{saved}-{num_ranks}"
        if rank == 0:
            shutil.copytree(folder / f"saved-{saved}", home)
        dist.barrier()
        results[f"resumed-{saved}"] = resume(home, overrides, num_ranks)
    if rank == 0:
        torch.save(results, folder / f"{num_ranks}.pt")


def run_straight(home, method, overrides, num_ranks):
    trainer = build(home, method, overrides, num_ranks)
    losses = train_steps(trainer, NUM_STEPS)
    check_how_weights_lie(trainer, is_replicated=REPLICATED[0] in overrides)
    held_out = trainer.evaluators.validation(trainer.stepper.model)
    config = tiny_config(home, method, num_ranks=num_ranks)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    is_main = dist.get_rank() == 0
    merged = built.dense_weights(gather_on_main(trainer.stepper.model.named_parameters(), is_main))
    trainer.stepper.close()
    return {
        "losses": losses,
        "held_out": held_out,
        "merged": merged,
        "frozen": {
            name: tensor
            for name, tensor in full_tensors(trainer).items()
            if name.endswith("proj.weight") and name.startswith("model.")
        },
    }


def check_how_weights_lie(trainer, is_replicated):
    for layer in low_rank_layers(trainer.stepper.model).values():
        assert isinstance(layer.weight, DTensor) != is_replicated
        assert isinstance(layer.lora_a, DTensor)
        if is_replicated:
            first = layer.weight.detach().clone()
            dist.broadcast(first, src=0)
            assert torch.equal(layer.weight, first)


def save_early(home, overrides, num_ranks):
    trainer = build(home, "switchlora", overrides, num_ranks)
    train_steps(trainer, SAVED_STEP)
    trainer.checkpointer.save(SAVED_STEP, trainer.tensors(), vars(trainer.stepper.state))
    trainer.checkpointer.finish()
    trainer.stepper.close()


def resume(home, overrides, num_ranks):
    trainer = build(home, "switchlora", overrides, num_ranks)
    assert trainer.stepper.state.step == SAVED_STEP
    losses = train_steps(trainer, NUM_STEPS - SAVED_STEP)
    trainer.stepper.close()
    return {"losses": losses}


def check_that_a_rank_apart_is_found_out(rank, home):
    trainer = build(home, "switchlora", REPLICATED, 2)
    trainer.stepper.close()
    trainer.tensors.check_replicas()
    name, layer = list(low_rank_layers(trainer.stepper.model).items())[3]
    if rank == 1:
        with torch.no_grad():
            # Changes one bit.
            layer.weight[4, 7] = torch.nextafter(layer.weight[4, 7], torch.tensor(9.0))
    with pytest.raises(
        RanksDisagreeError,
        match=rf"the same values \(model\.{name}\.weight: rank 0 against rank 1\), so they",
    ):
        trainer.tensors.check_replicas()


@pytest.fixture(scope="module")
def runs(corpora):
    """Recorded runs[number of ranks][name], and the folder of all runs."""
    folder = corpora / "replicated-ranks"
    folder.mkdir()
    for num_ranks in STRAIGHT:
        run_on_ranks(num_ranks, run_all, folder, num_ranks)
    return {num_ranks: torch.load(folder / f"{num_ranks}.pt") for num_ranks in STRAIGHT} | {
        "folder": folder
    }


@pytest.mark.parametrize(
    ("num_ranks", "name"),
    [(n, name) for n in STRAIGHT for name in STRAIGHT[n] if (n, name) != (1, "replicated")],
)
def test_replicated_frozen_weights_train_as_on_one_rank(runs, num_ranks, name):
    one, several = runs[1][name], runs[num_ranks][name]
    assert one["losses"][-1] < one["losses"][0]
    assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert several["held_out"] == pytest.approx(one["held_out"], rel=RELATIVE_LOSS_TOLERANCE)
    assert several["frozen"].keys() == one["frozen"].keys()
    assert len(one["frozen"]) == 14
    assert several["merged"].keys() == one["merged"].keys()
    # Weights of order 0.1 that change by 1e-2 a step; Adam amplifies differences.
    for key, tensor in one["merged"].items():
        torch.testing.assert_close(several["merged"][key], tensor, rtol=0, atol=1e-3)


def test_on_one_rank_replicating_weights_changes_no_bit(runs):
    one, replicated = runs[1]["switchlora"], runs[1]["replicated"]
    assert replicated["losses"] == one["losses"]
    for key, tensor in one["frozen"].items():
        assert torch.equal(replicated["frozen"][key], tensor), key


@pytest.mark.parametrize(
    ("num_ranks", "saved"), [(n, saved) for n in RESUMED for saved in RESUMED[n]]
)
def test_a_run_resumes_with_another_placement_of_frozen_weights(runs, num_ranks, saved):
    straight = runs[2]["switchlora"]["losses"][SAVED_STEP:]
    resumed = runs[num_ranks][f"resumed-{saved}"]["losses"]
    if (num_ranks, saved) == (2, "replicated"):
        assert resumed == straight
    assert resumed == pytest.approx(straight, rel=RELATIVE_LOSS_TOLERANCE)


def test_replicated_weights_are_written_once(runs):
    for name, num_pieces in (("replicated", 1), ("shard", 2)):
        (checkpoint,) = (runs["folder"] / f"saved-{name}" / "run" / "checkpoints").glob("step-*")
        tensors = read_tensors_index(checkpoint).tensors
        weights = [tensor for key, tensor in tensors.items() if key.endswith("q_proj.weight")]
        assert [len(weight.pieces) for weight in weights] == [num_pieces] * 2
        assert len(tensors["model.lm_head.weight"].pieces) == 2
