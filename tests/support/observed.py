"""What calls do: memory, tensors that they leave, and bytes that they send."""

import gc
from itertools import accumulate, pairwise
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from switchtitan.workbench.benchmark import estimate
from switchtitan.workbench.benchmark.counters import CountCommunication
from switchtitan.workbench.benchmark.steppers import fake_stepper


def saved_besides(inputs, compute):
    """Calls; returns the result, and the tensors that are saved for the backward pass in memory
    that is not one of the inputs'."""
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = compute()
    held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in held]
    assert len(others) < len(saved), "the hooks saw nothing, not even an input"
    return result, others


def peak_extra_bytes(call):
    """The peak of bytes that `call` allocates on a CPU; drops its result.

    Allocator overhead and library workspaces are not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(accumulate((num_bytes for _, num_bytes in sorted(changes)), initial=0))


def num_tensors():
    """Number of tensors that Python tracks, including garbage."""
    # Not isinstance, which asks weak proxies for the class of their referent.
    return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())


def least_growth(counts):
    """Least difference of consecutive counts: tensors created once and kept are not garbage."""
    return min(after - before for before, after in pairwise(counts))


def estimate_all_micro_batches(config, num_ranks):
    """Simulates every micro-batch of a step; `estimate_step` simulates a few."""
    with patch.object(estimate, "_NUM_SIMULATED", config.training.global_batch_size):
        return estimate.estimate_step(config, num_ranks)


def communication_of_a_step(config, num_ranks, step=2):
    """Counts what one of `num_ranks` ranks sends in a step; `CountCommunication` defines the bytes.

    Runs uncompiled training steps on fake tensors; see `fake_stepper`. Not the first by default,
    since a method may do work only then. For events that become rarer during a run, an early step
    is an upper bound.
    """
    with fake_stepper(config, num_ranks) as stepper:
        for _ in range(step - 1):
            stepper.step()
        with CountCommunication() as counter:
            stepper.step()
    return counter.counts
