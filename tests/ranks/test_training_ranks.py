"""A run is equal on 1, 2 and 4 ranks, sharded or replicated, and resumes on any number of ranks."""

import shutil

import pytest
import torch
import torch.distributed as dist
from support.layouts import LAYOUTS, RELATIVE_LOSS_TOLERANCE, run_in_layouts
from support.tiny import METHOD_KEYS, full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.blocks import CallWithInputOnHost

pytestmark = pytest.mark.timeout(1800)

# ReLoRA resets after 9 and 18 steps, and is saved during its restart warmup. GaLore and APOLLO
# update bases after 7 and 14 steps.
NUM_STEPS, SAVED_STEP, NUM_STILL_STEPS = 20, 10, 12
CONSTANT = ("--method.candidates", "constant")
MUON = ("--optimizer.name", "muon")
ON_HOST = ("--method.candidates_dtype", "bfloat16", "--method.candidates_device", "host")
VARIANTS = {
    "constant candidates": ("switchlora", CONSTANT),
    "candidates on the host": ("switchlora", ON_HOST),
    "muon": ("switchlora", MUON),
}
COLA = ("--model.name", "cola", "--model.rank", "5")
RUNS = {method: (method, ()) for method in METHOD_KEYS} | VARIANTS | {"cola": ("full_rank", COLA)}
# From the checkpoints of the layout that runs first.
RESUMED_IN = ("two", "one", "four")
# Updates change no bit, so factors equal candidates.
STILL = ("--optimizer.lr", "1e-30", "--method.freeze_steps", "0")
OFFLOAD = ("--activation_checkpoint.mode", "full", "--activation_checkpoint.offload", "true")


def train_in_layout(rank, folder, layout):
    """All runs in the same processes, which are slow to start."""
    num_ranks, placement = LAYOUTS[layout]
    results = {}
    for name, (method, keys) in RUNS.items():
        overrides = (*keys, *placement)
        home = folder / layout / name
        results[name] = train(
            home, method, overrides, num_ranks, NUM_STEPS, is_saved=layout == "two"
        )
        if layout in RESUMED_IN:
            copy = folder / layout / f"{name} resumed"
            if rank == 0:
                shutil.copytree(folder / "two" / name, copy)
            dist.barrier()
            results[f"{name} resumed"] = train(
                copy, method, overrides, num_ranks, NUM_STEPS - SAVED_STEP
            )
        if name in VARIANTS:
            home = folder / layout / f"{name} still"
            still = train(home, method, (*overrides, *STILL), num_ranks, NUM_STILL_STEPS)
            results[f"{name} still"] = still
    if layout == "two":
        results["offload"] = train(folder / "offload", "switchlora", OFFLOAD, num_ranks, NUM_STEPS)
    if rank == 0:
        torch.save(results, folder / f"{layout}.pt")


def train(folder, method, overrides, num_ranks, num_steps, is_saved=False):
    trainer = tiny_trainer(folder, method, *overrides, num_ranks=num_ranks)
    stepper, first_step, initial = (
        trainer.stepper,
        trainer.stepper.state.step,
        full_tensors(trainer),
    )
    on_host: list[int] = []
    if isinstance(stepper.model.call_block, CallWithInputOnHost):
        stepper.model.model.norm.register_forward_hook(
            lambda *_: on_host.append(len(stepper.model.call_block.tensors_on_host()))
        )
    losses = []
    if is_saved:
        losses = train_steps(trainer, SAVED_STEP)
        trainer.checkpointer.save(SAVED_STEP, trainer.tensors(), vars(stepper.state))
        trainer.checkpointer.finish()
    losses += train_steps(trainer, num_steps - len(losses))
    trainer.tensors.check_replicas()
    stepper.close()
    return {
        "first_step": first_step,
        "initial": initial,
        "losses": losses,
        "final": full_tensors(trainer),
        "metrics": stepper.optimizer.metrics(),
        "on_host": on_host,
    }


@pytest.fixture(scope="module")
def runs(corpora):
    """Recorded runs[layout][name]."""
    return run_in_layouts(corpora / "layouts", train_in_layout)


@pytest.mark.parametrize("name", RUNS)
def test_initial_values_and_losses_are_equal_on_any_number_of_ranks(runs, name):
    one = runs["one"][name]
    assert one["losses"][-1] < one["losses"][0]
    for layout in LAYOUTS:
        several = runs[layout][name]
        assert several["initial"].keys() == one["initial"].keys()
        for key, tensor in one["initial"].items():
            assert torch.equal(several["initial"][key], tensor), (layout, key)
        assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE), (
            layout
        )
        assert several["final"].keys() == one["final"].keys()
        for key, tensor in one["final"].items():
            if not tensor.is_floating_point() or key.startswith("optimizer.switch."):
                assert torch.equal(several["final"][key], tensor), (layout, key)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layout", RESUMED_IN)
def test_resuming_is_bitwise_on_the_same_ranks_and_equal_to_rounding_on_others(runs, layout, name):
    straight, resumed = runs["two"][name], runs[layout][f"{name} resumed"]
    expected = straight["losses"][SAVED_STEP:]
    assert resumed["first_step"] == SAVED_STEP
    assert resumed["losses"] == pytest.approx(expected, rel=RELATIVE_LOSS_TOLERANCE)
    assert resumed["metrics"].keys() == straight["metrics"].keys()
    if layout == "two":
        assert resumed["losses"] == expected
        assert resumed["metrics"] == straight["metrics"]
        assert resumed["final"].keys() == straight["final"].keys()
        for key, tensor in straight["final"].items():
            assert torch.equal(resumed["final"][key], tensor), key


def test_relora_resets_before_and_after_the_save(runs):
    for layout in RESUMED_IN:
        for name in ("relora", "relora resumed"):
            assert runs[layout][name]["metrics"]["reset/resets_total"] == 2


@pytest.mark.parametrize("name", ["switchlora", *VARIANTS])
def test_every_layer_switched_in_every_layout(runs, name):
    for layout in runs.values():
        tensors, metrics = layout[name]["final"], layout[name]["metrics"]
        assert tensors["optimizer.switch.num_switched"].tolist() == [NUM_STEPS * 6 // 5] * 14
        assert metrics["switch/vectors_switched_total"] == 2 * 14 * NUM_STEPS * 6 // 5


@pytest.mark.parametrize("name", VARIANTS)
def test_switched_vectors_are_bitwise_equal_on_any_number_of_ranks(runs, name):
    one = runs["one"][f"{name} still"]
    assert one["final"]["optimizer.switch.num_switched"].min() == 14, (
        "candidates of small layers are reused"
    )
    for layout in LAYOUTS:
        several, num_changed = runs[layout][f"{name} still"], 0
        for key, tensor in one["final"].items():
            if key.startswith("model.") and (".lora_" in key or ".candidates_" in key):
                assert torch.equal(several["final"][key], tensor), (layout, key)
                num_changed += ".lora_" in key and not torch.equal(one["initial"][key], tensor)
        assert num_changed == 28, "every factor of 14 layers must change"


def test_candidates_are_stored_as_configured(runs):
    for layout in runs.values():
        assert not any("candidates" in key for key in layout["constant candidates"]["final"])
        for key, tensor in layout["candidates on the host"]["final"].items():
            assert (tensor.dtype == torch.bfloat16) == (".candidates_" in key), key


def test_block_inputs_in_host_memory_change_nothing(runs):
    offloaded, kept = runs["two"]["offload"], runs["two"]["switchlora"]
    # Inputs of both blocks in each of two micro-batches.
    assert offloaded["on_host"] == [2] * 2 * NUM_STEPS
    assert offloaded["losses"] == kept["losses"]
    for key, tensor in kept["final"].items():
        assert torch.equal(offloaded["final"][key], tensor), key
