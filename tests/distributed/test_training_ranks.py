"""A run gives the same on 1, 2 and 4 ranks, sharded or replicated, and goes on from a checkpoint on any number of ranks."""

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny import METHOD_KEYS, tiny_trainer, train_steps, whole_tensors

from switchtitan.distributed.blocks import CallWithInputOnHost

NUM_STEPS = 30
# Sums over ranks are taken in another order; Adam amplifies that where gradients are near zero.
RELATIVE_LOSS_TOLERANCE = 1e-5
LAYOUTS = {
    "one": (1, []),
    "two": (2, []),
    "four": (4, []),
    "two_by_two": (4, ["--parallelism.replicate", "2"]),
}


def record_runs(rank, folder, methods, overrides, num_ranks, num_steps):
    for method in methods:
        record_run(rank, folder / method, folder / f"{method}.pt", method, overrides, num_ranks, num_steps)


def record_run(rank, folder, result_file, method, overrides, num_ranks, num_steps):
    trainer = tiny_trainer(
        folder, method, "--training.local_batch_size", "2", *overrides, num_ranks=num_ranks
    )
    on_host: list[int] = []
    if isinstance(trainer.stepper.model.call_block, CallWithInputOnHost):
        trainer.stepper.model.model.norm.register_forward_hook(
            lambda *_: on_host.append(len(trainer.stepper.model.call_block.tensors_on_host()))
        )
    losses = train_steps(trainer, num_steps)
    trainer.tensors.check_replicas()
    tensors = whole_tensors(trainer)
    metrics = trainer.stepper.optimizer.metrics()
    trainer.stepper.close()
    if rank == 0:
        torch.save(
            {"losses": losses, "tensors": tensors, "metrics": metrics, "on_host": on_host}, result_file
        )


@pytest.fixture(scope="module")
def runs(corpora):
    """The record of every method in every layout: runs[layout][method]."""
    for name, (num_ranks, overrides) in LAYOUTS.items():
        run_on_ranks(num_ranks, record_runs, corpora / name, METHOD_KEYS, overrides, num_ranks, NUM_STEPS)
    return {
        name: {method: torch.load(corpora / name / f"{method}.pt") for method in METHOD_KEYS}
        for name in LAYOUTS
    }


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHOD_KEYS)
def test_any_number_of_ranks_trains_alike(runs, method):
    one = runs["one"][method]
    assert one["losses"][-1] < one["losses"][0]
    for name in LAYOUTS:
        several = runs[name][method]
        assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE), name
        assert several["tensors"].keys() == one["tensors"].keys()
        for key, tensor in one["tensors"].items():
            if not tensor.is_floating_point() or key.startswith("optimizer.switch."):
                assert torch.equal(several["tensors"][key], tensor), (name, key)


@pytest.mark.distributed
def test_every_layer_switched_in_every_layout(runs):
    for layout in runs.values():
        tensors, metrics = layout["switchlora"]["tensors"], layout["switchlora"]["metrics"]
        assert tensors["optimizer.switch.num_switched"].tolist() == [NUM_STEPS * 6 // 5] * 14
        assert metrics["switch/vectors_switched_total"] == 2 * 14 * NUM_STEPS * 6 // 5


@pytest.mark.distributed
def test_block_inputs_in_host_memory_change_nothing(runs, corpora):
    folder = corpora / "offload"
    checkpointing = ["--activation_checkpoint.mode", "full", "--activation_checkpoint.offload", "true"]
    run_on_ranks(2, record_runs, folder, ["switchlora"], checkpointing, 2, NUM_STEPS)
    offloaded, kept = torch.load(folder / "switchlora.pt"), runs["two"]["switchlora"]
    # Both blocks' in each of two micro-batches.
    assert offloaded["on_host"] == [2] * 2 * NUM_STEPS
    assert offloaded["losses"] == kept["losses"]
    for key, tensor in kept["tensors"].items():
        assert torch.equal(offloaded["tensors"][key], tensor), key


def save_run(rank, folder, num_ranks):
    trainer = tiny_trainer(folder, "switchlora", "--evaluation.interval", "100", num_ranks=num_ranks)
    for _ in range(20):
        trainer.stepper.step()
    trainer.checkpointer.save(20, trainer.tensors(), vars(trainer.stepper.state))
    trainer.checkpointer.finish()
    trainer.stepper.close()


def resume_run(rank, folder, result_file, num_ranks):
    trainer = tiny_trainer(folder, "switchlora", num_ranks=num_ranks)
    assert trainer.stepper.state.step == 20
    losses = train_steps(trainer, 20)
    tensors = whole_tensors(trainer)
    trainer.stepper.close()
    if rank == 0:
        torch.save({"losses": losses, "tensors": tensors}, result_file)


@pytest.mark.distributed
def test_resume_on_the_same_ranks_is_bitwise_and_on_others_equal_to_rounding(corpora):
    straight_file = corpora / "straight.pt"
    run_on_ranks(2, record_run, corpora / "straight", straight_file, "switchlora", [], 2, 40)
    straight = torch.load(straight_file)

    run_on_ranks(2, save_run, corpora / "resumed", 2)
    for num_ranks in (2, 1, 4):
        result_file = corpora / f"resumed-{num_ranks}.pt"
        run_on_ranks(num_ranks, resume_run, corpora / "resumed", result_file, num_ranks)
        resumed = torch.load(result_file)
        if num_ranks == 2:
            assert resumed["losses"] == straight["losses"][20:]
            for key, tensor in straight["tensors"].items():
                assert torch.equal(resumed["tensors"][key], tensor), key
        else:
            assert resumed["losses"] == pytest.approx(straight["losses"][20:], rel=RELATIVE_LOSS_TOLERANCE)
