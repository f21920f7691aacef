"""Frozen weights that every rank keeps whole: they train as shards do, are the same bits on all ranks, and checkpoints do not
depend on how weights lay."""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps
from torch.distributed.tensor import DTensor

from switchtitan.checkpoint.layout import read_tensors_index
from switchtitan.distributed.shards import gather_on_main
from switchtitan.errors import RanksDisagreeError
from switchtitan.methods import METHODS
from switchtitan.methods.lowrank import low_rank_layers

NUM_STEPS, SAVED_STEP = 12, 6
# Sums over ranks are taken in another order; Adam amplifies that where gradients are near zero.
RELATIVE_LOSS_TOLERANCE = 1e-5
WHOLE = ("--parallelism.frozen_weights", "replicate")
TWO_BY_TWO = ("--parallelism.replicate", "2")
BF16 = ("--training.frozen_dtype", "bfloat16")
CONSTANT = ("--method.candidates", "constant")
# By number of ranks, in the order of running: name -> (method, settings). ReLoRA resets after 9 steps.
STRAIGHT = {
    2: {
        "lora": ("lora", WHOLE),
        "relora": ("relora", WHOLE),
        "switchlora": ("switchlora", WHOLE),
        "constant": ("switchlora", (*WHOLE, *CONSTANT)),
        "rounded": ("switchlora", (*WHOLE, *BF16)),
        "rounded relora": ("relora", BF16),
    },
    1: {
        "lora": ("lora", ()),
        "relora": ("relora", ()),
        "switchlora": ("switchlora", ()),
        "constant": ("switchlora", CONSTANT),
        "rounded": ("switchlora", BF16),
        "rounded relora": ("relora", BF16),
        "whole": ("switchlora", WHOLE),
    },
    4: {"switchlora": ("switchlora", (*WHOLE, *TWO_BY_TWO)), "rounded": ("switchlora", BF16)},
}
# How the frozen weights of a resumed run lie, by number of ranks and how those of the run that saved lay.
RESUMED = {
    2: {"shard": WHOLE, "whole": WHOLE},
    1: {"whole": ()},
    4: {"shard": WHOLE, "whole": TWO_BY_TWO},
}


def build(folder, method, overrides, num_ranks):
    batch = "--training.local_batch_size", "2"
    return tiny_trainer(folder, method, *batch, *overrides, num_ranks=num_ranks)


def run_all(rank, folder, num_ranks):
    """Several runs in the same processes, since those take longest to start."""
    results = {
        name: run_straight(folder / f"{name}-{num_ranks}", method, overrides, num_ranks)
        for name, (method, overrides) in STRAIGHT[num_ranks].items()
    }
    if num_ranks == 2:
        for name, overrides in (("shard", ()), ("whole", WHOLE)):
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
    check_how_weights_lie(trainer, is_whole=WHOLE[0] in overrides)
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


def check_how_weights_lie(trainer, is_whole):
    for layer in low_rank_layers(trainer.stepper.model).values():
        assert isinstance(layer.weight, DTensor) != is_whole
        assert isinstance(layer.lora_a, DTensor)
        if is_whole:
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
    trainer = build(home, "switchlora", WHOLE, 2)
    trainer.stepper.close()
    trainer.tensors.check_replicas()
    name, layer = list(low_rank_layers(trainer.stepper.model).items())[3]
    if rank == 1:
        with torch.no_grad():
            # One bit.
            layer.weight[4, 7] = torch.nextafter(layer.weight[4, 7], torch.tensor(9.0))
    with pytest.raises(
        RanksDisagreeError, match=rf"the same weights \(model\.{name}\.weight\), so what they"
    ):
        trainer.tensors.check_replicas()


@pytest.fixture(scope="module")
def runs(corpora):
    """What was recorded: runs[number of ranks][name]; and the folder of all runs."""
    folder = corpora / "whole-ranks"
    folder.mkdir()
    for num_ranks in STRAIGHT:
        run_on_ranks(num_ranks, run_all, folder, num_ranks)
    return {num_ranks: torch.load(folder / f"{num_ranks}.pt") for num_ranks in STRAIGHT} | {
        "folder": folder
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "name"),
    [(n, name) for n in STRAIGHT for name in STRAIGHT[n] if (n, name) != (1, "whole")],
)
def test_whole_frozen_weights_train_as_shards_on_one_rank_do(runs, num_ranks, name):
    one, several = runs[1][name], runs[num_ranks][name]
    assert one["losses"][-1] < one["losses"][0]
    assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert several["held_out"] == pytest.approx(one["held_out"], rel=RELATIVE_LOSS_TOLERANCE)
    assert several["frozen"].keys() == one["frozen"].keys()
    assert len(one["frozen"]) == 14
    assert several["merged"].keys() == one["merged"].keys()
    # Weights of order 0.1 that training moved by 1e-2 a step; Adam amplifies what differs.
    for key, tensor in one["merged"].items():
        torch.testing.assert_close(several["merged"][key], tensor, rtol=0, atol=1e-3)


@pytest.mark.distributed
def test_on_one_rank_keeping_weights_whole_changes_no_bit(runs):
    one, whole = runs[1]["switchlora"], runs[1]["whole"]
    assert whole["losses"] == one["losses"]
    for key, tensor in one["frozen"].items():
        assert torch.equal(whole["frozen"][key], tensor), key


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "saved"), [(n, saved) for n in RESUMED for saved in RESUMED[n]]
)
def test_a_run_goes_on_however_the_one_that_saved_kept_its_frozen_weights(runs, num_ranks, saved):
    straight = runs[2]["switchlora"]["losses"][SAVED_STEP:]
    resumed = runs[num_ranks][f"resumed-{saved}"]["losses"]
    if (num_ranks, saved) == (2, "whole"):
        assert resumed == straight
    assert resumed == pytest.approx(straight, rel=RELATIVE_LOSS_TOLERANCE)


@pytest.mark.distributed
def test_whole_weights_are_written_once(runs):
    for name, num_pieces in (("whole", 1), ("shard", 2)):
        (checkpoint,) = (runs["folder"] / f"saved-{name}" / "run" / "checkpoints").glob("step-*")
        tensors = read_tensors_index(checkpoint).tensors
        weights = [tensor for key, tensor in tensors.items() if key.endswith("q_proj.weight")]
        assert [len(weight.pieces) for weight in weights] == [num_pieces] * 2
        assert len(tensors["model.lm_head.weight"].pieces) == 2
