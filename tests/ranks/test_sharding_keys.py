"""How units are gathered and gradients accumulated changes no loss beyond rounding, and no
checkpoint."""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.compiled import SWITCHLORA_COMPILED, compiled_functions
from support.ranks import run_on_ranks
from support.tiny import COMPILED, full_tensors, tiny_trainer, train_steps
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from switchtitan.contracts import nothing_kept
from switchtitan.distributed.blocks import CallWithInputOnHost
from switchtitan.distributed.norms import total_norm
from switchtitan.methods.lowrank import low_rank_layers

pytestmark = pytest.mark.timeout(1800)

NUM_STEPS, SAVED_STEP = 8, 4
# Sums over micro-batches and ranks have another order.
RELATIVE_LOSS_TOLERANCE = 1e-6
# Five blocks: the last unit of two blocks has one. Six micro-batches on each of two ranks.
BASE = (
    *("--model.num_layers", "5", "--training.global_batch_size", "12"),
    *("--training.local_batch_size", "1"),
)
TWO_BY_TWO = ("--parallelism.replicate", "2")
UNITS = ("--parallelism.blocks_per_unit", "2")
STEP = ("--parallelism.frozen_weights", "gather_once")
KEPT = ("--parallelism.reshard_after_forward", "false")
SHARDED = ("--parallelism.accumulate_gradients", "sharded")
RECOMPUTED = ("--activation_checkpoint.mode", "full")
# Name -> (number of ranks, overrides); the first of each number is compared with the others.
RUNS = {
    "two": (2, ()),
    "units": (2, UNITS),
    "step": (2, STEP),
    "kept": (2, KEPT),
    "sharded": (2, SHARDED),
    "all": (2, (*UNITS, *STEP, *KEPT, *SHARDED)),
    "all recomputed": (2, (*UNITS, *STEP, *SHARDED, *RECOMPUTED)),
    "all offloaded": (2, (*UNITS, *STEP, *RECOMPUTED, "--activation_checkpoint.offload", "true")),
    "four": (4, TWO_BY_TWO),
    "four, all": (4, (*TWO_BY_TWO, *UNITS, *STEP, *KEPT, *SHARDED)),
}
# Their arithmetic is the same.
BITWISE = ("units", "step", "kept", "all offloaded")


def run_all(rank, folder, num_ranks):
    """Several runs in the same processes, which are slow to start."""
    results = {}
    for name, (needed, overrides) in RUNS.items():
        if needed == num_ranks:
            results[name] = train(folder / name, overrides, num_ranks, is_saved=name == "two")
    if num_ranks == 2:
        copy = folder / "resumed"
        if rank == 0:
            shutil.copytree(folder / "two", copy)
        dist.barrier()
        results["resumed"] = train(copy, (*UNITS, *STEP), num_ranks)
        results["stale"] = train(folder / "stale", STEP, num_ranks, is_stale=True)
        results["bf16"] = train_in_bf16(folder / "bf16", (), num_ranks)
        results["bf16 step"] = train_in_bf16(folder / "bf16 step", STEP, num_ranks)
    if rank == 0:
        torch.save(results, folder / f"{num_ranks}.pt")


def train_in_bf16(home, overrides, num_ranks):
    return train(home, ("--training.dtype", "bfloat16", *overrides), num_ranks)


def train(home, overrides, num_ranks, is_saved=False, is_stale=False):
    trainer = tiny_trainer(home, "switchlora", *BASE, *overrides, num_ranks=num_ranks)
    stepper = trainer.stepper
    on_host: list[int] = []
    if isinstance(stepper.model.call_block, CallWithInputOnHost):
        stepper.model.model.norm.register_forward_hook(
            lambda *_: on_host.append(len(stepper.model.call_block.tensors_on_host()))
        )
    if is_stale:
        # Planted: the weights gathered in the first step stay for all steps.
        stepper.model.free_kept_weights = nothing_kept
    losses = train_steps(trainer, SAVED_STEP - stepper.state.step)
    on_host_in_steps = list(on_host)
    if is_saved:
        trainer.checkpointer.save(SAVED_STEP, trainer.tensors(), vars(stepper.state))
        trainer.checkpointer.finish()
    if is_stale:
        losses += train_steps(trainer, NUM_STEPS - SAVED_STEP)
        stepper.close()
        return {"losses": losses}
    held_out = [trainer.evaluators.validation(stepper.model) for _ in range(2)]
    losses += train_steps(trainer, NUM_STEPS - SAVED_STEP)
    for layer in low_rank_layers(stepper.model).values():
        assert isinstance(layer.weight, DTensor), "shards between steps"
    trainer.tensors.check_replicas()
    final = full_tensors(trainer)
    check_the_norm(stepper)
    stepper.close()
    return {"losses": losses, "held_out": held_out, "final": final, "on_host": on_host_in_steps}


def check_the_norm(stepper):
    """Equal to torch's, which is slower for DTensors; clipping included."""
    stepper.max_grad_norm = 1e-3
    norm = stepper.compute_gradients().grad_norm
    gradients = [p.grad for p in stepper.model.parameters() if p.grad is not None]
    assert norm > 1e-2
    clipped = total_norm(gradients)
    assert torch.equal(clipped, get_total_norm(gradients).full_tensor())
    # The factor's rounding, and 1e-6 in its divisor.
    torch.testing.assert_close(clipped.item(), 1e-3, rtol=2e-4, atol=0)


@pytest.fixture(scope="module")
def runs(corpora):
    """Recorded runs[name]."""
    folder = corpora / "sharding-keys"
    folder.mkdir()
    recorded = {}
    for num_ranks in (2, 4):
        run_on_ranks(num_ranks, run_all, folder, num_ranks)
        recorded |= torch.load(folder / f"{num_ranks}.pt")
    return recorded


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("two", "four")])
def test_losses_and_checkpoints_are_those_of_the_defaults(runs, name):
    expected, run = runs["four" if RUNS[name][0] == 4 else "two"], runs[name]
    assert run["losses"] == pytest.approx(expected["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert run["held_out"] == pytest.approx(expected["held_out"], rel=RELATIVE_LOSS_TOLERANCE)
    assert run["held_out"][0] == run["held_out"][1]
    assert run["final"].keys() == expected["final"].keys()
    for key, tensor in expected["final"].items():
        assert run["final"][key].shape == tensor.shape, key
        assert run["final"][key].dtype == tensor.dtype, key
        if name in BITWISE:
            assert torch.equal(run["final"][key], tensor), key


def test_block_inputs_are_in_host_memory_only_in_the_run_that_offloads(runs):
    # Inputs of five blocks in each of six micro-batches.
    assert runs["all offloaded"]["on_host"] == [5] * 6 * SAVED_STEP
    assert runs["all recomputed"]["on_host"] == []


def test_frozen_weights_are_rounded_to_the_compute_dtype_as_before(runs):
    assert runs["bf16 step"]["losses"] == runs["bf16"]["losses"]
    assert runs["bf16"]["losses"] != runs["two"]["losses"]


def test_a_run_resumes_with_other_keys(runs):
    resumed, straight = runs["resumed"], runs["two"]
    assert resumed["losses"] == straight["losses"][SAVED_STEP:]
    for key, tensor in straight["final"].items():
        assert torch.equal(resumed["final"][key], tensor), key


def test_weights_that_are_gathered_only_in_the_first_step_are_found_out(runs):
    stale, straight = runs["stale"]["losses"], runs["two"]["losses"]
    assert stale[0] == straight[0]
    assert stale[1:] != pytest.approx(straight[1:], rel=RELATIVE_LOSS_TOLERANCE)


def check_that_nothing_recompiles(rank, folder):
    torch._dynamo.reset()
    trainer = tiny_trainer(
        folder / "compiled", "switchlora", *BASE, *UNITS, *STEP, *COMPILED, num_ranks=2
    )
    losses = train_steps(trainer, 2)
    assert compiled_functions() == SWITCHLORA_COMPILED
    assert counters["stats"]["unique_graphs"] == sum(SWITCHLORA_COMPILED.values())
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train_steps(trainer, 4)
    trainer.stepper.close()
    assert losses[-1] < losses[0]


def test_compiled_blocks_meet_the_same_tensors_in_every_step(corpora):
    run_on_ranks(2, check_that_nothing_recompiles, corpora)
