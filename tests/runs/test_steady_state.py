"""Steps after the first one compile nothing, although vectors are switched, and leave no tensors to
the garbage collection."""

import gc

import pytest
import torch
from support.compiled import SWITCHLORA_COMPILED, compiled_functions
from support.observed import least_growth, num_tensors
from support.tiny import COMPILED, tiny_trainer, train_steps
from torch._dynamo.utils import counters

from switchtitan.training.trainer import RunningLoss

MUON = ("--optimizer.name", "muon")
SMALL = (
    *("--optimizer.name", "muon8bit", "--training.frozen_dtype", "int16"),
    *("--training.trained_dtype", "bfloat16"),
)
RELORA_RESETS = ("--method.reset_interval", "5")
CHECKPOINTED = ("--activation_checkpoint.mode", "full")


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("overrides", [(), SMALL])
def test_no_graph_break_and_no_recompilation_in_steps_with_switches(corpora, overrides):
    trainer = tiny_trainer(corpora / "steady", "switchlora", *COMPILED, *overrides)
    train_steps(trainer, 1)
    num_graphs = counters["stats"]["unique_graphs"]
    if not overrides:
        assert compiled_functions() == SWITCHLORA_COMPILED
        assert num_graphs == sum(SWITCHLORA_COMPILED.values())
    metrics = trainer.stepper.optimizer.metrics
    switched_before = metrics()["switch/vectors_switched_total"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_steps(trainer, 20)
    trainer.stepper.close()
    assert losses[-1] < losses[0]
    assert metrics()["switch/vectors_switched_total"] - switched_before >= 80
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        # Methods differ in their layers and updates. Compilation and activation checkpointing know
        # three kinds of layers: plain ones, and targets with and without a frozen weight.
        ("full_rank", CHECKPOINTED),
        ("relora", RELORA_RESETS),
        ("fira", ()),
        ("apollo", ()),
        ("sltrain", ()),
        ("switchlora", ()),
        ("switchlora", MUON),
        ("switchlora", COMPILED),
    ],
)
def test_steps_leave_no_tensors_to_the_garbage_collection(corpora, method, overrides):
    """Such tensors would occupy memory until the next collection, many steps later."""
    trainer = tiny_trainer(corpora / "watched", method, *overrides)
    train_steps(trainer, 1)
    # Read before, because the loader's operations are the host's, and kept, because the count of
    # tensors would fall.
    ready = [next(trainer.stepper.batches) for _ in range(10)]
    trainer.stepper.close()
    trainer.stepper.batches = (micro_batches for micro_batches in ready)
    running_loss = RunningLoss(trainer.stepper.world.device)

    def take_five_steps():
        for _ in range(5):
            running_loss.add(trainer.stepper.step())
        return num_tensors()

    gc.collect()
    gc.disable()
    try:
        counts = [num_tensors(), take_five_steps(), take_five_steps()]
    finally:
        gc.enable()
    assert least_growth(counts) <= 0


def test_evaluating_saving_and_inspecting_leave_no_tensors_to_the_garbage_collection(corpora):
    keys = [w for k in ("evaluation", "checkpoint", "spectrum") for w in (f"--{k}.interval", "2")]
    overrides = ("--checkpoint.async_save", "true", "--method.candidates_device", "host")
    folder = corpora / "leftovers"
    trainer = tiny_trainer(folder, "switchlora", *keys, *overrides, "--training.steps", "13")
    step, counts = trainer.stepper.step, []

    def counting_step():
        # Counting takes longer than a step. Four steps have two evaluations, saves and inspections.
        if trainer.stepper.state.step % 4 == 0:
            counts.append(num_tensors())
        return step()

    trainer.stepper.step = counting_step
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert least_growth(counts[1:]) <= 0
